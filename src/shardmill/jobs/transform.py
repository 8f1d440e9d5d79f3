"""The kind `transform`: objects of one bucket, as a spec gives them, into another.

The bytes come by the way of their URL, so they are the same; each object is there as a whole or not at all.
"""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence, Set
from dataclasses import dataclass

import msgspec

from shardmill.core.conditions import Conditions
from shardmill.core.errors import BadRequest, Conflict, CorruptObject, ObjectNotFound, ShardmillError
from shardmill.core.jobs import (
    KEPT_FAILURES,
    MAX_MESSAGE,
    JobEntry,
    JobRequest,
    SampleFailure,
    is_manifest,
    job_id,
    manifest_key,
)
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import Bucket, ObjectRef, check_key
from shardmill.core.renaming import Renaming, rename_all
from shardmill.core.specs import Spec
from shardmill.jobs.kinds import Item, ItemFailed, Report, Work
from shardmill.jobs.selection import check_selection, is_listed, select
from shardmill.node.access import Principal
from shardmill.node.bodies import bytes_of
from shardmill.node.node import Node
from shardmill.node.objects import Objects
from shardmill.node.transforms import Transformed, TransformedFile, TransformedHead, Transforms

SHARDS_AT_ONCE = 2  # the samples of one keep all workers busy; the second fills the gap while the first is stored


class TransformJobs:
    """See `jobs.kinds.Kind`."""

    def __init__(self, node: Node) -> None:
        self._objects = node.objects
        self._transforms = node.transforms

    def complete(self, principal: Principal, request: JobRequest) -> JobRequest:
        check_selection(request)
        if request.destination is None:
            raise BadRequest("a job of kind transform needs destination, the bucket to write to")
        if request.transform is None:
            raise BadRequest("a job of kind transform needs transform, a spec")
        Renaming.parse(request.rename)
        return msgspec.structs.replace(
            request,
            source=str(Bucket.parse(request.source)),
            destination=str(Bucket.parse(request.destination)),
            transform=str(self._transforms.resolve(principal, Spec.parse(request.transform))),
        )

    async def prepare(self, principal: Principal, request: JobRequest) -> Work:
        assert request.destination is not None
        assert request.transform is not None
        source, destination = Bucket.parse(request.source), Bucket.parse(request.destination)
        spec = Spec.parse(request.transform)
        manifest = ObjectRef(destination, manifest_key(job_id(request)))
        await self._objects.check_put(principal, manifest, Conditions())
        selected = await select(self._objects, principal, source, request)
        targets = rename_all(request.rename, list(selected.sizes), base=selected.base)
        items = [
            Item(index, key, size, _check_target(target))
            for index, ((key, size), target) in enumerate(zip(selected.sizes.items(), targets, strict=True))
        ]
        kind = self._transforms.kind(principal, spec)
        at_once = SHARDS_AT_ONCE if kind == "sample" else self._transforms.lanes + 1
        work = _TransformWork(
            principal, self._objects, self._transforms, source, destination, spec, items, at_once, manifest
        )
        if source == destination or await work.is_one_directory():
            _check_bucket_is_shared(request, targets, set(selected.sizes))
        await work.try_first()
        return work


def _check_bucket_is_shared(request: JobRequest, targets: Sequence[str], sources: Set[str]) -> None:
    """Refuse a job within one bucket that would write over its sources, or take its results for sources next time.

    Two buckets on one directory count as one.
    """
    overwritten = next((target for target in targets if target in sources), None)
    if overwritten is not None:
        raise Conflict(
            f"the job would write {request.destination}/{overwritten}, which is one of its sources; name another "
            "destination, or rename, e.g. small/{key}"
        )
    selected_again = next((target for target in targets if is_listed(request, target)), None)
    if selected_again is not None:
        raise Conflict(
            f"the job would write {request.destination}/{selected_again}, which would be one of its sources when it is "
            "asked for again; name another destination, or a prefix or template that leaves it out"
        )


def _check_target(target: str) -> str:
    if is_manifest(check_key(target)):
        raise BadRequest(f"{target!r} is where the manifests of jobs are kept; rename to something else")
    return target


