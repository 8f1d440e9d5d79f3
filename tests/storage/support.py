"""Stores to test: a pool in a data directory of its own, a directory as a bucket."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

from shardmill.core.refs import Bucket
from shardmill.storage.buckets import BucketDefinition, Buckets
from shardmill.storage.directory import DirectoryStore, Links
from shardmill.storage.kept import Shelf
from shardmill.storage.pool import Durability, PoolStore

POOL = Bucket.of("ais", "pool")
DIRECTORY = Bucket.of("gs", "directory")
SECONDS = 60.0

Value = TypeVar("Value")


def run(story: Coroutine[Any, Any, Value]) -> Value:
    """Run a story that ends."""

    async def bounded() -> Value:
        async with asyncio.timeout(SECONDS):
            return await story

    return asyncio.run(bounded())


@asynccontextmanager
async def open_buckets(
    data: Path, *definitions: BucketDefinition, durability: Durability = "power"
) -> AsyncIterator[Buckets]:
    """The buckets of a data directory; without definitions, the pool bucket `POOL` is configured."""
    wanted = definitions or (BucketDefinition(POOL, None, writable=True, durability=durability),)
    async with Buckets.open(data, wanted, threads=8, durability=durability) as buckets:
        yield buckets


@asynccontextmanager
async def open_pool(data: Path, *, durability: Durability = "power") -> AsyncIterator[PoolStore]:
    async with open_buckets(data, durability=durability) as buckets:
        store = buckets.writable(POOL)
        assert isinstance(store, PoolStore)
        yield store


@asynccontextmanager
async def open_directory(
    path: Path, *, links: Links = "refuse", is_durable: bool = True, is_made_up: bool = False
) -> AsyncIterator[DirectoryStore]:
    with ThreadPoolExecutor(8) as threads:
        yield DirectoryStore(
            DIRECTORY,
            path,
            links=links,
            threads=threads,
            is_durable=is_durable,
            shelf=Shelf(16),
            is_far=is_made_up,
            is_made_up=is_made_up,
        )


def keeps_attributes() -> bool:
    """Whether the file system of temporary files has user attributes, as directories need for user metadata."""
    with NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.shardmill.test", b"x")
        except OSError:
            return False
        return True


async def make_files(store: PoolStore) -> None:
    """Let objects that are only in the log have their files."""
    await store._groups().make_files()


def pool_files(data: Path) -> Sequence[Path]:
    """Files of all objects of all pool buckets."""
    return sorted(path for path in data.glob("pool/*/??/*") if path.is_file())


def temporary_files(data: Path) -> Sequence[str]:
    """What uploads have left."""
    return sorted(str(path) for path in data.glob("pool/*/tmp/*"))
