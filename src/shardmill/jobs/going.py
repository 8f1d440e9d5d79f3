"""One go at a job, from what is known of it to its end: the driver around `Progress`.

An object counts as done when its destination has acknowledged it and its record is on disk, in that order, so a kill
between the two costs that object once more.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import msgspec

from shardmill.core.conditions import Conditions
from shardmill.core.errors import (
    AccessDenied,
    BucketNotFound,
    EnvironmentUnfit,
    InsufficientStorage,
    ObjectNotFound,
    ServerError,
    ShardmillError,
    TransformNotFound,
)
from shardmill.core.jobs import KEPT_FAILURES, MAX_MESSAGE, JobEntry, JobInfo, JobState, Manifest, ObjectFailure
from shardmill.core.refs import ObjectRef
from shardmill.jobs.kinds import Item, ItemFailed, Work
from shardmill.jobs.progress import Progress
from shardmill.jobs.records import Records
from shardmill.node.access import Principal
from shardmill.node.bodies import bytes_of_source
from shardmill.node.objects import Objects
from shardmill.storage.steps import finish

logger = logging.getLogger(__name__)

ENDS_ALL = (InsufficientStorage, AccessDenied, BucketNotFound, TransformNotFound, EnvironmentUnfit)
"""Errors that every further object would meet as well."""

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Before an object is tried again that an origin or a full node refused."""

MANIFEST_SHARE = 0.05  # of the time, at most, goes into writing the manifest before the end
MAX_MANIFEST = 1 << 30  # bytes that are read of one
_PIECE = 1 << 20
_FORMAT = 1


class Going:
    """One go.

    Args:
        info: The job as it was asked for.
        work: What it has to do.
        at_once: Items in work at once.
        principal: For whom.
        objects: Where manifests are.
        records: Of this node.
    """

    def __init__(
        self, info: JobInfo, work: Work, *, at_once: int, principal: Principal, objects: Objects, records: Records
    ) -> None:
        self.progress = Progress(work.items, time.time())
        self._info = info
        self._work = work
        self._at_once = at_once
        self._principal = principal
        self._objects = objects
        self._records = records
        self._known: dict[str, JobEntry] = {}
        self._recording = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._manifest_due = 0.0

    async def run(self) -> None:
        """Do all that can be done; how that went stands in `progress`.

        Cancelled, it leaves an object in work as it was before.

        Raises:
            ShardmillError: The job's own record cannot be written.
        """
        await self._recall()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._at_once, len(self._work.items))):
                    tasks.create_task(self._take_turns())
        except* ShardmillError as group:
            raise _first(group) from None

    async def write_manifest(self, state: JobState) -> None:
        """Put the manifest in place as things are.

        Raises:
            ShardmillError: The destination does not take it.
        """
        ref = self._work.manifest
        if ref is None:
            return
        async with self._writing:
            began = time.monotonic()
            progress = self.progress
            manifest = Manifest(
                format=_FORMAT,
                job=self._info.id,
                kind=self._info.request.kind,
                state=state,
                source=self._info.request.source,
                destination=str(ref.bucket),
                spec=self._info.request.transform,
                total=len(progress.items),
                updated=time.time(),
                entries=list(progress.in_order()),
                failures=list(progress.failures.values()),
            )
            data = await asyncio.to_thread(msgspec.json.encode, manifest)
            await self._objects.put(
                self._principal,
                ref,
                _pieces(data),
                size=len(data),
                user={},
                conditions=Conditions(),
                checksum=None,
            )
            now = time.monotonic()
            self._manifest_due = now + (now - began) / MANIFEST_SHARE

    async def _recall(self) -> None:
        """What was done before, by this node's record and by the manifest; the later word counts."""
        known = await finish(asyncio.to_thread(self._records.read, self._info.id))
        entries = dict(known.entries)
        for entry in await self._read_manifest():
            if entry.object not in entries or entries[entry.object].made < entry.made:
                entries[entry.object] = entry
        if not known.is_clean or len(entries) != len(known.entries):
            await finish(asyncio.to_thread(self._records.rewrite, self._info.id, list(entries.values())))
        self._known = entries

    async def _read_manifest(self) -> list[JobEntry]:
        ref = self._work.manifest
        if ref is None:
            return []
        try:
            source = await self._objects.open(self._principal, ref)
        except ObjectNotFound:
            return []
        try:
            if source.meta.size > MAX_MANIFEST:
                raise ServerError(f"{ref} has {source.meta.size} bytes")
            data = b"".join([piece async for piece in bytes_of_source(source)])
            manifest = await asyncio.to_thread(msgspec.json.decode, data, type=Manifest)
        except (ShardmillError, msgspec.MsgspecError) as error:
            logger.warning("job %s: its manifest %s is of no use: %s", self._info.id, ref, error)
            return []
        finally:
            source.close()
        return manifest.entries if manifest.format == _FORMAT and manifest.job == self._info.id else []

    async def _take_turns(self) -> None:
        while (item := self.progress.take(time.time())) is not None:
            await self._take(item)
            if self._work.manifest is not None and time.monotonic() >= self._manifest_due:
                await self._write_manifest_meanwhile(self._work.manifest)

    async def _take(self, item: Item) -> None:
        known = self._known.get(item.key)
        try:
            if known is not None and await self._work.is_done(item, known):
                self.progress.end(item, "found", known)
                return
            made = await self._do(item)
        except ItemFailed as failed:
            await self._fail(item, failed.error, failed.sample)
            return
        except ShardmillError as error:
            await self._fail(item, error, None)
            return
        await self._write_down(made)
        self.progress.end(item, "made", made)

    async def _do(self, item: Item) -> JobEntry:
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                return await self._work.do(item, lambda done: self.progress.report(item, done))
            except (ItemFailed, ShardmillError) as failed:
                error = failed.error if isinstance(failed, ItemFailed) else failed
                wait = next(waits, None)
                if not error.retryable or wait is None:
                    raise
                logger.info("job %s: %s is tried again in %g s: %s", self._info.id, item.key, wait, error)
                self.progress.report(item, 0.0)
                await asyncio.sleep(max(wait, error.retry_after or 0))

    async def _fail(self, item: Item, error: ShardmillError, sample: str | None) -> None:
        traceback = error.traceback if len(self.progress.failures) < KEPT_FAILURES else None
        failure = ObjectFailure(item.key, error.code, error.message[:MAX_MESSAGE], time.time(), sample, traceback)
        self.progress.fail(item, failure, ends_all=isinstance(error, ENDS_ALL))
        logger.info("job %s: %s failed: %s", self._info.id, item.key, error)
        await self._write_down(failure)

    async def _write_down(self, written: JobEntry | ObjectFailure) -> None:
        async with self._recording:
            await finish(asyncio.to_thread(self._records.append, self._info.id, written))

    async def _write_manifest_meanwhile(self, ref: ObjectRef) -> None:
        if self._writing.locked():
            return
        try:
            await self.write_manifest("running")
        except ShardmillError as error:
            # The node's own record has all of it; whether the job can end well is seen at its end.
            logger.info("job %s: %s could not be written: %s", self._info.id, ref, error)
            if isinstance(error, ENDS_ALL):
                self.progress.stop(f"the manifest cannot be written: {error.message}")


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


def _first(group: BaseExceptionGroup[ShardmillError]) -> ShardmillError:
    """The error of a group, which is one, or as good as any other of its kind."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ShardmillError)
    return error
