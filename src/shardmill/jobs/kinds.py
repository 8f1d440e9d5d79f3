"""What a kind of job is to the rest: it completes a request, and does the work one item at a time.

Nothing else here knows what a job does, so a further kind is one more module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardmill.core.errors import ShardmillError
from shardmill.core.jobs import JobEntry, JobRequest
from shardmill.core.refs import ObjectRef
from shardmill.node.access import Principal


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a job."""

    index: int
    key: str
    size: int
    """Bytes of the source."""
    target: str
    """Key of what it becomes."""
    left: int | None = None
    """Bytes that doing it would move; None: that is not known before."""


Report = Callable[[float], None]
"""Told how much of an item is done, 0 to 1."""


class Work(Protocol):
    """A job's items, as they are when it begins to work, and the doing of them."""

    @property
    def items(self) -> Sequence[Item]: ...

    @property
    def at_once(self) -> int:
        """Items that should be in work at once."""
        ...

    @property
    def manifest(self) -> ObjectRef | None:
        """Where the manifest goes; None: this kind has none."""
        ...

    async def is_done(self, item: Item, entry: JobEntry) -> bool:
        """Whether what an entry says of the item is still so, and doing it again would give the same.

        Raises:
            ShardmillError: It cannot be told.
        """
        ...

    async def do(self, item: Item, report: Report) -> JobEntry:
        """Do it; when this returns, what it gives is as durable as its bucket promises.

        Raises:
            ShardmillError: Nothing was stored. `ItemFailed` where more is known.
        """
        ...


class Kind(Protocol):
    """One kind of job."""

    def complete(self, principal: Principal, request: JobRequest) -> JobRequest:
        """The request with its names in full, by which the job is known; touches no bucket.

        Raises:
            BadRequest: A field is wrong, missing or of another kind.
            TransformNotFound: A version is not registered.
        """
        ...

    async def prepare(self, principal: Principal, request: JobRequest) -> Work:
        """Find the items, and refuse what cannot be done.

        Args:
            principal: For whom all of it is done.
            request: Completed.

        Raises:
            ShardmillError: Names what is missing, read-only or in the way.
        """
        ...


class ItemFailed(Exception):
    """An item that could not be done, with the key of the sample that it failed at."""

    def __init__(self, error: ShardmillError, sample: str | None) -> None:
        super().__init__(error, sample)
        self.error = error
        self.sample = sample
