"""What a node tells of the objects that it has fetched from stores behind its buckets, with access checked."""

import asyncio
import builtins
from collections.abc import Callable

from shardmill.core.api import CacheBucket, CachedDetails, CachedInfo, CachedPage, CacheInfo
from shardmill.core.errors import BadRequest
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.sources import CachedObject
from shardmill.node.access import Access, Principal
from shardmill.node.objects import MAX_PAGE
from shardmill.storage.buckets import Buckets
from shardmill.storage.cache.fetching import Fetched, Pace, fetch
from shardmill.storage.cache.store import CachedBucket


class Cache:
    """The cache of a node's remote buckets.

    Args:
        buckets: Of the node.
        access: Who may do what.
    """

    def __init__(self, buckets: Buckets, access: Access) -> None:
        self._buckets = buckets
        self._access = access

    def describe(self, principal: Principal) -> CacheInfo:
        """Its room, and what each bucket has of it and did."""
        self._access.check(principal, "read", None)
        return self.statistics()

    def statistics(self) -> CacheInfo:
        """As `describe`; whoever calls may see the whole node."""
        disk = self._buckets.cache_disk
        stores = sorted(self._buckets.caches(), key=lambda store: store.bucket)
        if disk is None:
            return CacheInfo(used=0, high=0, capacity=0, buckets=[])
        return CacheInfo(
            used=disk.used, high=disk.high, capacity=disk.capacity, buckets=[_bucket_info(store) for store in stores]
        )

    async def list(self, principal: Principal, bucket: Bucket, *, prefix: str, after: str, limit: int) -> CachedPage:
        """One page of what is on the disk of a bucket, by key; `limit` is cut to `MAX_PAGE`.

        Raises:
            BadRequest: There is no store behind the bucket.
        """
        self._access.check(principal, "read", bucket)
        store = self._remote(bucket)
        limit = max(1, min(limit, MAX_PAGE))
        # There may be very many.
        keys = await asyncio.to_thread(store.cached_keys, prefix, after, limit + 1)
        objects = [_info(found) for found in store.describe(keys[:limit])]
        return CachedPage(objects, keys[limit - 1] if len(keys) > limit else None)

    async def all_cached(self, principal: Principal, bucket: Bucket, prefix: str) -> builtins.list[CachedInfo]:
        """All of what is on the disk of a bucket, by key; raises BadRequest as `list`."""
        self._access.check(principal, "read", bucket)
        store = self._remote(bucket)
        return [_info(found) for found in store.describe(await asyncio.to_thread(store.cached_keys, prefix))]

    def check_remote(self, principal: Principal, bucket: Bucket) -> None:
        """Raise BadRequest unless there is a store behind the bucket."""
        self._access.check(principal, "read", bucket)
        self._remote(bucket)

    def is_remote(self, bucket: Bucket) -> bool:
        """Whether there is a store behind the bucket."""
        return self._buckets.cached(bucket) is not None

    def is_there(self, ref: ObjectRef) -> bool:
        """Whether all of some version of an object is on the disk."""
        store = self._buckets.cached(ref.bucket)
        return store is not None and any(found.there == found.size for found in store.describe([ref.key]))

    async def fetch(
        self, principal: Principal, ref: ObjectRef, *, pace: Pace | None, report: Callable[[float], None]
    ) -> Fetched:
        """Bring what is missing of an object; see `storage.cache.fetching`."""
        self._access.check(principal, "read", ref.bucket)
        return await fetch(self._remote(ref.bucket), ref.key, pace=pace, report=report)

    async def evict(self, principal: Principal, ref: ObjectRef) -> int:
        """Remove an object from the disk, a pinned one, too; who reads it goes on. Returns the bytes given back."""
        self._access.check(principal, "write", ref.bucket)
        return await self._remote(ref.bucket).evict([ref.key])

    def get(self, principal: Principal, ref: ObjectRef) -> CachedDetails:
        """What is on the disk of one object; of one in a bucket without a store behind it nothing is."""
        self._access.check(principal, "read", ref.bucket)
        store = self._buckets.cached(ref.bucket)
        found = store.describe([ref.key]) if store is not None else ()
        if store is None or not found:
            return CachedDetails(None, [])
        return CachedDetails(_info(found[0]), list(store.cached_ranges(ref.key)))

    def _remote(self, bucket: Bucket) -> CachedBucket:
        store = self._buckets.cached(bucket)
        if store is None:
            raise BadRequest(f"{bucket} has no store behind it: all of it is on the node's disk, nothing is cached")
        return store


def _bucket_info(store: CachedBucket) -> CacheBucket:
    found = store.statistics()
    return CacheBucket(
        bucket=store.bucket,
        objects=found.objects,
        bytes=found.bytes,
        hits=found.hits,
        misses=found.misses,
        passed=found.passed,
        revalidated=found.revalidated,
        served=found.served,
        filling=found.filling,
        evicted=found.evicted,
        repaired=found.repaired,
        reads=found.reads,
        fetched=found.fetched,
        fetches=found.fetches,
        fetch_seconds=found.fetch_seconds,
        requests=dict(found.origin.requests),
        written=found.origin.bytes_written,
    )


def _info(found: CachedObject) -> CachedInfo:
    return CachedInfo(
        key=found.key,
        size=found.size,
        cached=found.there,
        version=found.version,
        etag=found.etag,
        used=found.used,
        age=found.age,
        readers=found.readers,
        pinned=found.is_pinned,
    )
