"""The emulators, each started once for all tests; `make test-emulators` says where their programs are."""

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from shardmill.storage.origins.remote import RemoteOrigin
from shardmill.testing import emulators
from shardmill.testing.emulators import Emulator

RELEASE_SECONDS = 5.0


@pytest.fixture(scope="session")
def programs() -> Path:
    given = os.environ.get("SHARDMILL_TEST_EMULATORS")
    assert given, "run them with `make test-emulators`, or set SHARDMILL_TEST_EMULATORS to what tools/emulators prints"
    return Path(given)


@pytest.fixture(scope="session", autouse=True)
def started_library() -> None:
    """The library behind the stores keeps threads and descriptors of its own once it was used."""

    async def use() -> None:
        await obstore.put_async(MemoryStore(), "key", b"x")

    asyncio.run(use())


@pytest.fixture(autouse=True)
def library_lets_go() -> Iterator[None]:
    """What the threads of the library held of Python, and through it its connections, goes at the next call of it."""
    yield
    deadline = time.monotonic() + RELEASE_SECONDS
    while time.monotonic() < deadline:
        MemoryStore()
        gc.collect()
        if not any(isinstance(found, RemoteOrigin) for found in gc.get_objects()):
            return
        time.sleep(0.01)


@pytest.fixture(scope="session")
def moto(programs: Path) -> Iterator[Emulator]:
    with emulators.moto(programs) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def seaweedfs(programs: Path) -> Iterator[Emulator]:
    with emulators.seaweedfs(programs) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def azurite(programs: Path) -> Iterator[Emulator]:
    with emulators.azurite(programs) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def fake_gcs(programs: Path) -> Iterator[Emulator]:
    with emulators.fake_gcs(programs) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def nginx(programs: Path) -> Iterator[Emulator]:
    with emulators.nginx(programs) as emulator:
        yield emulator
