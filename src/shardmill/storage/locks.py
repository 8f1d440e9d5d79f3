"""One writer a key: whoever changes an object holds its lock from the condition to the commit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class KeyLocks:
    """Locks by key, made when they are needed and forgotten when nobody waits."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._idle = asyncio.Event()
        self._all: asyncio.Event | None = None
        """Set when whoever holds all keys lets them go; None: nobody does."""

    @property
    def is_idle(self) -> bool:
        """Nobody holds a key or waits for one."""
        return not self._locks

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Wait for the key and keep it for the block."""
        while self._all is not None:
            await self._all.wait()
        lock, waiting = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, waiting + 1
        self._idle.clear()
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks[key]
            if waiting == 1:
                del self._locks[key]
            else:
                self._locks[key] = lock, waiting - 1
            if not self._locks:
                self._idle.set()

    @asynccontextmanager
    async def hold_all(self) -> AsyncIterator[None]:
        """Wait until no key is held; keep every other holder waiting for the block."""
        while self._all is not None:
            await self._all.wait()
        released = self._all = asyncio.Event()
        try:
            if self._locks:
                await self._idle.wait()
            yield
        finally:
            self._all = None
            released.set()
