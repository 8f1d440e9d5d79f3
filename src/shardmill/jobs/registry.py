"""The jobs of a node: asked for, going on, ended. A job is known by what it is to do, so asking again goes on with it.

What was at work when the node ended, however it ended, goes on when it is opened again.
"""

import asyncio
import builtins
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from shardmill.core.errors import NotFound, ShardmillError
from shardmill.core.jobs import (
    FailedSample,
    JobDetails,
    JobInfo,
    JobPlan,
    JobRequest,
    JobState,
    PlannedObject,
    job_id,
)
from shardmill.core.refs import Bucket
from shardmill.jobs.caching import EvictJobs, PrefetchJobs
from shardmill.jobs.going import Going
from shardmill.jobs.kinds import Kind, Work
from shardmill.jobs.progress import OUTCOMES, Outcome
from shardmill.jobs.records import Known, Records, Saved
from shardmill.jobs.transform import TransformJobs
from shardmill.node.access import Principal
from shardmill.node.node import Node
from shardmill.storage.steps import finish
from shardmill.telemetry import logs

logger = logging.getLogger(__name__)

MAX_ENDED = 200  # jobs that are remembered after their end
SHOWN = 1000  # objects, failures, samples in one answer
SHOWN_NAMES = 100  # of a job's request in an answer
MAX_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """Totals since the node started, and how many jobs there are."""

    jobs: Mapping[JobState, int]
    objects: Mapping[tuple[str, Outcome], int]
    """By kind and what became of them."""
    bytes_out: Mapping[str, int]
    """By kind."""


class Job:
    """One job. What it has come to is in `info`, or in `going` while it goes on."""

    def __init__(self, principal: Principal, info: JobInfo) -> None:
        self.principal = principal
        self.request = info.request
        self.ended = asyncio.Event()
        self.going: Going | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_cancelled = False
        """Somebody wanted it to end."""
        self._info = info
        if info.has_ended:
            self.ended.set()

    @property
    def id(self) -> str:
        return self._info.id

    @property
    def info(self) -> JobInfo:
        """How it stands now."""
        if self.going is None:
            return self._info
        progress = self.going.progress
        speed = progress.speed(time.time())
        return msgspec.structs.replace(
            self._info,
            started=progress.started,
            total=len(progress.items),
            done=len(progress.entries),
            found=progress.counts["found"],
            failed=progress.counts["failed"],
            running=len(progress.running),
            samples=progress.samples,
            failures=progress.sample_failures,
            bytes=progress.bytes,
            bytes_done=progress.bytes_done,
            bytes_out=progress.bytes_out,
            rate=speed.rate,
            time_left=speed.time_left,
        )

    def begin_again(self) -> None:
        """It waits for its turn."""
        self._info = msgspec.structs.replace(self._info, state="waiting", ended=None, error=None)
        self.going = None

    def work(self, going: Going) -> None:
        """It is at work."""
        self.going = going
        self._info = msgspec.structs.replace(self._info, state="running")

    def final(self, state: JobState, error: str | None) -> JobInfo:
        """What it will have come to when it ends now."""
        return msgspec.structs.replace(
            self.info, state=state, ended=time.time(), error=error, running=0, time_left=None
        )

    def end(self, info: JobInfo) -> None:
        """It has ended so."""
        self._info = info
        self.going = None
        self.ended.set()


