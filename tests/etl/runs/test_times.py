"""Where the time of real runs goes: slow origins, and what is counted of runs that go on, end, fail and are left."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.errors import TransformFailed
from shardmill.core.specs import Spec
from shardmill.etl.engine import Engine
from shardmill.etl.runs.running import Reading
from shardmill.etl.versions.registry import Version
from tests.etl.support import REF, FileSource, bytes_of, open_engine, open_reading, read, register, write_shard

SAME = "def transform(sample):\n    return sample\n"
PAYLOAD = 100_000


class SlowSource(FileSource):
    """An origin whose bytes come a few samples at a time, each time after a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waits = 0

    async def ensure(self, start: int, stop: int) -> None:
        await super().ensure(start, stop)
        self.waits += 1
        await asyncio.sleep(0.2)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """20 MB, more than is made sure of at a time."""
    return write_shard(tmp_path / "s.tar", [{"bin": bytes(PAYLOAD), "txt": b"x"} for _ in range(200)])


WORKING = """
    def transform(sample):
        sum(range(100_000))
        return sample
"""


async def nothing_goes_on(engine: Engine) -> None:
    while engine.runs.going_on or engine.describe_runs():  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.01)


async def read_from(engine: Engine, version: Version, source: FileSource) -> bytes:
    plan = await engine.plan(version, source.meta, REF, Spec.parse(version.label))
    reading = await engine.runs.open(plan, source, request_id="r")
    assert isinstance(reading, Reading)
    data = bytearray()
    try:
        await reading.start()
        while (part := await reading.next()) is not None:
            data += bytes_of(part)
    finally:
        reading.close()
    return bytes(data)


def test_a_slow_bucket_is_named(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, WORKING)
            await read_from(engine, version, FileSource(shard))
            quick = engine.statistics_of(version)
            assert quick.bottleneck is not None
            assert quick.bottleneck.label != "the bucket"
            other = await register(engine, SAME, name="other")
            source = SlowSource(shard)
            await read_from(engine, other, source)
            statistics = engine.statistics_of(other)
            assert statistics.seconds_fetch >= 0.2 * (source.waits - 1) > 0
            assert statistics.bottleneck is not None
            assert statistics.bottleneck.label == "the bucket"

    run(story())


def test_a_run_counts_while_it_goes_on_and_once_when_it_is_over(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data", run_window=1 << 20) as engine:
            version = await register(engine, SAME)
            async with open_reading(engine, version, shard) as reading:
                await reading.start()
                [shown] = engine.describe_runs()
                first = engine.statistics_of(version)
                assert first.seconds > 0
                assert 0 < first.samples < 200
                assert (shown.readers, shown.state, shown.shared) == (1, "running", False)
                while await reading.next() is not None:
                    pass
                [shown] = engine.describe_runs()
                assert (shown.done, shown.state, shown.taken) == (1.0, "ended", shown.published)
                assert shown.statistics.samples == 200
                ended = engine.statistics_of(version)
            await nothing_goes_on(engine)
            after = engine.statistics_of(version)
            assert after == ended, "what everybody has read takes no more time"
            assert (after.samples, after.runs) == (200, 1)
            assert engine.statistics().transforms["t"] == after
            await read(engine, version, shard)
            both = engine.statistics_of(version)
            assert (both.samples, both.runs) == (400, 2)
            assert both.seconds > after.seconds

    run(story())


def test_runs_that_fail_or_are_left_count_until_then(tmp_path: Path, shard: Path) -> None:
    code = """
        def transform(sample):
            if sample["__key__"] == "0150":
                raise ValueError("no")
            return None if sample["__key__"] == "0001" else sample
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data", run_window=1 << 20) as engine:
            version = await register(engine, code)
            with pytest.raises(TransformFailed):
                await read(engine, version, shard)
            failed = engine.statistics_of(version)
            assert (failed.failures, failed.dropped) == (1, 1)
            assert failed.seconds > 0
            async with open_reading(engine, version, shard) as reading:
                await reading.start()
            await nothing_goes_on(engine)
            left = engine.statistics_of(version)
            assert left.seconds > failed.seconds
            assert left.samples > failed.samples
            await asyncio.sleep(0.05)
            assert engine.statistics_of(version) == left

    run(story())
