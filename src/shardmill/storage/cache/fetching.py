"""Bringing a whole object before anybody reads it."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from shardmill.core.errors import InsufficientStorage
from shardmill.core.meta import ObjectMeta
from shardmill.storage.cache.store import CachedBucket

STEP = 8 << 20  # bytes that are asked for at once where a pace is kept

Pace = Callable[[int], Awaitable[None]]
"""Waits until so many bytes more may be fetched."""


class Fetched(NamedTuple):
    """An object that is on the disk."""

    meta: ObjectMeta
    missing: int
    """Bytes of it that were not there before."""


async def fetch(store: CachedBucket, key: str, *, pace: Pace | None, report: Callable[[float], None]) -> Fetched:
    """Bring what is missing of the current version, to stay.

    Args:
        store: Of the object.
        key: Of the object.
        pace: None: as fast as it comes.
        report: Told how much of it is there, 0 to 1.

    Raises:
        InsufficientStorage: There is no room for it.
    """
    before = {found.version: found.there for found in store.describe([key])}
    if pace is not None:
        await pace(STEP)
    source = await store.open(key, expected=(0, None if pace is None else STEP))
    try:
        size, position = source.meta.size, 0
        while position < size:
            stop = min(size, position + STEP)
            if pace is not None and position and not source.has(position, stop):
                await pace(stop - position)
            await source.ensure(position, stop)
            if not source.is_kept:
                raise InsufficientStorage(
                    f"{store.bucket}/{key}: there is no room for it on the disk ([cache] capacity); evict something"
                )
            position = stop
            report(position / size)
        return Fetched(source.meta, size - before.get(source.meta.version, 0))
    finally:
        source.close()
