"""What an entry of a cache needs of its bucket, what is counted there, and who reads and brings what."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from shardmill.core.errors import ShardmillError
from shardmill.core.origins import ReadOrigin
from shardmill.storage.cache.disk import CacheDisk, Evictable
from shardmill.storage.cache.width import Width

Value = TypeVar("Value")


@dataclass(slots=True)
class Counters:
    """What one bucket's cache did since the start."""

    hits: int = 0
    """Openings that found all they asked for on the disk."""
    misses: int = 0
    revalidated: int = 0
    """Versions that the origin was asked about, and still had."""
    served: int = 0
    """Bytes made ready for readers."""
    fetched: int = 0
    """Bytes that came from the origin."""
    fetches: int = 0
    """Reads of the origin."""
    fetch_seconds: float = 0.0
    """Until the heads of their answers, all together."""
    evicted: int = 0
    """Objects that left for others."""
    passed: int = 0
    """Openings that were served without being kept."""
    repaired: int = 0
    """Blocks that were found damaged on the disk, and fetched again."""


class Version(Evictable, Protocol):
    """What a bucket must know of an entry to forget it."""

    @property
    def key(self) -> str: ...

    @property
    def lost(self) -> ShardmillError | None: ...


class Upstream(Protocol):
    """What an entry needs of its bucket."""

    bucket: str
    origin: ReadOrigin
    disk: CacheDisk
    width: Width
    counters: Counters
    reads: asyncio.Semaphore
    """How many reads of the origin may go on at once."""

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends before the bucket is closed."""
        ...

    def forget(self, entry: Version) -> None:
        """It is not to be found any more."""
        ...

    async def in_thread(self, call: Callable[..., Value], *arguments: object) -> Value: ...


@dataclass(eq=False, slots=True)
class Reader:
    """One who reads an entry: the blocks that it will want, as far as is known."""

    first: int = 0
    last: int = 0

    def want(self, first: int, last: int) -> None:
        """It reads on to blocks [first, last), or somewhere else."""
        if first <= self.last and last >= self.first:
            first, last = min(first, self.first), max(last, self.last)
        self.first, self.last = first, last


@dataclass(eq=False, slots=True)
class Waiter:
    reader: Reader
    position: int
    need: int
    stop: int
    future: asyncio.Future[None]


@dataclass(eq=False, slots=True)
class Stream:
    """A read of the origin that brings blocks [first, last)."""

    first: int
    last: int
    next: int
    """The block that arrives."""
    task: asyncio.Task[None] | None = None
    owned: set[int] = field(default_factory=set)
