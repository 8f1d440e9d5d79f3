"""Another kind of job, of which registry, records and progress know nothing: as prefetch and evict will be."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from shardmill.config import load_config
from shardmill.core.errors import AccessDenied, BadRequest, Busy, NotFound, ObjectNotFound, ShardmillError
from shardmill.core.jobs import JobEntry, JobInfo, JobRequest
from shardmill.core.refs import ObjectRef
from shardmill.jobs.kinds import Item, Report, Work
from shardmill.jobs.registry import Jobs
from shardmill.node.access import ANONYMOUS, Action, Principal
from shardmill.node.node import Node

REQUEST = JobRequest("transform", "gs://somewhere", names=["a", "b", "c"])
Doing = Callable[[str, Report], Coroutine[Any, Any, None]]


@dataclass
class Look:
    """Looks at names, and writes nowhere."""

    doing: Doing
    items: Sequence[Item] = ()
    at_once: int = 1
    manifest: ObjectRef | None = None
    done: list[str] = field(default_factory=list)
    prepared: int = 0

    def complete(self, principal: Principal, request: JobRequest) -> JobRequest:
        if request.destination is not None:
            raise BadRequest("a job of this kind has no destination")
        return request

    async def prepare(self, principal: Principal, request: JobRequest) -> Work:
        self.prepared += 1
        return replace(self, items=[Item(index, key, 10, key) for index, key in enumerate(request.names or [])])

    async def is_done(self, item: Item, entry: JobEntry) -> bool:
        return entry.object == item.key

    async def do(self, item: Item, report: Report) -> JobEntry:
        await self.doing(item.key, report)
        self.done.append(item.key)
        return JobEntry(
            object=item.key,
            version="1",
            size=item.size,
            target="",
            bytes=0,
            etag=None,
            checksum=None,
            result="",
            made=time.time(),
        )


@asynccontextmanager
async def open_jobs(data: Path, kind: Look) -> AsyncIterator[Jobs]:
    config = load_config(environ={}, flags={"server": {"data": data}})
    async with Node.open(config) as node, Jobs.open(node, {"transform": kind}) as jobs:
        yield jobs


async def ended(jobs: Jobs, info: JobInfo) -> JobInfo:
    return (await jobs.get(ANONYMOUS, info.id, wait=30)).job


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


async def at_once(key: str, report: Report) -> None:
    report(0.5)


def test_a_kind_without_a_destination_is_done_and_found_done(tmp_path: Path) -> None:
    async def story() -> None:
        kind = Look(at_once)
        async with open_jobs(tmp_path, kind) as jobs:
            with pytest.raises(BadRequest, match="no destination"):
                await jobs.start(ANONYMOUS, JobRequest("transform", "gs://a", names=["a"], destination="ais://b"))
            info, is_begun = await jobs.start(ANONYMOUS, REQUEST)
            assert is_begun
            info = await ended(jobs, info)
            assert (info.state, info.done, info.manifest, kind.done) == ("done", 3, None, ["a", "b", "c"])
            again, _ = await jobs.start(ANONYMOUS, REQUEST)
            assert (await ended(jobs, again)).found == 3
            assert kind.done == ["a", "b", "c"]
            with pytest.raises(NotFound):
                await jobs.get(ANONYMOUS, "0" * 16)

    run(story())


def test_what_was_in_work_when_the_node_ended_goes_on_when_it_is_opened(tmp_path: Path) -> None:
    async def story() -> None:
        reached = asyncio.Event()

        async def stop_at_b(key: str, report: Report) -> None:
            if key == "b":
                report(0.7)
                reached.set()
                await asyncio.Event().wait()

        async with open_jobs(tmp_path, Look(stop_at_b)) as jobs:
            info, _ = await jobs.start(ANONYMOUS, REQUEST)
            await reached.wait()
            details = await jobs.get(ANONYMOUS, info.id)
            assert [(running.object, running.done) for running in details.running] == [("b", 0.7)]
            assert (details.job.state, details.job.bytes_done) == ("running", 17)
            assert await jobs.start(ANONYMOUS, REQUEST) == (details.job, False) or not details.job.has_ended
        kind = Look(at_once)
        async with open_jobs(tmp_path, kind) as jobs:
            info = await ended(jobs, info)
            assert (info.state, info.done, info.found) == ("done", 3, 1)
            assert kind.done == ["b", "c"]
        kind = Look(at_once)
        async with open_jobs(tmp_path, kind) as jobs:
            assert [job.state for job in jobs.list(ANONYMOUS)] == ["done"]
            assert kind.prepared == 0

    run(story())


def test_a_defect_of_a_kind_ends_its_job_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async def fail_at_x(key: str, report: Report) -> None:
            if key == "x":
                raise RuntimeError("not foreseen")

        async with open_jobs(tmp_path, Look(fail_at_x)) as jobs:
            bad, _ = await jobs.start(ANONYMOUS, JobRequest("transform", "gs://somewhere", names=["a", "x"]))
            good, _ = await jobs.start(ANONYMOUS, REQUEST)
            bad, good = await ended(jobs, bad), await ended(jobs, good)
            assert (bad.state, bad.error) == ("failed", "internal error; the node's log has the story")
            assert (good.state, good.done) == ("done", 3)
        assert "not foreseen" in caplog.text

    run(story())


def test_what_may_be_tried_again_is_and_what_may_not_is_not(tmp_path: Path) -> None:
    async def story() -> None:
        tries: list[str] = []

        async def fail_first(key: str, report: Report) -> None:
            tries.append(key)
            errors: dict[str, ShardmillError] = {"a": Busy("come again", retry_after=1), "b": ObjectNotFound("gone")}
            if key in errors and tries.count(key) == 1:
                report(0.5)
                raise errors[key]

        async with open_jobs(tmp_path, Look(fail_first)) as jobs:
            info, _ = await jobs.start(ANONYMOUS, REQUEST)
            info = await ended(jobs, info)
            assert tries == ["a", "a", "b", "c"]
            assert (info.state, info.done, info.failed) == ("failed", 2, 1)
            [failure] = (await jobs.get(ANONYMOUS, info.id)).objects
            assert (failure.object, failure.code, failure.message) == ("b", "object_not_found", "gone")

    run(story())


def test_a_job_can_be_cancelled_while_it_waits_to_try_again(tmp_path: Path) -> None:
    async def story() -> None:
        tried = asyncio.Event()

        async def never(key: str, report: Report) -> None:
            tried.set()
            raise Busy("come again", retry_after=3600)

        async with open_jobs(tmp_path, Look(never)) as jobs:
            info, _ = await jobs.start(ANONYMOUS, REQUEST)
            await tried.wait()
            both = await asyncio.gather(jobs.cancel(ANONYMOUS, info.id), jobs.cancel(ANONYMOUS, info.id))
            assert [each.state for each in both] == ["cancelled", "cancelled"]
            assert (await ended(jobs, info)).error == "it was cancelled"

    run(story())


def test_a_job_can_be_cancelled_before_it_has_begun(tmp_path: Path) -> None:
    """Also while it is being written down; whoever cancels is not left waiting for an end that never comes."""

    async def story() -> None:
        kind = Look(at_once)
        async with open_jobs(tmp_path, kind) as jobs:
            info, _ = await jobs.start(ANONYMOUS, REQUEST)
            assert (await asyncio.wait_for(jobs.cancel(ANONYMOUS, info.id), 10)).state == "cancelled"
            starting = asyncio.ensure_future(jobs.start(ANONYMOUS, REQUEST))
            async with asyncio.timeout(10):
                while jobs.list(ANONYMOUS)[0].state != "waiting":  # noqa: ASYNC110  # a job tells nobody
                    await asyncio.sleep(0)
            assert not starting.done()
            assert (await asyncio.wait_for(jobs.cancel(ANONYMOUS, info.id), 10)).state == "cancelled"
            await starting
            assert kind.done == []
            again, is_begun = await jobs.start(ANONYMOUS, REQUEST)
            assert is_begun
            assert (await ended(jobs, again)).state == "done"

    run(story())


def test_a_job_whose_client_left_while_it_was_written_down_never_begins(tmp_path: Path) -> None:
    async def story() -> None:
        kind = Look(at_once)
        async with open_jobs(tmp_path, kind) as jobs:
            starting = asyncio.ensure_future(jobs.start(ANONYMOUS, REQUEST))
            async with asyncio.timeout(10):
                while not jobs.list(ANONYMOUS):  # noqa: ASYNC110  # a job tells nobody
                    await asyncio.sleep(0)
            assert not starting.done()
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            assert [job.state for job in jobs.list(ANONYMOUS)] == ["cancelled"]
        async with open_jobs(tmp_path, kind) as jobs:
            (left,) = jobs.list(ANONYMOUS)
            assert (await ended(jobs, left)).state == "cancelled"
            assert kind.done == []
            again, is_begun = await jobs.start(ANONYMOUS, REQUEST)
            assert is_begun
            assert (await ended(jobs, again)).state == "done"

    run(story())


def test_who_may_only_read_is_refused_an_eviction_before_it_begins(tmp_path: Path) -> None:
    async def story() -> None:
        config = load_config(environ={}, flags={"server": {"data": tmp_path}})
        async with Node.open(config) as node, Jobs.open(node) as jobs:
            reader = Principal("reader")
            cast("dict[Principal, frozenset[Action]]", node.objects._access.rights)[reader] = frozenset({"read"})
            with pytest.raises(AccessDenied, match="no right to write on gs://far"):
                await jobs.start(reader, JobRequest("evict", "gs://far", prefix=""))
            assert jobs.list(reader) == []

    run(story())
