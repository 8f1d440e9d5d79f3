"""Of an object that passes through memory: which part of it is there, and the memory that all of these share."""

import asyncio
from collections import deque

from shardmill.core.errors import Busy, InsufficientStorage
from shardmill.storage.trailer import BLOCK

WINDOW = 32 << 20  # bytes in memory of an object that passes through, unless more is read at once
AT_ONCE = 8  # windows in memory; with more readers at once theirs are smaller
LEAST = 4 << 20  # bytes of a window
PATIENCE = 30.0  # seconds that a reader waits for one

_SHARE = 4  # a window takes at most this part of what is left


class Memory:
    """What the objects of a bucket take that pass through.

    Args:
        limit: Bytes.
        patience: Seconds that somebody waits for some.
    """

    def __init__(self, limit: int = AT_ONCE * WINDOW, patience: float = PATIENCE) -> None:
        self._limit = limit
        self._patience = patience
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for some."""
        return bool(self._waiting)

    async def take_share(self) -> int:
        """Take a window's worth, less when there is little left; returns the bytes, whole blocks.

        Raises:
            TimeoutError: There was none for a while.
        """
        share = self._free // _SHARE
        size = min(WINDOW, max(LEAST, share - share % BLOCK))
        if self.is_wanted or self._free < size:
            size = LEAST
        await self.take(size)
        return size

    async def take(self, size: int) -> None:
        """Take so much when there is so much, in turn with others.

        Raises:
            TimeoutError: There was not for a while, or there cannot be.
        """
        if size > self._limit:
            raise TimeoutError
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            elif (size, turn) in self._waiting:
                self._waiting.remove((size, turn))
                self._serve()
            raise

    def give_back(self, size: int) -> None:
        self._free += size
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)


class Window:
    """Bytes [low, low + size) of one object, which move on with its reader. Use `Window.open`.

    Resources: `close` gives the memory back.

    Args:
        start: The first byte that will be read.
        size: Bytes of the memory that it has taken.
        label: Names the object in errors.
    """

    def __init__(self, start: int, size: int, memory: Memory, label: str) -> None:
        self.low = start - start % BLOCK
        self.size = size
        self._memory = memory
        self._label = label
        self._moved = asyncio.Event()

    @classmethod
    async def open(cls, start: int, memory: Memory, label: str) -> "Window":
        """Wait for memory in turn with others.

        Raises:
            Busy: There was none for a while.
        """
        try:
            return cls(start, await memory.take_share(), memory, label)
        except TimeoutError:
            raise Busy(f"{label}: there is no room for it on the disk now; ask again", retry_after=1) from None

    async def reach(self, start: int, need: int) -> None:
        """Bytes [start, need) are wanted: become as wide as that takes.

        Raises:
            InsufficientStorage: They are given up already, or there is no memory for so many at once.
        """
        problem = f"{self._label}: there is no room on the disk for all that is read of it"
        while (more := -(-max(0, need - self.low - self.size) // BLOCK) * BLOCK) and start >= self.low:
            try:
                await self._memory.take(more)
            except TimeoutError:
                raise InsufficientStorage(problem) from None
            self.size += more
            self._moved.set()
        if start < self.low:
            raise InsufficientStorage(problem)

    def move(self, position: int) -> tuple[int, int] | None:
        """Bytes before `position` are given up; returns the blocks [first, last) that are, if any."""
        first, last = self.low // BLOCK, position // BLOCK
        if last <= first:
            return None
        if self._memory.is_wanted and self.size > LEAST:
            # Its end stays where it is, since that far bytes are under way.
            spare = min((last - first) * BLOCK, self.size - LEAST)
            self.size -= spare
            self._memory.give_back(spare)
        self.low = last * BLOCK
        self._moved.set()
        return first, last

    async def wait_for(self, position: int) -> int:
        """Wait until the byte at `position` is in it; returns how many are from there on."""
        while position >= self.low + self.size:
            self._moved.clear()
            await self._moved.wait()
        return self.low + self.size - position

    def close(self) -> None:
        self._memory.give_back(self.size)
        self.size = 0