@dataclass(frozen=True, slots=True)
class _TransformWork:
    principal: Principal
    objects: Objects
    transforms: Transforms
    source: Bucket
    destination: Bucket
    spec: Spec
    items: Sequence[Item]
    at_once: int
    manifest: ObjectRef | None

    async def is_one_directory(self) -> bool:
        """Whether source and destination are two names of one directory."""
        key = self.items[0].key
        return self._are_directories and await self._is_same_file(key, key)

    async def try_first(self) -> None:
        """Refuse what would fail for every item."""
        first = self.items[0]
        async with self.transforms.head(self.principal, self._source(first), self.spec):
            await self._check_apart(first)

    async def is_done(self, item: Item, entry: JobEntry) -> bool:
        if entry.target != item.target:
            return False
        async with self.transforms.head(self.principal, self._source(item), self.spec) as known:
            head = known.head if isinstance(known, TransformedFile) else known
        if head.key != entry.result:
            return False
        stored = await self._stored_meta(item.target)
        return stored is not None and stored.etag == entry.etag and stored.size == entry.bytes

    async def do(self, item: Item, report: Report) -> JobEntry:
        await self._check_apart(item)
        try:
            return await self._do(item, report)
        except CorruptObject:
            # A kept result is a copy: where one turns out wrong it is gone, and is made again.
            return await self._do(item, report)

    async def _do(self, item: Item, report: Report) -> JobEntry:
        request_id = f"job-{secrets.token_hex(8)}"
        try:
            async with self.transforms.open(
                self.principal,
                self._source(item),
                self.spec,
                request_id=request_id,
                wants_finished=False,
                is_patient=True,
            ) as made:
                return await self._store(item, made, request_id, report)
        except ShardmillError as error:
            found = self.transforms.failures(
                self.principal, transform=None, bucket=None, key=None, request=request_id
            ).failures
            sample = next((failure.sample for failure in reversed(found) if failure.ended_run), None)
            raise ItemFailed(error, sample) from error

    async def _store(self, item: Item, made: Transformed, request_id: str, report: Report) -> JobEntry:
        meta = made.source.meta if isinstance(made, TransformedFile) else None
        async with contextlib.aclosing(_told(made, report)) as body:
            stored = await self.objects.put(
                self.principal,
                ObjectRef(self.destination, item.target),
                body,
                size=None if meta is None else meta.size,
                user={},
                conditions=Conditions(),
                checksum=None if meta is None else meta.checksum,
            )
        counts = made.counts
        failures = counts.failures if counts is not None else 0
        return JobEntry(
            object=item.key,
            version=made.head.version,
            size=item.size,
            target=item.target,
            bytes=stored.meta.size,
            etag=stored.meta.etag,
            checksum=stored.meta.checksum,
            result=made.head.key,
            made=time.time(),
            seed=made.head.seed,
            samples=None if counts is None else counts.samples,
            failures=failures,
            failed=self._failed(made, item, request_id, failures) if failures else [],
        )

    def _failed(self, made: Transformed, item: Item, request_id: str, count: int) -> list[SampleFailure]:
        """The samples that were left out, as far as their failures were kept."""
        head = made.head
        if isinstance(made, TransformedFile):
            version = str(Spec(head.spec.name, head.spec.digest, args=head.spec.args))
            kept = self.transforms.failures(
                self.principal, transform=version, bucket=str(self.source), key=item.key, request=None
            ).failures
            found = [failure for failure in kept if _is_of(failure.version, failure.seed, head)]
        else:
            found = self.transforms.failures(
                self.principal, transform=None, bucket=None, key=None, request=request_id
            ).failures
        by_ordinal = {
            failure.ordinal: SampleFailure(failure.sample, failure.ordinal, failure.message[:MAX_MESSAGE])
            for failure in found
            if failure.sample is not None and failure.ordinal is not None and not failure.ended_run
        }
        return [by_ordinal[ordinal] for ordinal in sorted(by_ordinal)][: min(count, KEPT_FAILURES)]

    async def _check_apart(self, item: Item) -> None:
        """Raise Conflict where the target is the source's own file, by another bucket's name."""
        if self._are_directories and await self._is_same_file(item.key, item.target):
            raise Conflict(
                f"{self.destination}/{item.target} is the same file as {self.source}/{item.key}; write to another "
                "directory"
            )

    @property
    def _are_directories(self) -> bool:
        """Both, and two: versions of their files tell which are the same."""
        backings = {info.uri: info.backing for info in self.objects.buckets(self.principal)}
        both = {backings.get(str(bucket)) for bucket in (self.source, self.destination)}
        return self.source != self.destination and both == {"dir"}

    async def _is_same_file(self, key: str, target: str) -> bool:
        meta = await self._stored_meta(target)
        return meta is not None and meta.version == (await self._source_meta(key)).version

    async def _source_meta(self, key: str) -> ObjectMeta:
        return await self.objects.head(self.principal, ObjectRef(self.source, key))

    async def _stored_meta(self, target: str) -> ObjectMeta | None:
        try:
            return await self.objects.head(self.principal, ObjectRef(self.destination, target))
        except ObjectNotFound:
            return None

    def _source(self, item: Item) -> ObjectRef:
        return ObjectRef(self.source, item.key)


async def _told(made: Transformed, report: Report) -> AsyncGenerator[bytes | memoryview]:
    """The bytes, with a word on how far they are."""
    async with contextlib.aclosing(bytes_of(made)) as pieces:
        async for piece in pieces:
            yield piece
            report(made.done)


def _is_of(version: str, seed: int | None, head: TransformedHead) -> bool:
    return version == head.version and head.seed in (None, seed)
