"""Protocols where siblings meet: what a store hands out, and what a face or a run needs of it."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from shardmill.core.conditions import Conditions
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.origins import OriginStatistics


class Source(Protocol):
    """One opened version of an object: a descriptor plus the promise of which bytes are there.

    Resources: the opener closes it; the descriptor is invalid afterwards.
    """

    @property
    def meta(self) -> ObjectMeta: ...

    @property
    def descriptor(self) -> int:
        """Readable by `os.pread` where bytes were ensured, and not before any were; payload byte 0 is at `offset` 0.

        Ensuring more may make it another one, where all that was ensured and not released can be read; the former stays
        valid for what could be read there.
        """
        ...

    @property
    def is_whole(self) -> bool:
        """All bytes are on disk: nothing but the disk can keep an answer from being whole."""
        ...

    async def ensure(self, start: int, stop: int) -> None:
        """Wait until bytes [start, stop) are on disk and verified; clamped to the size.

        Raises:
            CorruptObject: A block fails its checksum.
            BackendUnavailable: The origin stopped answering.
            Conflict: The object changed under the reader; the answer must be cut.
        """
        ...

    async def ensure_some(self, start: int, stop: int) -> int:
        """Wait until at least the byte at `start` is there and verified, while the rest to `stop` is on its way.

        Returns:
            How far bytes may be read, at most to `stop` clamped to the size.
        """
        ...

    def release(self, position: int) -> None:
        """Bytes before `position` will not be read again through this source; it may be told or not."""
        ...

    async def check_unchanged(self) -> None:
        """Raise Conflict when the bytes behind the descriptor are no longer those of `meta`."""
        ...

    def close(self) -> None: ...


class OpenObject(Protocol):
    async def open(self, key: str, *, expected: tuple[int, int | None] | None = None) -> Source:
        """Open the current version.

        Args:
            key: Of the object.
            expected: Bytes [start, stop) that will be read at once, stop None: to the end; None: perhaps none. A store
                that has to fetch them begins with them; any may be read all the same.

        Raises:
            ObjectNotFound: There is none.
        """
        ...


class HeadObject(Protocol):
    async def head(self, key: str) -> ObjectMeta:
        """The current version's metadata; raises ObjectNotFound."""
        ...


