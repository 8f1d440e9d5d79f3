"""From a read of an origin into a file: pieces queue up while a thread writes, so that network and disk do not wait.

Pieces are hashed by block as they are written, and a block is noted in its log after its bytes were written.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import xxhash

from shardmill.storage.cache.record import note
from shardmill.storage.files import is_full, write_all
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK

_MAX_QUEUED = 4 << 20  # bytes read ahead of the disk, of one read
MAX_PIECES = 512  # buffers in one call of the kernel
_LINGER = 0.005  # seconds at most that bytes wait for more: a visit to a thread costs as much as writing many of them
_KEEP_SIZE, _PUNCH = 0x01, 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE; with FALLOC_FL_PUNCH_HOLE
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_libc = ctypes.CDLL(None, use_errno=True)


class Queue:
    """Pieces on their way from one task to another."""

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []
        self._size = 0
        self._least = 1
        self._is_ended = False
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    async def put(self, piece: memoryview) -> None:
        """Append one; waits while too much is queued, or the other end takes nothing more."""
        while self._size >= _MAX_QUEUED or len(self._pieces) >= MAX_PIECES:
            self._emptied.clear()
            await self._emptied.wait()
        self._pieces.append(piece)
        self._size += len(piece)
        if self._is_enough:
            self._filled.set()

    def end(self) -> None:
        """Nothing follows."""
        self._is_ended = True
        self._filled.set()

    async def take(self, least: int = 1) -> Sequence[memoryview]:
        """All that is queued, at least one piece; nothing at the end. A moment is waited for `least` bytes."""
        await self._wait(1)
        if self._size < least:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    await self._wait(least)
        taken, self._pieces, self._size = self._pieces, [], 0
        self._emptied.set()
        return taken

    async def _wait(self, least: int) -> None:
        self._least = least
        while not self._is_enough:
            self._filled.clear()
            await self._filled.wait()

    @property
    def _is_enough(self) -> bool:
        return self._size >= self._least or len(self._pieces) >= MAX_PIECES or self._is_ended


async def copy(pieces: AsyncIterable[memoryview], write: Callable[[Queue], Awaitable[None]]) -> None:
    """Read pieces while `write` takes them from a queue; raises what either of them does, the writer's first."""
    queue = Queue()
    reading = asyncio.ensure_future(_read(pieces, queue))
    writing = asyncio.ensure_future(write(queue))
    try:
        await asyncio.wait((reading, writing), return_when=asyncio.FIRST_EXCEPTION)
        if reading.done():
            # What has come is worth its while, whatever ended it.
            await asyncio.wait((writing,))
    finally:
        reading.cancel()
        writing.cancel()
        await finish(asyncio.wait((reading, writing)))
    errors = [task.exception() for task in (writing, reading) if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error


async def _read(pieces: AsyncIterable[memoryview], queue: Queue) -> None:
    try:
        async for piece in pieces:
            await queue.put(piece)
    finally:
        queue.end()


@dataclass(slots=True)
class PieceWriter:
    """Writes consecutive bytes of one object, from the start of a block on; blocking."""

    descriptor: int
    log: int | None
    size: int
    """Bytes of the whole object; -1: not known."""
    position: int
    """Where the next byte goes."""
    _hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    def write(self, pieces: Sequence[memoryview]) -> list[tuple[int, bytes]]:
        """Write pieces; returns the blocks that are complete with them, and their hashes."""
        _write_all(self.descriptor, pieces, self.position)
        found: list[tuple[int, bytes]] = []
        for piece in pieces:
            view = piece
            while view:
                part = view[: BLOCK - self.position % BLOCK]
                self._hasher.update(part)
                self.position += len(part)
                if self.position % BLOCK == 0 or self.position == self.size:
                    found.append(((self.position - 1) // BLOCK, self._hasher.intdigest().to_bytes(8, "little")))
                    self._hasher.reset()
                view = view[len(part) :]
        if found and self.log is not None:
            try:
                write_all(self.log, b"".join(note(block, digest) for block, digest in found))
            except OSError as error:
                if not is_full(error):
                    raise
                # The blocks are there; the next process will not know, and fetch them again.
        return found

    def finish(self) -> bytes:
        """The hash of what is written of a last block whose end shows only now; nothing if there is none."""
        return self._hasher.intdigest().to_bytes(8, "little") if self.position % BLOCK else b""


def _write_all(descriptor: int, pieces: Sequence[memoryview], offset: int) -> None:
    left = list(pieces)
    while left:
        written = os.pwritev(descriptor, left, offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def allocate(descriptor: int, runs: Sequence[tuple[int, int]]) -> None:
    """Take the disk of bytes [start, stop) now, where the file system can; blocking.

    Raises:
        OSError: There is none; some of it may be taken all the same.
    """
    for start, stop in runs:
        while error := _fallocate(descriptor, _KEEP_SIZE, start, stop):
            if error in _UNSUPPORTED:
                return
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error))


def punch(descriptor: int, start: int, stop: int) -> None:
    """Give back the memory, or disk, of bytes [start, stop)."""
    _fallocate(descriptor, _PUNCH, start, stop)


def _fallocate(descriptor: int, mode: int, start: int, stop: int) -> int:
    """Returns the number of the error; 0: done."""
    failed: int = _libc.fallocate(
        ctypes.c_int(descriptor), ctypes.c_int(mode), ctypes.c_longlong(start), ctypes.c_longlong(stop - start)
    )
    return ctypes.get_errno() if failed else 0


@dataclass(slots=True)
class Batch:
    """Pieces that are written, or passed over, together."""

    pieces: list[memoryview]
    size: int
    is_owned: bool


def cut(pieces: Sequence[memoryview], position: int, owned: Collection[int], *, owns_all: bool) -> list[Batch]:
    """Pieces from `position` on, by whether their block is one of those that this read brings."""
    if owns_all:
        return [Batch(list(pieces), sum(map(len, pieces)), True)]
    found: list[Batch] = []
    for piece in pieces:
        view = piece
        while view:
            part = view[: BLOCK - position % BLOCK]
            is_owned = position // BLOCK in owned
            if not found or found[-1].is_owned != is_owned:
                found.append(Batch([], 0, is_owned))
            found[-1].pieces.append(part)
            found[-1].size += len(part)
            position += len(part)
            view = view[len(part) :]
    return found


class Taker:
    """Takes pieces from where they are received, in a thread, and writes those of some blocks.

    Args:
        writer: Stands where the first piece begins.
        owned: The blocks that are to be written.
        owns_all: All that come are.
    """

    def __init__(self, writer: PieceWriter, owned: Collection[int], *, owns_all: bool) -> None:
        self._writer = writer
        self._owned = owned
        self._owns_all = owns_all
        self._found: list[tuple[int, bytes]] = []

    def take(self, piece: memoryview) -> None:
        """Blocking: write one, or pass over it."""
        for batch in cut([piece], self._writer.position, self._owned, owns_all=self._owns_all):
            if batch.is_owned:
                self._found += self._writer.write(batch.pieces)
            else:
                self._writer.position += batch.size

    def found(self) -> Sequence[tuple[int, bytes]]:
        """Blocks that are complete since the last call, with their hashes."""
        found, self._found = self._found, []
        return found
