"""What a node does with a request for objects and buckets: access first, then the bucket's store."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from shardmill.core.api import BucketInfo
from shardmill.core.conditions import Conditions
from shardmill.core.errors import BucketNotFound, ObjectNotFound, PreconditionFailed
from shardmill.core.kept import KeepObject, Kept
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.sources import CopyObject, ListKnown, PutResult, PutWhole, ReadStore, Source, WriteStore
from shardmill.node.access import Access, Action, Principal

MAX_PAGE = 1000  # entries of one listing page


class BucketSet(Protocol):
    """The buckets of a node, as storage hands them out."""

    def store(self, bucket: Bucket) -> ReadStore:
        """Raises BucketNotFound."""
        ...

    def writable(self, bucket: Bucket) -> WriteStore:
        """Raises BucketNotFound or BucketReadOnly."""
        ...

    async def create(self, bucket: Bucket) -> None: ...

    async def remove(self, bucket: Bucket, *, force: bool) -> None: ...

    def list(self) -> Sequence[BucketInfo]: ...

    def close_unused(self) -> None: ...


class Following(Protocol):
    """Who is told of lists that will be read, and of what is read."""

    async def announce(self, refs: Sequence[ObjectRef]) -> None: ...

    def reading(self, principal: Principal, ref: ObjectRef) -> None: ...


class Objects:
    """Objects of a node, with access checked.

    Args:
        buckets: Of the node.
        access: Who may do what.
        coming: Told what is read, if anybody is.
    """

    def __init__(self, buckets: BucketSet, access: Access, coming: Following | None) -> None:
        self._buckets = buckets
        self._access = access
        self._coming = coming

    def check(self, principal: Principal, action: Action, bucket: Bucket | None) -> None:
        """Raise AccessDenied unless the principal may; `bucket` None: the action concerns no bucket."""
        self._access.check(principal, action, bucket)

    async def open(
        self, principal: Principal, ref: ObjectRef, *, expected: tuple[int, int | None] | None = None
    ) -> Source:
        """Open the current version; the caller closes it.

        Args:
            principal: Who asks.
            ref: The object.
            expected: See `core.sources.OpenObject`.

        Raises:
            BucketNotFound, ObjectNotFound: There is none.
        """
        self._access.check(principal, "read", ref.bucket)
        source = await self._buckets.store(ref.bucket).open(ref.key, expected=expected)
        if expected is not None:
            self.is_read(principal, ref)
        return source

    async def announce(self, principal: Principal, refs: Sequence[ObjectRef]) -> None:
        """Objects that will be read in this order, raw or transformed."""
        for bucket in {ref.bucket for ref in refs}:
            self._access.check(principal, "read", bucket)
        if self._coming is not None:
            await self._coming.announce(refs)

    def is_read(self, principal: Principal, ref: ObjectRef) -> None:
        """An object is being read: what was announced to follow it may come."""
        if self._coming is not None:
            self._coming.reading(principal, ref)

    def keeps(self, bucket: Bucket) -> bool:
        """Whether objects of a bucket are kept open; False, too, when there is no such bucket."""
        try:
            store = self._buckets.store(bucket)
        except BucketNotFound:
            return False
        return isinstance(store, KeepObject) and store.is_keeping

    def kept(self, principal: Principal, ref: ObjectRef) -> Kept | None:
        """What is kept open of an object; None: nothing. Raises BucketNotFound."""
        self._access.check(principal, "read", ref.bucket)
        store = self._buckets.store(ref.bucket)
        return store.kept(ref.key) if isinstance(store, KeepObject) else None

    async def keep(self, principal: Principal, ref: ObjectRef) -> Kept | None:
        """Open an object to be kept; None: its store keeps nothing, or just not this one.

        Raises:
            BucketNotFound: There is none; that there is no such object is kept, too.
        """
        self._access.check(principal, "read", ref.bucket)
        store = self._buckets.store(ref.bucket)
        return await store.keep(ref.key) if isinstance(store, KeepObject) else None

    def close_unused(self) -> None:
        """Close what is kept open and was not asked for since the last call."""
        self._buckets.close_unused()

    async def head(self, principal: Principal, ref: ObjectRef) -> ObjectMeta:
        """The current version's metadata."""
        self._access.check(principal, "read", ref.bucket)
        return await self._buckets.store(ref.bucket).head(ref.key)

    async def list(
        self, principal: Principal, bucket: Bucket, *, prefix: str, delimiter: str, after: str, limit: int
    ) -> ListPage:
        """One page in key order; `limit` is cut to `MAX_PAGE`."""
        self._access.check(principal, "read", bucket)
        store = self._buckets.store(bucket)
        return await store.list(prefix=prefix, delimiter=delimiter, after=after, limit=min(limit, MAX_PAGE))

    async def list_known(
        self, principal: Principal, bucket: Bucket, *, prefix: str, delimiter: str, after: str, limit: int
    ) -> ListPage:
        """As `list`; of a store that is out of reach what is known of it, so marked."""
        self._access.check(principal, "read", bucket)
        store = self._buckets.store(bucket)
        look = store.list_known if isinstance(store, ListKnown) else store.list
        return await look(prefix=prefix, delimiter=delimiter, after=after, limit=min(limit, MAX_PAGE))

    def cached_bytes(
        self, principal: Principal, bucket: Bucket, metas: Sequence[ObjectMeta]
    ) -> Sequence[int] | Sequence[None]:
        """How many bytes of each object of a page are cached; None: there is no store behind the bucket."""
        self._access.check(principal, "read", bucket)
        store = self._buckets.store(bucket)
        if not isinstance(store, ListKnown):
            return [None] * len(metas)
        return [store.cached_bytes(meta) for meta in metas]

    async def check_put(self, principal: Principal, ref: ObjectRef, conditions: Conditions) -> None:
        """Refuse what can be refused before the body is read; `put` decides again.

        Raises:
            BucketReadOnly, PreconditionFailed: It would fail.
        """
        self._access.check(principal, "write", ref.bucket)
        store = self._buckets.writable(ref.bucket)
        if conditions == Conditions():
            return
        etag: str | None = None
        modified: float | None = None
        try:
            meta = await store.head(ref.key)
            etag, modified = meta.etag, meta.modified
        except ObjectNotFound:
            pass
        if conditions.judge_write(etag, modified) == "failed":
            raise PreconditionFailed(f"{ref} does not meet the request's conditions; it is unchanged")

    async def put(
        self,
        principal: Principal,
        ref: ObjectRef,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
    ) -> PutResult:
        """Store one object; see `core.sources.PutObject.put`."""
        self._access.check(principal, "write", ref.bucket)
        store = self._buckets.writable(ref.bucket)
        return await store.put(ref.key, body, size=size, user=user, conditions=conditions, checksum=checksum)

    def put_whole(
        self,
        principal: Principal,
        ref: ObjectRef,
        body: bytes,
        *,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
        done: Callable[[PutResult | None, BaseException | None], None],
    ) -> bool:
        """Store one object in one step, if its bucket can; see `core.sources.PutWhole`."""
        self._access.check(principal, "write", ref.bucket)
        store = self._buckets.writable(ref.bucket)
        return isinstance(store, PutWhole) and store.put_whole(
            ref.key, body, user=user, conditions=conditions, checksum=checksum, done=done
        )

    async def copy_in_store(self, principal: Principal, source: ObjectRef, target: ObjectRef) -> PutResult | None:
        """Have the store behind both copy the one over the other; None: there is none, or it is not the same."""
        self._access.check(principal, "read", source.bucket)
        self._access.check(principal, "write", target.bucket)
        store = self._buckets.writable(target.bucket)
        if source.bucket != target.bucket or not isinstance(store, CopyObject):
            return None
        return await store.copy(source.key, target.key)

    async def delete(self, principal: Principal, ref: ObjectRef, *, conditions: Conditions) -> None:
        """Remove one object."""
        self._access.check(principal, "write", ref.bucket)
        await self._buckets.writable(ref.bucket).delete(ref.key, conditions=conditions)

    def buckets(self, principal: Principal) -> Sequence[BucketInfo]:
        """All buckets by name."""
        self._access.check(principal, "read", None)
        return self._buckets.list()

    async def create_bucket(self, principal: Principal, bucket: Bucket) -> None:
        """Create a pool bucket; raises Conflict if it exists."""
        self._access.check(principal, "admin", bucket)
        await self._buckets.create(bucket)

    async def remove_bucket(self, principal: Principal, bucket: Bucket, *, force: bool) -> None:
        """Remove a created bucket; raises Conflict if it is not empty and `force` is False."""
        self._access.check(principal, "admin", bucket)
        await self._buckets.remove(bucket, force=force)
