"""An object whose size shows at its end only: all of it comes first, to the disk while there is room there."""

from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple

from shardmill.core.errors import InsufficientStorage
from shardmill.core.origins import OriginRead
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.growing import GrowingFile
from shardmill.storage.cache.upstream import Counters


class Whole(NamedTuple):
    """What came."""

    size: int
    hashes: bytes
    """Of its blocks."""
    taken: int | None
    """Bytes of the disk; None: there was no room, and it was only counted."""


async def take_whole(
    read: OriginRead, path: Path, disk: CacheDisk, counters: Counters, *, stop: int | None
) -> Whole | None:
    """Read to the end, into a new file while there is room.

    Args:
        read: From the first byte.
        path: Of the file.
        disk: Where it is.
        counters: Of the bucket.
        stop: What was asked for ends here; None: at the end of the object.

    Returns:
        None: It came so far, and there may be more; nothing is kept.

    Raises:
        InsufficientStorage: There is none, and it cannot be asked for as this version once more.
    """
    file = GrowingFile(path, disk)
    size = 0
    try:
        await _keep(file, file.begin(), read)
        async for piece in read:
            size += len(piece)
            counters.fetched += len(piece)
            if file.taken is not None:
                await _keep(file, file.add([piece]), read)
        if size == stop:
            await file.give_up()
            return None
        hashes = file.hashes()
    except BaseException:
        await file.give_up()
        raise
    finally:
        file.close()
    return Whole(size, hashes, file.taken)


async def _keep(file: GrowingFile, step: Awaitable[None], read: OriginRead) -> None:
    """Do it; without room go on without keeping what comes, where it can be asked for once more."""
    try:
        await step
    except InsufficientStorage:
        if read.facts.validator == "none":
            raise
        await file.give_up()
