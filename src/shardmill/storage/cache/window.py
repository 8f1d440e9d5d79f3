"""Of an object that passes through memory: which part of it is there, and the memory that all of these share."""

import asyncio

from shardmill.core.errors import InsufficientStorage
from shardmill.storage.trailer import BLOCK

WINDOW = 32 << 20  # bytes in memory of an object that passes through, unless more is read at once
AT_ONCE = 8  # objects that pass through memory


class Memory:
    """What the objects of a bucket take that pass through.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int = AT_ONCE * WINDOW) -> None:
        self._free = limit

    def has(self, size: int) -> bool:
        return size <= self._free

    def take(self, size: int) -> None:
        self._free -= size

    def give_back(self, size: int) -> None:
        self._free += size


class Window:
    """Bytes [low, low + size) of one object, which move on with its reader. Resources: `close` gives the memory back.

    Args:
        start: The first byte that will be read.
        memory: Has room for a window.
        label: Names the object in errors.
    """

    def __init__(self, start: int, memory: Memory, label: str) -> None:
        self.low = start - start % BLOCK
        self.size = WINDOW
        self._memory = memory
        self._label = label
        self._moved = asyncio.Event()
        memory.take(WINDOW)

    def reach(self, start: int, need: int) -> None:
        """Bytes [start, need) are wanted: become as wide as that takes.

        Raises:
            InsufficientStorage: They are given up already, or there is no memory for so many at once.
        """
        more = -(-max(0, need - self.low - self.size) // BLOCK) * BLOCK
        if start < self.low or not self._memory.has(more):
            raise InsufficientStorage(f"{self._label}: there is no room on the disk for all that is read of it")
        if more:
            self._memory.take(more)
            self.size += more
            self._moved.set()

    def move(self, position: int) -> tuple[int, int] | None:
        """Bytes before `position` are given up; returns the blocks [first, last) that are, if any."""
        first, last = self.low // BLOCK, position // BLOCK
        if last <= first:
            return None
        self.low = last * BLOCK
        self._moved.set()
        return first, last

    async def wait_for(self, position: int) -> None:
        """Wait until the byte at `position` is in it."""
        while position >= self.low + self.size:
            self._moved.clear()
            await self._moved.wait()

    def close(self) -> None:
        self._memory.give_back(self.size)
        self.size = 0
