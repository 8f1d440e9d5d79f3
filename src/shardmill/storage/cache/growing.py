"""A file of an object that is written from its first byte to its last, before it is known what version it is."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.pieces import PieceWriter
from shardmill.storage.steps import finish, opened


class GrowingFile:
    """Resources: `close`, and before it `give_up` where the file is not wanted."""

    def __init__(self, path: Path, disk: CacheDisk) -> None:
        self.path = path
        self.taken: int | None = 0
        """Bytes of the disk; None: it was given up."""
        self._disk = disk
        self._writer: PieceWriter | None = None
        self._hashes = bytearray()
        self._written = 0

    async def begin(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        opening = asyncio.ensure_future(self._disk.in_thread(os.open, self.path, flags, 0o600))
        self._writer = PieceWriter(await opened(opening, os.close), None, -1, 0)

    async def reserve(self, size: int) -> None:
        """Have room for so many bytes in all; raises InsufficientStorage."""
        assert self.taken is not None
        more = max(0, size - self.taken)
        await self._disk.take(more)
        self.taken += more

    async def add(self, pieces: Sequence[memoryview]) -> None:
        """Append; raises InsufficientStorage."""
        assert self._writer is not None
        self._written += sum(map(len, pieces))
        await self.reserve(self._written)
        found = await finish(self._disk.in_thread(self._writer.write, pieces))
        self._hashes += b"".join(digest for _, digest in found)

    async def give_up(self) -> None:
        """Nothing is left of it on the disk."""
        taken, self.taken = self.taken, None
        if taken is not None:
            self._disk.give_back(taken)
            await self._disk.unlink([self.path])

    def hashes(self) -> bytes:
        """Of its blocks; once."""
        return bytes(self._hashes) + (self._writer.finish() if self._writer is not None else b"")

    def close(self) -> None:
        if self._writer is not None:
            os.close(self._writer.descriptor)
            self._writer = None
