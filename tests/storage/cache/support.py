"""A cached bucket over a web server, and ways to read it."""

import asyncio
import contextlib
import os
import random
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from shardmill.core.refs import Bucket
from shardmill.core.sources import Source
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.cache.store import CachedBucket
from shardmill.storage.kept import Shelf
from tests.storage.cache.web import Web, WebOrigin

BUCKET = Bucket.of("gs", "origin")
MIB = 1 << 20
SECONDS = 60.0
Value = TypeVar("Value")


def run(story: Coroutine[Any, Any, Value]) -> Value:
    """Run a story that ends."""

    async def bounded() -> Value:
        async with asyncio.timeout(SECONDS):
            return await story

    return asyncio.run(bounded())


def make(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@asynccontextmanager
async def open_cache(
    origin: Web,
    data: Path,
    policy: CachePolicy | None = None,
    *,
    capacity: int = 0,
    high: int = 100,
    low: int = 80,
    client: Callable[[str, aiohttp.ClientSession], WebOrigin] = WebOrigin,
) -> AsyncIterator[CachedBucket]:
    """The cache of one bucket in `data`."""
    data.mkdir(exist_ok=True)
    with ThreadPoolExecutor(8) as threads:
        disk = CacheDisk(data, capacity=capacity, high=high, low=low, threads=threads)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            CachedBucket.open_directory(
                BUCKET,
                client(origin.url, session),
                data / "bucket",
                disk=disk,
                policy=policy or CachePolicy(),
                threads=threads,
                shelf=Shelf(16),
            ) as store,
        ):
            await disk.shrink()
            yield store


async def read(
    store: CachedBucket, key: str, start: int = 0, stop: int | None = None, *, is_told: bool = True
) -> bytes:
    """Bytes of an object, as an answer sends them."""
    source = await store.open(key, expected=(start, stop) if is_told else None)
    try:
        return await read_source(source, start, stop)
    finally:
        source.close()


async def read_source(source: Source, start: int = 0, stop: int | None = None, *, step: int = 16 * MIB) -> bytes:
    stop = source.meta.size if stop is None else min(stop, source.meta.size)
    found = bytearray()
    while start < stop:
        reached = await source.ensure_some(start, min(stop, start + step))
        assert start < reached <= stop
        piece = os.pread(source.descriptor, reached - start, start)
        assert len(piece) == reached - start
        found += piece
        start = reached
        source.release(start)
    await source.check_unchanged()
    return bytes(found)


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


def disk_use(data: Path) -> int:
    """Bytes that the files below take on the disk."""
    size = 0
    for path in data.rglob("*"):
        # They come and go meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            size += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return size


def is_settled(store: CachedBucket) -> bool:
    """Nothing arrives and nobody reads."""
    return not store.statistics().filling and not any(found.readers for found in store.cached(""))
