"""Protocols of origins: remote stores that buckets can have behind them, as a cache or a write-through needs them.

A read gives bytes of exactly one version, or raises: pieces that end without an error have reached the end that was
asked for. Time-outs, retries with back-off and the resuming of broken bodies are the origin's own affair, and bounded.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from shardmill.core.meta import ListPage

Value = TypeVar("Value")

Validator = Literal["strong", "dated", "none"]
"""What a version is known by: an ETag; size and date of change; or nothing that a change would show in."""


@dataclass(frozen=True, slots=True)
class OriginFacts:
    """What an origin says of one version of an object."""

    key: str
    size: int | None
    """Bytes; None: it does not tell before the last byte."""
    etag: str | None
    """Strong, without quotes; None where there is none, or a weak one."""
    modified: float | None
    """Unix time, seconds."""
    content_type: str | None = None
    user: Mapping[str, str] = field(default_factory=dict)
    """User metadata, names in lower case."""
    takes_ranges: bool = True
    """False: it answered a range with the whole, or says that it would; then a range costs all that lies before it."""
    is_confirmed: bool = True
    """False: of a write whose version the store did not name, or does not name as the current one afterwards."""

    @property
    def validator(self) -> Validator:
        """Pieces of two reads may be put together as one version if this is not `none`."""
        if self.etag is not None:
            return "strong"
        return "dated" if self.modified is not None and self.size is not None else "none"

    @property
    def version(self) -> str:
        """Source version: the strong ETag, else size and date of change, as far as they are told."""
        if self.etag is not None:
            return f"etag:{self.etag}"
        size = "" if self.size is None else self.size
        modified = "" if self.modified is None else f"{self.modified:.3f}"
        return f"dated:{size}:{modified}"


class OriginRead(Protocol):
    """One read under way; leaving its context ends it, whether or not all pieces were taken."""

    @property
    def facts(self) -> OriginFacts:
        """Of the version that all pieces are of; known before the first piece."""
        ...

    def __aiter__(self) -> AsyncIterator[memoryview]:
        """Pieces of any length but 0, in order, together exactly the bytes asked for; valid for as long as kept.

        Can be walked once.

        Raises:
            ObjectChanged: The object was replaced meanwhile; what came is good, of the old version.
            BackendUnavailable: It broke off or stalled and could not be resumed, or was shorter than announced.
        """
        ...


class InThread(Protocol):
    """Runs a blocking call in a thread."""

    def __call__(self, call: Callable[..., Value], *arguments: object) -> Awaitable[Value]: ...


@runtime_checkable
class DrawnRead(OriginRead, Protocol):
    """One that can also be had in threads, which do there what is to be done with the bytes."""

    @property
    def is_drawn(self) -> bool:
        """Whether that costs less than to walk it; to be asked before the first piece."""
        ...

    async def draw(self, give: Callable[[memoryview], None], most: int, in_thread: InThread) -> int:
        """Receive some of the bytes that were asked for; in place of walking it.

        Args:
            give: Called in a thread with pieces in order, each valid during the call; its errors are raised.
            most: Bytes, about.
            in_thread: Of whoever asks.

        Returns:
            Bytes given; 0: the end that was asked for is reached.

        Raises:
            ObjectChanged, BackendUnavailable: As of a walk; what was given before is good.
        """
        ...


@runtime_checkable
class ReadOrigin(Protocol):
    """An origin whose objects can be read.

    All methods raise:
        BackendDenied: It refused; the message has the sources of credentials that were tried.
        BackendUnavailable: It did not answer properly within time and retries. Its kinds BackendBusy (it is overloaded)
            and BackendTimeout say more.
        BadRequest: The key cannot be carried to this store exactly as it is.
        BucketNotFound: There is no such bucket, container or account.
    """

    async def head(self, key: str) -> OriginFacts:
        """The current version; raises ObjectNotFound. One request where nothing fails."""
        ...

    def read(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
    ) -> AbstractAsyncContextManager[OriginRead]:
        """Begin to read bytes [start, stop); entering the context waits for the answer's head.

        Args:
            key: Of the object.
            start: First byte.
            stop: One past the last, clamped to the size; None: to the end. Must be larger than `start`.
            version: `OriginFacts.version` that the bytes must be of; None: the current one.

        Raises:
            ObjectNotFound: There is none.
            ObjectChanged: The current version is not the one asked for, or there is none any more; no byte was given.
            RangeNotSatisfiable: `start` is at or past the end; with the size where it is told.
        """
        ...

    def statistics(self) -> "OriginStatistics": ...


@runtime_checkable
class ListOrigin(Protocol):
    """An origin that knows what keys it has."""

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page as `core.sources.ListObjects` has it; memory is bounded by the page, not by the bucket.

        Keys that no URL of a node can have (control characters, longer than 1024 bytes) are left out and counted.
        """
        ...


@runtime_checkable
class WriteOrigin(Protocol):
    """An origin that can be written to; raises what `ReadOrigin` raises, too."""

    async def put(
        self,
        key: str,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        content_type: str | None,
        if_match: str | None,
        if_absent: bool,
    ) -> OriginFacts:
        """Store one object; returns when the store has acknowledged it.

        Args:
            key: Of the object.
            body: The bytes; an exception from it, or cancellation, leaves the old object and no upload behind.
            size: Announced length, or None; a body of another length is BadRequest and leaves the old object.
            user: User metadata.
            content_type: None: the store's default.
            if_match: ETag that the object to be replaced must have; judged by the store, atomically.
            if_absent: There must be no object yet; judged by the store, atomically.

        Raises:
            PreconditionFailed: The condition does not hold.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove it; that there was none is no error."""
        ...

    async def copy(self, key: str, target: str) -> None:
        """Copy within the bucket, in the store, in place of what is at `target`; raises ObjectNotFound."""
        ...


class Origin(ReadOrigin, ListOrigin, WriteOrigin, Protocol):
    """All verbs, as the object stores of clouds have them."""


@dataclass(frozen=True, slots=True)
class OriginStatistics:
    """What has gone to and come from an origin since it was opened."""

    bytes_read: int
    """Of payload, as handed out."""
    bytes_written: int
    """Of payload, as acknowledged."""
    requests: Mapping[str, int]
    """Calls by how they ended: `ok` or the code of the error."""
    seconds: float
    """All calls together, until the head of their answer."""
    unlisted: int
    """Keys that listings left out."""
