"""The library behind the stores keeps threads and descriptors of its own once it was used; not a test's leftovers."""

import asyncio

import obstore
import pytest
from obstore.store import MemoryStore


@pytest.fixture(scope="session", autouse=True)
def started_library() -> None:
    async def use() -> None:
        await obstore.put_async(MemoryStore(), "key", b"x")

    asyncio.run(use())
