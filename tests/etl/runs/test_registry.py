"""Readers of one key: one run, the same bytes, a finished result; and what is left when they go."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardmill.core.errors import Busy, ServerError, ShardmillError, TransformFailed
from shardmill.core.specs import Spec
from shardmill.etl.engine import Engine
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.registry import NEARLY_DONE, RETURN_SECONDS
from shardmill.etl.runs.running import Finished, Reading, RunCounts
from shardmill.etl.runs.sample_run import SampleRun
from shardmill.etl.versions.registry import Version
from shardmill.storage.results import ResultStore
from tests.etl.support import (
    REF,
    FileSource,
    bytes_of,
    members,
    object_request,
    open_engine,
    register,
    register_request,
    request_for,
    settings_for,
    write_shard,
)

DRAWING = """
    import random

    def transform(sample):
        sample["txt"] = f"{random.random()} " + "x" * 20_000
        return sample
"""
SLOW = DRAWING.replace(
    "    def transform(sample):\n", "    def transform(sample):\n        import time; time.sleep(0.02)\n"
)
WHOLE_OBJECT = "def transform(data):\n    return data\n"


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s.tar", [{"txt": b"%d" % number} for number in range(60)])


@asynccontextmanager
async def open_parts(
    data: Path, *, capacity: int = 1 << 30, spool_window: int = 64 << 20, **values: float
) -> AsyncIterator[tuple[Engine, ResultStore]]:
    async with ResultStore.open_directory(
        data / "results", capacity=capacity, most=1000, scratch_seconds=600
    ) as results:
        async with Engine.open(settings_for(**values), data, (), results=results, spool_window=spool_window) as engine:
            yield engine, results


async def plan_for(engine: Engine, version: Version, shard: Path, options: str) -> tuple[Plan, FileSource]:
    source = FileSource(shard)
    # Another file behind the name is another version, as it is of a real store.
    status = os.stat(shard)
    source.meta = msgspec.structs.replace(source.meta, version=f"{status.st_size}-{status.st_mtime_ns}")
    return await engine.plan(version, source.meta, REF, Spec.parse(f"{version.label}{options}")), source


async def open_one(
    engine: Engine,
    version: Version,
    shard: Path,
    options: str = ",seed=1",
    request_id: str = "r",
    *,
    is_patient: bool = False,
) -> Reading | Finished:
    plan, source = await plan_for(engine, version, shard, options)
    return await engine.runs.open(plan, source, request_id=request_id, is_patient=is_patient)


async def read_all(opened: Reading | Finished) -> bytes:
    if isinstance(opened, Finished):
        try:
            return os.pread(opened.source.descriptor, opened.source.meta.size, 0)
        finally:
            opened.source.close()
    data = bytearray()
    try:
        await opened.start()
        while (part := await opened.next()) is not None:
            data += bytes_of(part)
    finally:
        opened.close()
    return bytes(data)


async def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.01)


def samples_done(engine: Engine, version: Version) -> int:
    return engine.statistics_of(version).samples


def test_four_readers_of_a_cold_key_cause_one_run_and_get_the_same_bytes(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, DRAWING)
            readings = [await open_one(engine, version, shard) for _ in range(4)]
            assert all(isinstance(reading, Reading) for reading in readings)
            found = await asyncio.gather(*map(read_all, readings))
            assert len(set(found)) == 1
            assert len(members(found[0])) == 60
            assert samples_done(engine, version) == 60
            finished = await open_one(engine, version, shard)
            assert isinstance(finished, Finished)
            assert finished.source.meta.size == len(found[0])
            assert await read_all(finished) == found[0]
            assert samples_done(engine, version) == 60

    run(story())


def test_a_stalled_reader_holds_up_nobody_and_gets_everything_later(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data", run_window=200_000) as (engine, _):
            version = await register(engine, DRAWING)
            stalled = await open_one(engine, version, shard)
            quick = await open_one(engine, version, shard)
            assert isinstance(stalled, Reading)
            await stalled.start()
            first = await stalled.next()
            assert first is not None
            data = bytearray(bytes_of(first))
            whole = await read_all(quick)
            await wait_until(lambda: engine.runs.going_on == 0)
            while (part := await stalled.next()) is not None:
                data += bytes_of(part)
            stalled.close()
            assert bytes(data) == whole
            assert samples_done(engine, version) == 60

    run(story())


def test_the_first_reader_leaves_and_the_others_do_not_notice(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            first = await open_one(engine, version, shard)
            second = await open_one(engine, version, shard)
            assert isinstance(first, Reading)
            await first.start()
            await first.next()
            first.close()
            assert len(members(await read_all(second))) == 60
            assert samples_done(engine, version) == 60

    run(story())


def test_the_last_reader_leaves_and_nothing_is_left(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, SLOW)
            before = len(os.listdir("/proc/self/fd"))
            readings = [await open_one(engine, version, shard) for _ in range(2)]
            for reading in readings:
                assert isinstance(reading, Reading)
                await reading.start()
            for reading in readings:
                assert isinstance(reading, Reading)
                reading.close()
            await wait_until(lambda: engine.runs.going_on == 0)
            await wait_until(lambda: all(not worker.in_flight for worker in engine.pool._workers))
            engine.pool.retire(version.key)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            assert results.statistics().used == 0
            assert list((tmp_path / "data" / "results" / "tmp").iterdir()) == []
            assert engine.runs.outcomes["abandoned"] == 1

    run(story())


def test_a_reader_who_leaves_before_anything_began_leaves_nothing(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, SLOW)
            before = len(os.listdir("/proc/self/fd"))
            for options in (",seed=1", ""):
                reading = await open_one(engine, version, shard, options)
                assert isinstance(reading, Reading)
                reading.close()
            await wait_until(lambda: engine.runs.going_on == 0)
            engine.pool.retire(version.key)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            assert results.statistics().used == 0

    run(story())


def test_a_run_nearly_done_is_finished_for_whoever_comes_next(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            reading = await open_one(engine, version, shard)
            assert isinstance(reading, Reading)
            await reading.start()
            while reading.running.run.fraction_done <= NEARLY_DONE:
                assert await reading.next() is not None
            reading.close()
            await wait_until(lambda: engine.runs.going_on == 0)
            finished = await open_one(engine, version, shard)
            assert isinstance(finished, Finished)
            assert len(members(await read_all(finished))) == 60

    run(story())


def test_what_decides_the_bytes_is_in_the_key_and_nothing_else(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, DRAWING)
            other = await register(engine, DRAWING.replace("20_000", "20_001"))
            keys = []
            for known, options in [
                (version, ",seed=1"),
                (version, ",seed=2"),
                (version, ",seed=1,epoch=1"),
                (version, ",seed=1,errors=skip:0.01"),
                (version, ",seed=1,start=1"),
                (version, ",seed=1,count=1"),
                (other, ",seed=1"),
            ]:
                plan, source = await plan_for(engine, known, shard, options)
                source.close()
                assert plan.is_shared
                keys.append(plan.key)
                keys.append(replace(plan, environment_id="another").key)
                keys.append(replace(plan, source_version="another").key)
            assert len(set(keys)) == len(keys)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            source.close()
            assert plan.key == keys[0]
            assert replace(plan, spec=replace(plan.spec, k="abcd", name="renamed")).key == keys[0]

    run(story())


def test_without_a_seed_nothing_is_shared_unless_the_version_draws_nothing(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, DRAWING)
            found = [await read_all(await open_one(engine, version, shard, "")) for _ in range(2)]
            assert found[0] != found[1]
            source = FileSource(shard)
            try:
                info, _ = await engine.register(
                    request_for("def transform(sample):\n    return sample\n", name="same"),
                    probe_with=(source, str(REF)),
                    progress=lambda _: None,
                )
            finally:
                source.close()
            same = engine.versions.get(info.name, info.digest)
            first = await read_all(await open_one(engine, same, shard, ""))
            again = await open_one(engine, same, shard, "")
            assert isinstance(again, Finished)
            assert await read_all(again) == first
            seeded = await open_one(engine, same, shard, ",seed=9,epoch=4")
            assert isinstance(seeded, Finished), "a seed decides nothing where nothing is drawn"
            seeded.source.close()

    run(story())


def test_a_failure_that_would_come_again_is_remembered_and_explained(tmp_path: Path, shard: Path) -> None:
    code = "def transform(sample):\n    raise ValueError('no')\n"

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, code)
            for number in range(3):
                with pytest.raises(TransformFailed, match="no"):
                    await read_all(await open_one(engine, version, shard, ",seed=1", f"r{number}"))
            assert engine.statistics_of(version).runs == 1
            for number in range(3):
                found = engine.failures.find(request=f"r{number}").failures
                assert found, f"r{number} cannot be explained"
                assert "ValueError" in (found[0].traceback or "")
            with pytest.raises(TransformFailed):
                await read_all(await open_one(engine, version, shard, ",seed=2"))
            assert engine.statistics_of(version).runs == 2

    run(story())


def test_a_lost_worker_is_not_remembered(tmp_path: Path, shard: Path) -> None:
    code = "import os\ndef transform(sample):\n    os._exit(1)\n"

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, code)
            for _ in range(2):
                with pytest.raises(TransformFailed, match="exited"):
                    await read_all(await open_one(engine, version, shard))
            assert engine.statistics_of(version).runs == 2

    run(story())


def test_a_full_quota_loses_no_sample_and_keeps_to_its_bounds(tmp_path: Path, shard: Path) -> None:
    """Six results of 1.2 MB in 2 MB, two readers each; then results that do not fit at all."""
    capacity = 2_000_000

    async def story() -> None:
        async with open_parts(tmp_path / "data", capacity=capacity) as (engine, results):
            version = await register(engine, DRAWING)
            for seed in range(6):
                readings = [await open_one(engine, version, shard, f",seed={seed}") for _ in range(2)]
                found = await asyncio.gather(*map(read_all, readings))
                assert found[0] == found[1]
                assert len(members(found[0])) == 60
                assert results.statistics().used <= capacity
            await wait_until(lambda: len(results.list()) == 1)
            large = await register(engine, DRAWING.replace("20_000", "60_000"))
            readings = [await open_one(engine, large, shard) for _ in range(3)]
            found = await asyncio.gather(*map(read_all, readings))
            assert len({len(members(data)) for data in found}) == 1
            assert len(set(found)) == 1
            await wait_until(lambda: engine.runs.going_on == 0)
            assert results.statistics().used <= capacity
            disk = sum(path.stat().st_size for path in (tmp_path / "data" / "results").rglob("*") if path.is_file())
            assert disk <= capacity + 100_000

    run(story())


def test_who_needs_the_whole_waits_for_it_or_is_told(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data", capacity=2_000_000, spool_window=300_000) as (engine, _):
            version = await register(engine, DRAWING)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            finished = await engine.runs.wait_finished(plan, source, request_id="range")
            assert finished.source.meta.size > 60 * 20_000
            assert finished.source.meta.etag
            finished.source.close()
            large = await register(engine, DRAWING.replace("20_000", "60_000"))
            plan, source = await plan_for(engine, large, shard, ",seed=1")
            with pytest.raises(Busy, match="without Range"):
                await engine.runs.wait_finished(plan, source, request_id="range")
            await wait_until(lambda: engine.runs.going_on == 0)

    run(story())


def test_a_spooled_run_stops_at_its_window_ahead_of_the_fastest_reader(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}] * 400)

    async def story() -> None:
        async with open_parts(tmp_path / "data", spool_window=2_000_000) as (engine, _):
            version = await register(engine, DRAWING)
            reading = await open_one(engine, version, shard)
            assert isinstance(reading, Reading)
            await reading.start()
            output = reading.running.run.output
            previous = -1
            while output.published != previous:
                previous = output.published
                await asyncio.sleep(0.3)
            assert 1_000_000 < previous < 4_000_000
            assert len(members(await read_all(reading))) == 400

    run(story())


def test_leavers_and_stayers_in_any_order_leave_nothing_behind(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, DRAWING)

            async def one(number: int) -> bytes | None:
                opened = await open_one(engine, version, shard, f",seed={number % 3}")
                if number % 4 == 0 and isinstance(opened, Reading):
                    with contextlib.suppress(ShardmillError):
                        await opened.start()
                    opened.close()
                    return None
                return await read_all(opened)

            before = len(os.listdir("/proc/self/fd"))
            found = await asyncio.gather(*(one(number) for number in range(40)))
            by_seed: dict[int, set[bytes]] = {}
            for number, data in enumerate(found):
                if data is not None:
                    by_seed.setdefault(number % 3, set()).add(data)
            assert {seed: len(kinds) for seed, kinds in by_seed.items()} == {0: 1, 1: 1, 2: 1}
            await wait_until(lambda: engine.runs.going_on == 0)
            engine.pool.retire(version.key)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            assert results.statistics().used == sum(entry.size for entry in results.list())
            assert engine.runs._all == set()

    run(story())


@pytest.mark.parametrize("options", ["", ",seed=1"])
@pytest.mark.parametrize("code", [DRAWING, SLOW])
def test_what_was_begun_ahead_and_is_never_asked_for_leaves_nothing(
    tmp_path: Path, shard: Path, options: str, code: str
) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, code)
            before = len(os.listdir("/proc/self/fd"))
            engine.runs._prepared_seconds = 0.5
            plan, source = await plan_for(engine, version, shard, options)
            assert engine.runs.prepare(plan, source, request_id="ahead")
            same, source = await plan_for(engine, version, shard, options)
            assert not engine.runs.prepare(same, source, request_id="ahead"), "it is under way"
            await wait_until(lambda: engine.runs.ahead["unused"] == 1)
            await wait_until(lambda: engine.runs._all == set())
            engine.pool.retire(version.key)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            assert results.statistics().used == sum(entry.size for entry in results.list())
            assert list((tmp_path / "data" / "results" / "tmp").iterdir()) == []

    run(story())


@pytest.mark.parametrize("is_kept_open", [False, True])
def test_what_was_begun_ahead_and_is_finished_when_it_is_asked_for_leaves_its_result_only(
    tmp_path: Path, shard: Path, is_kept_open: bool
) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            assert engine.runs.prepare(plan, source, request_id="ahead")
            await wait_until(lambda: all(running.is_through for running in engine.runs._all))
            if is_kept_open:
                engine.runs.count_hit(plan.key, "r1")
            else:
                assert len(members(await read_all(await open_one(engine, version, shard, ",seed=1")))) == 60
            assert engine.runs.ahead["used"] == 1
            assert engine.runs._all == set()

    run(story())


def test_a_run_begun_ahead_gives_way_to_one_that_is_read(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            ahead, source = await plan_for(engine, version, shard, ",seed=1")
            assert engine.runs.prepare(ahead, source, request_id="ahead")
            running = engine.runs._shared[ahead.key].run
            assert isinstance(running, SampleRun)
            await wait_until(lambda: running.state.processed > 4)
            begun = running.state.processed
            await read_all(await open_one(engine, version, shard, ",seed=2"))
            # Two batches were on their way to each worker when the reader came.
            assert running.state.processed <= begun + 30
            assert len(members(await read_all(await open_one(engine, version, shard, ",seed=1")))) == 60

    run(story())


@pytest.mark.parametrize("steps", [0, 1, 3], ids=lambda steps: f"after {steps} steps")
def test_who_comes_in_the_moment_after_the_last_reader_left_gets_all(tmp_path: Path, shard: Path, steps: int) -> None:
    """The run that ends then is no longer to be joined: it would never give another byte."""

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            _, again = await plan_for(engine, version, shard, ",seed=1")
            first = await engine.runs.open(plan, source, request_id="first")
            assert isinstance(first, Reading)
            await first.start()
            first.close()
            for _ in range(steps):
                await asyncio.sleep(0)
            second = await engine.runs.open(plan, again, request_id="second")
            data = await read_all(second)
            assert len(members(data)) == 60
            third = await open_one(engine, version, shard, request_id="third")
            assert isinstance(third, Finished)
            assert await read_all(third) == data

    run(story())


def test_a_patient_reader_gives_way_to_one_who_waits(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version, other = await register(engine, SLOW), await register(engine, SLOW.replace("0.02", "0.021"))
            patient = asyncio.create_task(read_all(await open_one(engine, version, shard, is_patient=True)))
            running = next(iter(engine.runs._all)).run
            assert isinstance(running, SampleRun)
            await wait_until(lambda: running.state.processed > 4)
            begun = running.state.processed
            # Of another version, which needs workers of its own, and of the same.
            await read_all(await open_one(engine, other, shard, ",seed=2"))
            await read_all(await open_one(engine, version, shard, ",seed=3"))
            assert running.state.processed <= begun + 50
            assert len(members(await patient)) == 60

    run(story())


def test_who_comes_to_a_complete_run_that_is_not_kept_does_not_wait_for_its_slowest_reader(
    tmp_path: Path, shard: Path
) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data", capacity=400_000) as (engine, _):
            version = await register(engine, DRAWING)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            source.close()
            stalled = await open_one(engine, version, shard)
            assert isinstance(stalled, Reading)
            await stalled.start()
            part = await stalled.next()
            assert part is not None
            data = bytearray(bytes_of(part))
            output = engine.runs._shared[plan.key].run.output
            await wait_until(lambda: output.is_complete and not output.is_spooling)
            other = await asyncio.wait_for(open_one(engine, version, shard), 10)
            whole = await read_all(other)
            assert len(members(whole)) == 60
            while (part := await stalled.next()) is not None:
                data += bytes_of(part)
            stalled.close()
            assert bytes(data) == whole

    run(story())


class BrokenSource(FileSource):
    """Fails as nothing of ours does."""

    async def ensure(self, start: int, stop: int) -> None:
        raise RuntimeError("not foreseen")


@pytest.mark.parametrize("kind", ["sample", "bytes"])
def test_what_nobody_foresaw_ends_the_run_and_its_readers(tmp_path: Path, shard: Path, kind: str) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            request = request_for(DRAWING) if kind == "sample" else object_request(WHOLE_OBJECT)
            version = await register_request(engine, request)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            source.close()
            opened = await engine.runs.open(plan, BrokenSource(shard), request_id="r")
            with pytest.raises(ServerError, match="internal error"):
                await asyncio.wait_for(read_all(opened), 10)
            assert len(await read_all(await open_one(engine, version, shard)))

    run(story())


def test_patient_readers_are_served_one_after_the_other(tmp_path: Path, shard: Path) -> None:
    """So that one's bytes are stored while the next one's are made."""

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            readings = [await open_one(engine, version, shard, f",seed={seed}", is_patient=True) for seed in (1, 2)]
            second = max(engine.runs._all, key=lambda running: running.run.number).run
            assert isinstance(second, SampleRun)
            reading = asyncio.create_task(read_all(readings[1]))
            await read_all(readings[0])
            assert second.state.processed < 30
            assert len(members(await reading)) == 60

    run(story())


def test_what_a_patient_reader_leaves_is_scratch_until_somebody_asks(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, DRAWING)
            made = await read_all(await open_one(engine, version, shard, is_patient=True))
            await wait_until(lambda: len(results.list()) == 1)
            again = await open_one(engine, version, shard, is_patient=True)
            assert isinstance(again, Finished)
            assert RunCounts.of(again.source.meta.user) == RunCounts(samples=60, failures=0, dropped=0)
            assert await read_all(again) == made
            assert [entry.is_scratch for entry in results.list()] == [True]
            assert await read_all(await open_one(engine, version, shard)) == made
            assert [entry.is_scratch for entry in results.list()] == [False]

    run(story())


def test_who_joins_a_patient_readers_run_is_waited_for(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, SLOW)
            patient = asyncio.create_task(read_all(await open_one(engine, version, shard, is_patient=True)))
            [running] = engine.runs._all
            assert running.run.is_ahead
            joined = await open_one(engine, version, shard, request_id="other")
            assert isinstance(joined, Reading)
            assert not running.run.is_ahead
            assert await read_all(joined) == await patient
            assert joined.counts == RunCounts(samples=60, failures=0, dropped=0)
            await wait_until(lambda: [entry.is_scratch for entry in results.list()] == [False])

    run(story())


def test_a_patient_reader_leaves_what_was_begun_ahead_for_another(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, DRAWING)
            plan, source = await plan_for(engine, version, shard, "")
            assert engine.runs.prepare(plan, source, request_id="ahead")
            drawn = plan.seed
            patient = await open_one(engine, version, shard, "", is_patient=True)
            assert isinstance(patient, Reading)
            assert patient.seed != drawn
            await read_all(patient)
            reader = await open_one(engine, version, shard, "")
            assert isinstance(reader, Reading)
            assert reader.seed == drawn
            await read_all(reader)

    run(story())


def test_what_was_begun_for_one_reader_is_written_to_no_file_once_he_is_there(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, SLOW)
            plan, source = await plan_for(engine, version, shard, "")
            assert engine.runs.prepare(plan, source, request_id="ahead")
            (running,) = engine.runs.live()
            output = running.run.output
            await wait_until(lambda: output.spooled > 0)
            reader = await open_one(engine, version, shard, "")
            assert isinstance(reader, Reading)
            assert reader.running is running
            assert len(members(await read_all(reader))) == 60
            assert output.spooled < output.published
            await wait_until(lambda: engine.runs._all == set())
            assert results.statistics().used == 0
            assert list((tmp_path / "data" / "results" / "tmp").iterdir()) == []

    run(story())


def test_runs_begun_ahead_make_place_for_readers(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data", max_runs=2) as (engine, _):
            version = await register(engine, SLOW)
            for seed in (1, 2):
                plan, source = await plan_for(engine, version, shard, f",seed={seed}")
                assert engine.runs.prepare(plan, source, request_id="ahead")
            readings = [await open_one(engine, version, shard, f",seed={seed}") for seed in (3, 4)]
            with pytest.raises(Busy):
                await open_one(engine, version, shard, ",seed=5")
            for data in await asyncio.gather(*map(read_all, readings)):
                assert len(members(data)) == 60
            assert engine.runs.ahead["unused"] == 2

    run(story())


def test_a_run_that_outlasts_the_wait_goes_on_until_its_reader_is_back(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told to come again must find more than he left, or he comes for ever."""
    monkeypatch.setattr("shardmill.etl.runs.registry.WAIT_SECONDS", 0.2)

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            version = await register(engine, SLOW)
            told: list[int] = []
            for _ in range(30):
                plan, source = await plan_for(engine, version, shard, ",seed=1")
                try:
                    found = await engine.runs.wait_finished(plan, source, request_id="r")
                    break
                except Busy as error:
                    told.append(error.retry_after or 0)
            assert 0 < max(told) < RETURN_SECONDS
            assert len(members(await read_all(found))) == 60
            assert engine.statistics_of(version).runs == 1

    run(story())


