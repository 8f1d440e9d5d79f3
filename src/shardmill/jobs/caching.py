"""The kinds `prefetch` and `evict`: what the disk has of a bucket with a store behind it, before it is read."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shardmill.core.errors import BadRequest
from shardmill.core.jobs import JobEntry, JobRequest
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.templates import expand, match_listing, needs_listing
from shardmill.jobs.kinds import Item, Report, Work
from shardmill.jobs.selection import check_selection, select
from shardmill.node.access import Principal
from shardmill.node.cache import Cache
from shardmill.node.node import Node
from shardmill.node.objects import Objects

FETCHED_AT_ONCE = 4  # objects; a large one comes by several reads by itself
EVICTED_AT_ONCE = 1


class PrefetchJobs:
    """See `jobs.kinds.Kind`."""

    def __init__(self, node: Node) -> None:
        self._objects = node.objects
        self._cache = node.cache

    def complete(self, principal: Principal, request: JobRequest) -> JobRequest:
        return _complete(request)

    async def prepare(self, principal: Principal, request: JobRequest) -> Work:
        bucket = Bucket.parse(request.source)
        self._cache.check_remote(principal, bucket)
        selected = await select(self._objects, principal, bucket, request)
        # By size alone: whether what is cached is of the current version is asked when it is fetched.
        cached = await self._cache.all_cached(principal, bucket, selected.base)
        there = {info.key: info.cached for info in cached if info.size == selected.sizes.get(info.key)}
        items = [
            Item(index, key, size, key, size - there.get(key, 0))
            for index, (key, size) in enumerate(selected.sizes.items())
        ]
        pace = None if request.rate is None else Pace(request.rate)
        return _PrefetchWork(principal, self._objects, self._cache, bucket, items, pace)


class EvictJobs:
    """See `jobs.kinds.Kind`. Of what is chosen it is about what is on the disk; that nothing is is no failure."""

    def __init__(self, node: Node) -> None:
        self._objects = node.objects
        self._cache = node.cache

    def complete(self, principal: Principal, request: JobRequest) -> JobRequest:
        if request.rate is not None:
            raise BadRequest("rate is of jobs of kind prefetch")
        return _complete(request)

    async def prepare(self, principal: Principal, request: JobRequest) -> Work:
        bucket = Bucket.parse(request.source)
        # Else each object would be refused by itself, once the job is at work.
        self._objects.check(principal, "write", bucket)
        found = await self._cache.all_cached(principal, bucket, request.prefix or "")
        sizes = {info.key: info.cached for info in found}
        template, names = request.template, request.names
        if template is not None and needs_listing(template):
            keys: Sequence[str] = list(match_listing(template, sizes))
        elif request.prefix is not None:
            keys = list(sizes)
        else:
            keys = [key for key in (names if names is not None else expand(template or "")) if key in sizes]
        items = [Item(index, key, sizes[key], key, sizes[key]) for index, key in enumerate(keys)]
        return _EvictWork(principal, self._cache, bucket, items)


class Pace:
    """Args:
    rate: Bytes a second, of all that share it.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free = 0.0

    def reserve(self, size: int, now: float) -> float:
        """Seconds from `now` until so many bytes more may be fetched; whoever asks then waits for them as well."""
        begin = max(now, self._free)
        self._free = begin + size / self._rate
        return begin - now

    async def __call__(self, size: int) -> None:
        await asyncio.sleep(self.reserve(size, time.monotonic()))


def _complete(request: JobRequest) -> JobRequest:
    check_selection(request)
    given = [name for name in ("destination", "transform") if getattr(request, name) is not None]
    if request.rename != "{key}":
        given.append("rename")
    if given:
        raise BadRequest(f"{given[0]} is of jobs of kind transform, not of kind {request.kind}")
    if request.rate is not None and request.rate < 1:
        raise BadRequest(f"rate {request.rate} is not a number of bytes a second")
    return msgspec.structs.replace(request, source=str(Bucket.parse(request.source)))


@dataclass(frozen=True, slots=True)
class _PrefetchWork:
    principal: Principal
    objects: Objects
    cache: Cache
    source: Bucket
    items: Sequence[Item]
    pace: Pace | None
    at_once: int = FETCHED_AT_ONCE
    manifest: ObjectRef | None = None

    async def is_done(self, item: Item, entry: JobEntry) -> bool:
        ref = ObjectRef(self.source, item.key)
        meta = await self.objects.head(self.principal, ref)
        found = self.cache.get(self.principal, ref).object
        if found is None:
            return not meta.size
        return found.version == meta.version and found.cached == found.size

    async def do(self, item: Item, report: Report) -> JobEntry:
        ref = ObjectRef(self.source, item.key)
        fetched = await self.cache.fetch(self.principal, ref, pace=self.pace, report=report)
        meta = fetched.meta
        return _entry(item, version=meta.version, size=meta.size, moved=fetched.missing, etag=meta.etag)


@dataclass(frozen=True, slots=True)
class _EvictWork:
    principal: Principal
    cache: Cache
    source: Bucket
    items: Sequence[Item]
    at_once: int = EVICTED_AT_ONCE
    manifest: ObjectRef | None = None

    async def is_done(self, item: Item, entry: JobEntry) -> bool:
        """It is there, or it would be no item."""
        return False

    async def do(self, item: Item, report: Report) -> JobEntry:
        freed = await self.cache.evict(self.principal, ObjectRef(self.source, item.key))
        return _entry(item, version="", size=item.size, moved=freed, etag=None)


def _entry(item: Item, *, version: str, size: int, moved: int, etag: str | None) -> JobEntry:
    return JobEntry(
        object=item.key,
        version=version,
        size=size,
        target=item.target,
        bytes=moved,
        etag=etag,
        checksum=None,
        result="",
        made=time.time(),
    )
