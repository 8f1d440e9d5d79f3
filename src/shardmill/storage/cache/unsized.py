"""An object whose size shows at its end only: all of it comes first, to the disk while there is room there."""

import asyncio
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple

from shardmill.core.errors import InsufficientStorage
from shardmill.core.origins import OriginRead
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.pieces import PieceWriter
from shardmill.storage.cache.upstream import Counters
from shardmill.storage.steps import finish, opened


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
    keeping = _Keeping(path, disk)
    size = 0
    try:
        await keeping.keep(keeping.begin(), read)
        async for piece in read:
            size += len(piece)
            counters.fetched += len(piece)
            if keeping.taken is not None:
                await keeping.keep(keeping.add(piece), read)
        if size == stop:
            await keeping.give_up()
            return None
    except BaseException:
        await keeping.give_up()
        raise
    finally:
        keeping.close()
    return Whole(size, keeping.hashes(), keeping.taken)


class _Keeping:
    """A file that grows until there is no room. Resources: `close`."""

    def __init__(self, path: Path, disk: CacheDisk) -> None:
        self.taken: int | None = 0
        self._path = path
        self._disk = disk
        self._writer: PieceWriter | None = None
        self._hashes = bytearray()

    async def keep(self, step: Awaitable[None], read: OriginRead) -> None:
        """Do it; without room go on without keeping what comes, where it can be asked for once more."""
        try:
            await step
        except InsufficientStorage:
            if read.facts.validator == "none":
                raise
            await self.give_up()

    async def begin(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        opening = asyncio.ensure_future(self._disk.in_thread(os.open, self._path, flags, 0o600))
        self._writer = PieceWriter(await opened(opening, os.close), None, -1, 0)

    async def add(self, piece: memoryview) -> None:
        assert self.taken is not None
        assert self._writer is not None
        await self._disk.take(len(piece))
        self.taken += len(piece)
        found = await finish(self._disk.in_thread(self._writer.write, [piece]))
        self._hashes += b"".join(digest for _, digest in found)

    async def give_up(self) -> None:
        """Nothing is left of it on the disk."""
        taken, self.taken = self.taken, None
        if taken is not None:
            self._disk.give_back(taken)
            await self._disk.unlink([self._path])

    def hashes(self) -> bytes:
        return bytes(self._hashes) + (self._writer.finish() if self._writer is not None else b"")

    def close(self) -> None:
        if self._writer is not None:
            os.close(self._writer.descriptor)