class ListObjects(Protocol):
    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page in key order of what starts with `prefix` and sorts after `after`.

        With a delimiter, keys that have it after the prefix are rolled up into prefixes; both count to `limit`.
        """
        ...


@runtime_checkable
class ListKnown(Protocol):
    """A store that may be out of reach, of which something is known all the same."""

    async def list_known(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """As `ListObjects.list`; out of reach: what is known, marked as stale. For people, not for work on objects."""
        ...

    def cached_bytes(self, meta: ObjectMeta) -> int:
        """Bytes of that version that are on the disk; asks neither store nor disk."""
        ...


class PutObject(Protocol):
    async def put(
        self,
        key: str,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
    ) -> "PutResult":
        """Store one object; when it returns, the bytes are durable as the bucket promises.

        Args:
            key: Checked by the caller.
            body: The bytes; an exception from it leaves the old object in place.
            size: Announced length in bytes, or None for a chunked body.
            user: User metadata, at most 2 KiB in all.
            conditions: Judged against the version that is replaced, atomically with the replacement.
            checksum: `xxh3:HEX` that the bytes must have, or None.

        Raises:
            PreconditionFailed: The conditions do not hold.
            BadRequest: The body is shorter or longer than `size`, or its checksum differs.
            InsufficientStorage: The disk is full.
        """
        ...


@runtime_checkable
class PutWhole(Protocol):
    """A store that may store what is there as a whole in one step."""

    def put_whole(
        self,
        key: str,
        body: bytes | bytearray | memoryview,
        *,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
        done: "Callable[[PutResult | None, BaseException | None], None]",
    ) -> bool:
        """As `PutObject.put`; to be used from the loop.

        Args:
            key, body, user, conditions, checksum: As there.
            done: Called on the loop, later: with what was stored, or nothing was changed. With neither a result nor an
                error it has to be done the other way.

        Returns:
            Whether `done` will be called; if not, it has to be done the other way.
        """
        ...


class DeleteObject(Protocol):
    async def delete(self, key: str, *, conditions: Conditions) -> None:
        """Remove the object, durably; raises ObjectNotFound or PreconditionFailed."""
        ...


@runtime_checkable
class CopyObject(Protocol):
    """A store that has its objects copied where they are."""

    async def copy(self, key: str, target: str) -> "PutResult":
        """Copy the current version, in place of what is at `target`; no byte comes here.

        Raises:
            ObjectNotFound: There is no source.
        """
        ...


class PutResult(Protocol):
    @property
    def meta(self) -> ObjectMeta: ...

    @property
    def created(self) -> bool:
        """False: an existing object was replaced."""
        ...


class ReadStore(OpenObject, HeadObject, ListObjects, Protocol):
    """A bucket that can be read."""


class WriteStore(ReadStore, PutObject, DeleteObject, Protocol):
    """A bucket that can be read and written."""


class Spool(Protocol):
    """A result on its way to disk. Resources: ends with exactly one `publish` or `abandon`."""

    @property
    def descriptor(self) -> int:
        """Readable by `os.pread` as far as `append` has returned; closed by `close`."""
        ...

    async def append(self, pieces: Sequence[memoryview | bytes]) -> None:
        """Write bytes behind what is there.

        Raises:
            InsufficientStorage: The disk or the quota is full; what was there before is still readable.
            ServerError: The disk failed.
        """
        ...

    async def publish(self, facts: Mapping[str, str], *, is_scratch: bool) -> ObjectMeta:
        """Make it a result that can be opened; `facts` are kept with it."""
        ...

    async def abandon(self) -> None:
        """Give its space back. The descriptor stays readable until `close`."""
        ...

    def close(self) -> None: ...


class ResultFiles(Protocol):
    """Where results are kept: within a quota, with the least used leaving first."""

    async def begin(self, key: str) -> Spool:
        """Start a result; raises InsufficientStorage or ServerError."""
        ...

    async def open(self, key: str) -> Source | None:
        """A finished result, held against eviction until it is closed; None: there is none."""
        ...

    def has(self, key: str) -> bool: ...

    def keep(self, key: str) -> None:
        """It is scratch no more."""
        ...

    def list(self) -> Sequence["ResultEntry"]:
        """All of them; may be called in a thread."""
        ...

    async def remove(self, keys: Sequence[str]) -> int:
        """Remove results; readers that have them open keep them. Returns the bytes given back."""
        ...

    def statistics(self) -> "ResultStatistics": ...


@dataclass(frozen=True, slots=True)
class ResultEntry:
    """One kept result."""

    key: str
    size: int
    """Bytes of payload."""
    etag: str
    made: float
    """Unix time."""
    used: float
    """Unix time of the last opening."""
    is_scratch: bool
    readers: int
    """Who have it open."""
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ResultStatistics:
    """Disk use of results."""

    count: int
    scratch: int
    """Of these, kept for a while only."""
    kept: int
    """Bytes of results."""
    spooling: int
    """Bytes of spools that grow."""
    capacity: int
    evicted: int
    """Results since the start."""

    @property
    def used(self) -> int:
        """Bytes of the quota."""
        return self.kept + self.spooling


@dataclass(frozen=True, slots=True)
class CachedObject:
    """An object of an origin of which something is on the disk."""

    key: str
    size: int
    there: int
    """Bytes of it that are on the disk."""
    version: str
    etag: str | None
    used: float
    """Unix time of the last reading."""
    age: float | None
    """Seconds since the origin was asked whether it is current; None: not since the start."""
    readers: int
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What the cache of one bucket holds, and did since the start."""

    objects: int
    bytes: int
    """Of the disk, with what is reserved for what arrives."""
    hits: int
    """Readings that found all they wanted on the disk."""
    misses: int
    revalidated: int
    """Versions that the origin was asked about, and still had."""
    served: int
    """Bytes made ready for readers."""
    fetched: int
    """Bytes that came from the origin."""
    fetches: int
    """Reads of the origin."""
    fetch_seconds: float
    """Until the heads of their answers, all together."""
    filling: int
    """Objects that arrive."""
    evicted: int
    """Objects that left for others."""
    passed: int
    """Readings that were served without being kept: there was no room."""
    repaired: int
    """Blocks that were found damaged on the disk, and fetched again."""
    reads: int
    """Of the origin at once that a large object is brought with."""
    origin: OriginStatistics


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes for a reader, valid until it asks for the next."""

    data: memoryview | bytes


@dataclass(frozen=True, slots=True)
class InFile:
    """Bytes [start, stop) of a descriptor, valid until the reader asks for the next."""

    descriptor: int
    start: int
    stop: int


Slice = InMemory | InFile