class Jobs:
    """Use `Jobs.open`; on exit none is at work, and those that were go on next time."""

    def __init__(self, node: Node, records: Records, kinds: Mapping[str, Kind]) -> None:
        self._node = node
        self._records = records
        self._kinds = kinds
        self._jobs: dict[str, Job] = {}
        self._turns = asyncio.Semaphore(node.config.jobs.at_once)
        self._objects: Counter[tuple[str, Outcome]] = Counter()
        self._bytes_out: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def open(cls, node: Node, kinds: Mapping[str, Kind] | None = None) -> AsyncIterator["Jobs"]:
        """Open those below the node's data directory, and go on with what was at work.

        Args:
            node: What they work on.
            kinds: By name; default: those that there are.
        """
        records = await asyncio.to_thread(Records, node.config.server.data / "jobs")
        if kinds is None:
            kinds = {"transform": TransformJobs(node), "prefetch": PrefetchJobs(node), "evict": EvictJobs(node)}
        jobs = cls(node, records, kinds)
        for saved in await asyncio.to_thread(records.load):
            jobs._jobs[saved.info.id] = Job(Principal(saved.principal), saved.info)
        try:
            for job in sorted(jobs._jobs.values(), key=lambda job: job.info.created):
                if not job.info.has_ended:
                    jobs._begin(job, None)
            yield jobs
        finally:
            await jobs.stop()

    async def plan(self, principal: Principal, request: JobRequest) -> JobPlan:
        """What a job would do; nothing is begun.

        Raises:
            ShardmillError: It would be refused.
        """
        kind, request = self._complete(principal, request)
        work = await kind.prepare(principal, request)
        job = job_id(request)
        known = await finish(asyncio.to_thread(self._records.read, job))
        planned = []
        for item in work.items:
            entry = known.entries.get(item.key)
            is_done = item.left == 0 or (entry is not None and await work.is_done(item, entry))
            planned.append(PlannedObject(item.key, item.size, item.target, is_done))
        return JobPlan(
            id=job,
            spec=request.transform,
            objects=planned[:SHOWN],
            total=len(planned),
            done=sum(each.done for each in planned),
            bytes=sum(each.size for each in planned),
            left=sum(item.left or 0 for item, each in zip(work.items, planned, strict=True) if not each.done),
            manifest=_manifest_uri(work),
        )

    async def start(self, principal: Principal, request: JobRequest) -> tuple[JobInfo, bool]:
        """Begin a job, or go on with it; False: it is going on already.

        Raises:
            BadRequest: A field is wrong.
            ShardmillError: Names what is missing, read-only or in the way; nothing was begun.
        """
        kind, request = self._complete(principal, request)
        known = self._jobs.get(job_id(request))
        if known is not None and not known.ended.is_set():
            return _shown(known.info), False
        work = await kind.prepare(principal, request)
        known = self._jobs.get(job_id(request))
        if known is not None and not known.ended.is_set():
            return _shown(known.info), False
        created = known.info.created if known is not None else time.time()
        job = self._jobs[job_id(request)] = Job(principal, _fresh(request, created, work))
        try:
            await self._save(job, job.info)
        except asyncio.CancelledError:
            # Whoever left was told of no job. As it is written down now, a restarted node would begin it.
            await self._end(job, "cancelled", "whoever began it left before it was written down")
            raise
        except BaseException:
            await self._end(job, "failed", "the job could not be written down")
            raise
        self._begin(job, work)
        await self._forget_old()
        return _shown(job.info), True

    def list(self, principal: Principal) -> builtins.list[JobInfo]:
        """All jobs, the newest first."""
        self._node.objects.check(principal, "read", None)
        shown = (_shown(job.info) for job in self._jobs.values())
        return sorted(shown, key=lambda info: info.created, reverse=True)

    async def get(self, principal: Principal, job_id: str, *, wait: float = 0.0) -> JobDetails:
        """How a job stands, as soon as it has ended or `wait` seconds are over.

        Raises:
            NotFound: There is none.
        """
        job = self._find(principal, job_id)
        if wait and not job.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, MAX_WAIT_SECONDS)):
                    await job.ended.wait()
        going = job.going
        if going is not None:
            known = Known(going.progress.entries, going.progress.failures)
        else:
            known = await finish(asyncio.to_thread(self._records.read, job.id))
        samples = (
            FailedSample(entry.object, failed.sample, failed.ordinal, failed.message)
            for entry in sorted(known.entries.values(), key=lambda entry: entry.object)
            for failed in entry.failed
        )
        return JobDetails(
            job=_shown(job.info),
            running=going.progress.running if going is not None else [],
            objects=sorted(known.failures.values(), key=lambda failure: failure.object)[:SHOWN],
            samples=[*itertools.islice(samples, SHOWN)],
        )

    async def cancel(self, principal: Principal, job_id: str) -> JobInfo:
        """End a job; what it has done stays, and asking for it again goes on. One that has ended stays as it is.

        Raises:
            NotFound: There is none.
        """
        job = self._find(principal, job_id)
        if job.request.destination is not None:
            self._node.objects.check(principal, "write", Bucket.parse(job.request.destination))
        if not job.ended.is_set():
            if not job.is_cancelled:
                job.is_cancelled = True
                self._stop(job)
            await job.ended.wait()
        return _shown(job.info)

    def statistics(self) -> JobStatistics:
        objects, bytes_out = Counter(self._objects), Counter(self._bytes_out)
        for job in self._jobs.values():
            if job.going is not None:
                _count(job, objects, bytes_out)
        return JobStatistics(Counter(job.info.state for job in self._jobs.values()), objects, bytes_out)

    def _complete(self, principal: Principal, request: JobRequest) -> tuple[Kind, JobRequest]:
        kind = self._kinds[request.kind]
        return kind, kind.complete(principal, request)

    def _find(self, principal: Principal, job_id: str) -> Job:
        self._node.objects.check(principal, "read", None)
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"no job {job_id}; shardmill job ls shows those there are")
        return job

    def _begin(self, job: Job, work: Work | None) -> None:
        job.begin_again()
        job.task = asyncio.get_running_loop().create_task(self._carry_out(job, work))
        if job.is_cancelled:
            # While it was written down.
            self._stop(job)

    def _stop(self, job: Job) -> None:
        """End it; one that is not begun yet ends when it is."""
        if job.task is not None:
            # Not at once: a task that is cancelled before its first step never cleans up.
            asyncio.get_running_loop().call_soon(job.task.cancel)

    async def _carry_out(self, job: Job, work: Work | None) -> None:
        logs.request_id.set(f"job-{job.id}")
        state: JobState = "failed"
        error: str | None = None
        try:
            async with self._turns:
                state, error = await self._work(job, work)
        except asyncio.CancelledError:
            if not job.is_cancelled:
                # The node ends. As it is written down the job is at work, so it goes on next time.
                raise
            state, error = "cancelled", "it was cancelled"
            await self._end_manifest(job, state)
        except ShardmillError as failure:
            error = failure.message
            await self._end_manifest(job, state)
        except Exception as defect:
            # The outermost handler of a job, as that of requests is of a request.
            logger.error("job %s: unexpected %s", job.id, type(defect).__name__, exc_info=defect)
            error = "internal error; the node's log has the story"
        finally:
            if job.going is not None:
                _count(job, self._objects, self._bytes_out)
        await self._end(job, state, error)

    async def _work(self, job: Job, work: Work | None) -> tuple[JobState, str | None]:
        if work is None:
            work = await self._kinds[job.request.kind].prepare(job.principal, job.request)
        going = Going(
            job.info,
            work,
            at_once=self._node.config.jobs.shards or work.at_once,
            principal=job.principal,
            objects=self._node.objects,
            records=self._records,
        )
        job.work(going)
        await self._save(job, job.info)
        logger.info("job %s is at work: %d objects", job.id, len(work.items))
        await going.run()
        error = going.progress.error
        state: JobState = "done" if error is None else "failed"
        await going.write_manifest(state)
        return state, error

    async def _end_manifest(self, job: Job, state: JobState) -> None:
        """Say in the manifest how it ended, if that is possible."""
        if job.going is None:
            return
        try:
            await job.going.write_manifest(state)
        except ShardmillError as error:
            logger.info("job %s: its manifest could not be written: %s", job.id, error)

    async def _end(self, job: Job, state: JobState, error: str | None) -> None:
        info = job.final(state, error)
        logger.info("job %s is %s%s", job.id, state, f": {error}" if error else "")
        try:
            await self._save(job, info)
        except ShardmillError as failure:
            logger.warning("job %s: how it ended could not be written down: %s", job.id, failure)
        finally:
            # Last, since whoever asks for it again writes to the same files.
            job.end(info)

    async def _save(self, job: Job, info: JobInfo) -> None:
        await finish(asyncio.to_thread(self._records.save, Saved(job.principal.name, info)))

    async def _forget_old(self) -> None:
        ended = sorted((job for job in self._jobs.values() if job.ended.is_set()), key=lambda job: job.info.created)
        for job in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self._jobs[job.id]
            await finish(asyncio.to_thread(self._records.remove, job.id))

    async def stop(self) -> None:
        """End all work; it goes on when the node is opened again."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        # A task that is cancelled before its first step never cleans up.
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _count(job: Job, objects: Counter[tuple[str, Outcome]], bytes_out: Counter[str]) -> None:
    """Add what a job that goes on has come to."""
    assert job.going is not None
    progress, kind = job.going.progress, job.request.kind
    for outcome in OUTCOMES:
        objects[kind, outcome] += progress.counts[outcome]
    bytes_out[kind] += progress.bytes_made


def _shown(info: JobInfo) -> JobInfo:
    """As it is told: without the names that nobody reads."""
    names = info.request.names
    if names is None or len(names) <= SHOWN_NAMES:
        return info
    return msgspec.structs.replace(info, request=msgspec.structs.replace(info.request, names=names[:SHOWN_NAMES]))


def _fresh(request: JobRequest, created: float, work: Work) -> JobInfo:
    return JobInfo(
        id=job_id(request),
        request=request,
        state="waiting",
        created=created,
        started=None,
        ended=None,
        error=None,
        total=len(work.items),
        done=0,
        found=0,
        failed=0,
        running=0,
        samples=0,
        failures=0,
        bytes=sum(item.size for item in work.items),
        bytes_done=0,
        bytes_out=0,
        rate=0.0,
        time_left=None,
        manifest=_manifest_uri(work),
    )


def _manifest_uri(work: Work) -> str | None:
    return None if work.manifest is None else str(work.manifest)
