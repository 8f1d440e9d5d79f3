"""Room on the disk for the cached objects of all buckets of a node: counted, and made by letting the least used go.

What is open or arriving, and what is pinned, stays. Room is taken before bytes are written, so the disk never holds
more than the high watermark; when it is reached, objects leave until the low one is.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from shardmill.core.errors import InsufficientStorage
from shardmill.storage.cache.eviction import choose_victims
from shardmill.storage.files import disk_errors
from shardmill.storage.steps import finish

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_FREE = 0.05, 1 << 30  # of the file system, bytes at most: what the cache leaves to others
_FREE_SECONDS = 0.5  # between looks at the disk


class Evictable(Protocol):
    """Something on the disk that may have to leave."""

    @property
    def taken(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def used(self) -> float:
        """Unix time of the last use."""
        ...

    @property
    def may_leave(self) -> bool: ...

    def leave(self) -> Sequence[Path]:
        """Be forgotten, with a call of `CacheDisk.forget`; returns the files to be removed."""
        ...


class CacheDisk:
    """Args:
    directory: Of the cache; made if it is not there.
    capacity: Bytes; 0: as large as the file system.
    high: Percent of the capacity that is never passed.
    low: Percent down to which is evicted then.
    """

    def __init__(self, directory: Path, *, capacity: int, high: int, low: int, threads: ThreadPoolExecutor) -> None:
        self.directory = directory
        self.used = 0
        """Bytes taken."""
        self._threads = threads
        directory.mkdir(exist_ok=True)
        status = os.statvfs(directory)
        self.capacity = int(capacity) or status.f_blocks * status.f_frsize
        self._high = self.capacity * high // 100
        self._low = self.capacity * low // 100
        self._items: set[Evictable] = set()
        self._free = 0
        self._free_until = 0.0
        self._leaving = 0
        """Bytes of what may be found no more and is still being removed."""
        self._left = asyncio.Event()

    @property
    def high(self) -> int:
        """Bytes that are never passed."""
        return self._high

    def add(self, item: Evictable) -> None:
        """It is there, with what it has taken."""
        self._items.add(item)

    def forget(self, item: Evictable) -> None:
        """It has gone; the room that it took is given back apart."""
        self._items.discard(item)

    def give_back(self, size: int) -> None:
        self.used -= size

    def found(self, size: int) -> None:
        """So much is taken by what an earlier process left."""
        self.used += size

    async def take(self, size: int) -> None:
        """Take room; what has to leave for it has left when this returns.

        Raises:
            InsufficientStorage: What is there is in use, or pinned, or not the cache's.
        """
        if not size:
            return
        free = await self._count_free(size)
        least = max(self.used + size - self._high, size - free)
        victims: Sequence[Evictable] = ()
        if least > 0:
            need = max(self.used + size - self._low, least)
            found = choose_victims(
                [item for item in self._items if item.may_leave],
                need,
                least,
                size=lambda item: item.taken,
                used=lambda item: item.used,
            )
            if found is None:
                raise InsufficientStorage("the cache's part of the disk is full of what is in use")
            victims = found
        self.used += size
        self._free -= size
        try:
            await self.remove(victims)
            while self._leaving and self.used + self._leaving > self._high:
                # What others let leave gives no room before its files have gone.
                self._left.clear()
                await self._left.wait()
        except BaseException:
            self.give_back(size)
            raise

    async def make_room(self, size: int) -> None:
        """Look at the disk, which others have filled, and let leave what has to for so much more."""
        self._free_until = 0.0
        await self.take(size)
        self.give_back(size)

    def load_leftovers(self, names: Collection[str]) -> None:
        """Blocking: count what is there of other buckets than those in directories `names`; it may leave."""
        for folder in self.directory.iterdir():
            if folder.name in names or not folder.is_dir():
                continue
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                status = path.stat()
                leftover = _Leftover(self, path, status.st_blocks * 512, status.st_mtime)
                self.found(leftover.taken)
                self.add(leftover)

    async def shrink(self) -> None:
        """Come below the high watermark, after a start with a smaller one; as far as may be."""
        excess = self.used - self._high
        if excess > 0:
            items = [item for item in self._items if item.may_leave]
            found = choose_victims(items, excess, 0, size=lambda item: item.taken, used=lambda item: item.used)
            await self.remove(found or ())

    async def remove(self, items: Iterable[Evictable]) -> int:
        """Remove what may leave; returns the bytes given back."""
        paths: list[Path] = []
        freed = 0
        for item in items:
            freed += item.taken
            paths += item.leave()
        self._leaving += freed
        try:
            await self.unlink(paths)
        finally:
            self._leaving -= freed
            self._left.set()
        return freed

    async def unlink(self, paths: Sequence[Path]) -> None:
        """Remove files that are no longer known."""
        if paths:
            await finish(self.in_thread(_unlink_all, paths))

    async def in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        """A blocking disk call; its errors are those of a node."""
        with disk_errors("the cache"):
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _count_free(self, size: int) -> int:
        """Bytes of the file system that the cache may still take."""
        now = time.monotonic()
        if now > self._free_until or self._free < size:
            self._free = await self.in_thread(_free_space, self.directory)
            self._free_until = now + _FREE_SECONDS
        return self._free


@dataclass(eq=False, slots=True)
class _Leftover:
    """A file of a bucket that is not configured now; it may be again."""

    disk: CacheDisk
    path: Path
    taken: int
    used: float
    may_leave: bool = True

    def leave(self) -> Sequence[Path]:
        self.disk.forget(self)
        self.disk.give_back(self.taken)
        return [self.path]


def _free_space(path: Path) -> int:
    status = os.statvfs(path)
    share, most = _FREE
    return status.f_bavail * status.f_frsize - min(int(share * status.f_blocks * status.f_frsize), most)


def _unlink_all(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
