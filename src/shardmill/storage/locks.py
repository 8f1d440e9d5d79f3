"""One writer a key: whoever changes an object holds its lock from the condition to the commit."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class KeyLocks:
    """Locks by key, made when they are needed and forgotten when nobody waits. Used from the loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Of each key that is held: who waits for it."""
        self._idle = asyncio.Event()
        self._all: asyncio.Event | None = None
        """Set when whoever holds all keys lets them go; None: nobody does."""

    @property
    def is_idle(self) -> bool:
        """Nobody holds a key or waits for one."""
        return not self._waiting

    def take_nowait(self, key: str) -> bool:
        """Hold a key until `release`; False: somebody does."""
        if self._all is not None or key in self._waiting:
            return False
        self._waiting[key] = deque()
        self._idle.clear()
        return True

    def release(self, key: str) -> None:
        """Whoever has waited longest has it now."""
        waiting = self._waiting[key]
        while waiting:
            next_one = waiting.popleft()
            if not next_one.done():
                next_one.set_result(None)
                return
        del self._waiting[key]
        if not self._waiting:
            self._idle.set()

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Wait for the key and keep it for the block."""
        while self._all is not None:
            await self._all.wait()
        if not self.take_nowait(key):
            await self._wait(key)
        try:
            yield
        finally:
            self.release(key)

    async def _wait(self, key: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[key].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(key)
            raise

    @asynccontextmanager
    async def hold_all(self) -> AsyncIterator[None]:
        """Wait until no key is held; keep every other holder waiting for the block."""
        while self._all is not None:
            await self._all.wait()
        released = self._all = asyncio.Event()
        try:
            if self._waiting:
                await self._idle.wait()
            yield
        finally:
            self._all = None
            released.set()