def test_a_run_whose_reader_never_returns_is_given_up(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.etl.runs.registry.WAIT_SECONDS", 0.1)
    monkeypatch.setattr("shardmill.etl.runs.registry.RETURN_SECONDS", 0.1)

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            version = await register(engine, SLOW)
            plan, source = await plan_for(engine, version, shard, ",seed=1")
            with pytest.raises(Busy):
                await engine.runs.wait_finished(plan, source, request_id="r")
            await wait_until(lambda: engine.runs.going_on == 0 and not engine.runs.live())
            assert engine.runs.outcomes["abandoned"] == 1
            assert results.statistics().used == 0

    run(story())


def test_a_result_is_of_its_arguments_not_of_twelve_digits_of_them(tmp_path: Path) -> None:
    """Two numbers whose digits are the same; see the registry of versions."""
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}])
    code = "def transform(sample, x=0):\n    return sample\n"

    async def main() -> None:
        async with open_engine(tmp_path / "data") as engine:
            keys = set()
            for name, number in (("t", 12127942), ("u", 16124442)):
                request = msgspec.structs.replace(request_for(code), name=name, args={"x": number})
                version = await register_request(engine, request)
                source = FileSource(shard)
                plan = await engine.plan(version, source.meta, REF, replace(Spec.parse(version.label), seed=1))
                source.close()
                keys.add(plan.key)
            assert len(keys) == 2

    asyncio.run(main())
