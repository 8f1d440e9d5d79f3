"""What passes on its way to an origin, kept: no reader has to fetch what has just been here.

Keeping it never fails the write, and takes nothing that is in use: without room there is no copy.
"""

import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shardmill.core.errors import InsufficientStorage, ShardmillError
from shardmill.core.origins import OriginFacts
from shardmill.storage.cache.blocks import THERE, Blocks
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.growing import GrowingFile
from shardmill.storage.cache.pieces import MAX_PIECES
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK

logger = logging.getLogger(__name__)

_BATCH = 2 << 20  # bytes; fewer are not worth a visit to a thread


@dataclass(frozen=True, slots=True)
class Whole:
    """A copy of all that passed."""

    size: int
    blocks: Blocks
    taken: int
    """Bytes of the disk."""


class Copy:
    """Use `keeping`."""

    def __init__(self, path: Path, disk: CacheDisk, size: int | None) -> None:
        self.path = path
        self._disk = disk
        self._announced = size
        self._file = GrowingFile(path, disk)
        self._size = 0
        self._is_whole = False
        self._is_taken = False

    async def passed(
        self, body: AsyncIterator[bytes | bytearray | memoryview]
    ) -> AsyncIterator[bytes | bytearray | memoryview]:
        """A body, each piece of which stays as it is; copied, as long as there is room."""
        await self._keep(self._begin())
        batch: list[memoryview] = []
        held = 0
        async for piece in body:
            batch.append(memoryview(piece))
            held += len(piece)
            if held >= _BATCH or len(batch) >= MAX_PIECES:
                await self._add(batch, held)
                batch, held = [], 0
            yield piece
        await self._add(batch, held)
        self._is_whole = True

    async def take(self, facts: OriginFacts) -> Whole | None:
        """What was kept, if it is all of this version; it is the caller's then."""
        if not self._is_whole or self._file.taken is None or facts.etag is None or facts.size != self._size:
            return None
        blocks = Blocks(self._size)
        hashes = self._file.hashes()
        for block in range(blocks.count):
            blocks.add(block, hashes[block * 8 : block * 8 + 8])
        await self._keep(self._file.reserve(blocks.room(0, blocks.count, THERE)))
        if self._file.taken is None:
            return None
        self._is_taken = True
        return Whole(self._size, blocks, self._file.taken)

    async def close(self) -> None:
        if not self._is_taken:
            await self._file.give_up()
        self._file.close()

    async def _begin(self) -> None:
        if self._announced is not None:
            if self._announced > self._disk.high:
                raise InsufficientStorage("it is larger than the cache's part of the disk")
            blocks = Blocks(self._announced, bytes(8 * -(-self._announced // BLOCK)))
            await self._file.reserve(blocks.room(0, blocks.count, THERE))
        await self._file.begin()

    async def _add(self, pieces: list[memoryview], size: int) -> None:
        self._size += size
        if pieces and self._file.taken is not None:
            await self._keep(self._file.add(pieces))

    async def _keep(self, step: Awaitable[None]) -> None:
        """Do it; if it cannot be done, keep nothing."""
        try:
            await step
        except InsufficientStorage:
            await self._file.give_up()
        except (ShardmillError, OSError) as error:
            logger.warning("what is being stored cannot be cached: %s", error)
            await self._file.give_up()


@asynccontextmanager
async def keeping(path: Path, disk: CacheDisk, size: int | None) -> AsyncIterator[Copy]:
    """A copy under `path` of a body that is about to pass; on exit it has gone if nobody took it."""
    copy = Copy(path, disk, size)
    try:
        yield copy
    finally:
        await finish(copy.close())
