"""Environments that change: another version installed while the node runs, or another interpreter behind the name."""

import asyncio
import os
import platform
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from shardmill.config import ConfigError, EnvironmentSettings, PackageSettings, TransformSettings
from shardmill.core.api import EnvironmentInfo, TransformInfo
from shardmill.core.errors import Busy, TransformFailed
from shardmill.core.specs import Spec
from shardmill.etl.engine import Engine
from shardmill.etl.environments import environments
from shardmill.etl.environments.environments import Environment, Environments
from shardmill.etl.environments.packages import Packages
from shardmill.etl.processes.staging import stage
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.running import Reading
from shardmill.etl.runs.sample_run import SampleRun
from shardmill.etl.versions.registry import Version, build_info, check_request, compute_digest
from shardmill.etl.workers import pool
from shardmill.etl.workers.pool import WorkerPool
from shardmill.storage.results import ResultStore
from tests.etl.over_http import Served, serve
from tests.etl.support import (
    REF,
    FileSource,
    bytes_of,
    children,
    members,
    request_for,
    settings_for,
    write_shard,
)
from tests.etl.wheels import install, make_environment, write_wheel

USING = """
    import colours

    def transform(sample):
        sample["txt"] = colours.NAME.encode()
        return sample
"""
SLOW = USING.replace(
    "    def transform(sample):\n", "    def transform(sample):\n        import time; time.sleep(0.05)\n"
)
SHARD = "s.tar"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("wheels")
    versions = {"1.0": "red", "2.0": "blue"}
    return {
        version: write_wheel(directory, "colours", version, {"colours.py": f"NAME = {name!r}\n"})
        for version, name in versions.items()
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    directory.mkdir()
    write_shard(directory / SHARD, [{"txt": b"grey"}] * 20)
    return directory


def colours(data: bytes) -> set[bytes]:
    return set(members(data).values())


def wait_noticed(served: Served, info: TransformInfo, origin: str) -> None:
    """Return when the node, which looks once a second, plans with another environment."""
    deadline = time.monotonic() + 20
    while served.ask("HEAD", served.path(info, SHARD, ",seed=1")).headers["shardmill-origin"] == origin:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_colour(served: Served, info: TransformInfo) -> tuple[set[bytes], str, str]:
    """What a seeded URL gives when its result is there: colours, ETag and origin."""
    served.get(info, SHARD, ",seed=1")
    answer = served.get(info, SHARD, ",seed=1")
    assert answer.status == 200
    return colours(answer.body), answer.headers["etag"], answer.headers["shardmill-origin"]


def test_a_distribution_upgraded_while_the_node_runs_is_another_result(
    wheels: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "env", wheels["1.0"])
    with serve(shards, "--env", f"tiny={python}", "--workers", "1", data=tmp_path / "data") as served:
        info = served.register(USING, decoder=None, env="tiny")
        red, old_tag, old_origin = read_colour(served, info)
        assert red == {b"red"}
        install(python, wheels["2.0"])
        wait_noticed(served, info, old_origin)
        blue, new_tag, new_origin = read_colour(served, info)
        assert blue == {b"blue"}
        assert new_tag != old_tag
        assert new_origin != old_origin
        # The old version again is the old key again: what was kept for it is good.
        install(python, wheels["1.0"])
        wait_noticed(served, info, new_origin)
        answer = served.get(info, SHARD, ",seed=1")
        assert (colours(answer.body), answer.headers["etag"]) == (red, old_tag)


def test_a_distribution_upgraded_while_the_node_is_down_is_another_result(
    wheels: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "env", wheels["1.0"])
    flags = ("--env", f"tiny={python}", "--workers", "1")
    with serve(shards, *flags, data=tmp_path / "data") as served:
        info = served.register(USING, decoder=None, env="tiny")
        red = read_colour(served, info)
    with serve(shards, *flags, data=tmp_path / "data") as served:
        assert read_colour(served, info) == red
    install(python, wheels["2.0"])
    with serve(shards, *flags, data=tmp_path / "data") as served:
        blue = read_colour(served, info)
    assert blue[0] == {b"blue"}
    assert set(blue[1:]).isdisjoint(red[1:])


def script(directory: Path, text: str) -> Path:
    """A shell script in place of an interpreter."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def opened_with(data: Path, **interpreters: Path) -> list[str]:
    """The environments of an engine that is opened with these."""

    async def main() -> list[str]:
        named = [EnvironmentSettings(name, python) for name, python in interpreters.items()]
        async with Engine.open(TransformSettings(workers=1), data, named) as engine:
            return [environment.name for environment in engine.environments]

    return asyncio.run(main())


def test_an_interpreter_that_answers_what_no_python_does_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    other = script(tmp_path, "echo cannot do this >&2; echo usage: tool; exit 3")
    with pytest.raises(ConfigError) as caught:
        opened_with(tmp_path / "data", broken=Path("/bin/true"), fine=Path(sys.executable), other=other)
    assert caught.value.problems == [
        "environment 'broken': /bin/true is no Python: it answers nothing, status 0",
        f"environment 'other': {other} is no Python: it answers 'usage: tool; cannot do this', status 3",
    ]


def test_an_environment_is_shown_with_what_tells_it_from_others(tmp_path: Path, wheels: dict[str, Path]) -> None:
    venv = make_environment(tmp_path / "with-colours", wheels["1.0"])

    async def main() -> list[EnvironmentInfo]:
        named = [EnvironmentSettings("colours", venv)]
        async with Engine.open(TransformSettings(workers=1), tmp_path / "data", named) as engine:
            await engine.environments["colours"].zygote()
            return engine.environments.infos()

    _, shown = asyncio.run(main())
    assert (shown.interpreter, shown.python, shown.distributions) == (
        "python of with-colours",
        platform.python_version(),
        1,
    )
    assert (shown.bytes, shown.packages) == (None, None)


def test_a_slow_interpreter_and_one_that_says_more_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environments, "CHECK_SECONDS", 0.5)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    slow, chatty = tmp_path / "slow", tmp_path / "chatty"
    for directory in (slow, chatty):
        directory.mkdir()
    python = f'exec "{sys.executable}" "$@"'
    found = opened_with(
        tmp_path / "data",
        slow=script(slow, f"read word < {gate}; {python}"),
        chatty=script(chatty, f"echo loading modules; echo warning >&2; {python}"),
    )
    assert found == ["default", "slow", "chatty"]
    said = [record.getMessage() for record in caplog.records if "no answer" in record.getMessage()]
    assert said == [f"environment 'slow': {slow / 'python'} gives no answer for 0.5 s"]


def test_another_interpreter_behind_the_name_is_another_result(
    wheels: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    pythons = [make_environment(tmp_path / f"env-{version}", wheels[version]) for version in ("1.0", "2.0")]
    found = []
    for python in pythons:
        with serve(shards, "--env", f"tiny={python}", "--workers", "1", data=tmp_path / "data") as served:
            info = served.register(USING, decoder=None, env="tiny")
            found.append(read_colour(served, info))
    assert [colour for colour, _, _ in found] == [{b"red"}, {b"blue"}]
    assert found[0][2] != found[1][2]


def test_a_run_that_an_upgrade_falls_into_is_not_kept(wheels: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    async def main() -> None:
        python = await asyncio.to_thread(make_environment, tmp_path / "env", wheels["1.0"])
        async with open_engine(tmp_path / "data", python) as engine:
            version = await register(engine, SLOW)
            plan, source = await plan_for(engine, version, shards)
            reading = await engine.runs.open(plan, source, request_id="r")
            assert isinstance(reading, Reading)
            await reading.start()
            await asyncio.to_thread(install, python, wheels["2.0"])
            assert colours(await read_to_end(reading)) == {b"red"}
            await wait_until(lambda: engine.runs.going_on == 0)
            assert not engine.runs.has_result(plan)
            plan, source = await plan_for(engine, version, shards)
            reading = await engine.runs.open(plan, source, request_id="r")
            assert isinstance(reading, Reading)
            await reading.start()
            assert colours(await read_to_end(reading)) == {b"blue"}
            await wait_until(lambda: engine.runs.has_result(plan))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_was_planned_before_an_upgrade_is_not_run_after_it(
    wheels: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the worker from before may still be there: it is not to be used, either.
    monkeypatch.setattr(pool, "WATCH_SECONDS", 60)

    async def main() -> None:
        python = await asyncio.to_thread(make_environment, tmp_path / "env", wheels["1.0"])
        async with open_engine(tmp_path / "data", python) as engine:
            version = await register(engine, USING)
            plan, source = await plan_for(engine, version, shards)
            await asyncio.to_thread(install, python, wheels["2.0"])
            assert await plan.environment.look() is None
            await plan.environment.zygote()
            assert [worker.is_ready for worker in engine.pool._workers] == [True]
            reading = await engine.runs.open(plan, source, request_id="r")
            assert isinstance(reading, Reading)
            try:
                with pytest.raises(Busy, match="environment 'tiny' was changed"):
                    await reading.start()
            finally:
                reading.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_run_goes_on_after_an_upgrade_on_the_workers_that_it_has(
    wheels: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    """There are lanes for more, but no more workers of its environment can be had."""

    async def main() -> None:
        python = await asyncio.to_thread(make_environment, tmp_path / "env", wheels["1.0"])
        async with open_engine(tmp_path / "data", python, workers=3) as engine:
            version = await register(engine, SLOW)
            write_shard(shards / SHARD, [{"txt": b"grey"}] * 200)
            plan, source = await plan_for(engine, version, shards)
            reading = await engine.runs.open(plan, source, request_id="r")
            assert isinstance(reading, Reading)
            await reading.start()
            await wait_until(lambda: len(engine.pool._workers) == 3)
            await asyncio.to_thread(install, python, wheels["2.0"])
            assert await plan.environment.look() is None
            await plan.environment.zygote()
            engine.pool._workers[0].kill(None)
            assert colours(await read_to_end(reading)) == {b"red"}

    asyncio.run(asyncio.wait_for(main(), 60))


class Arriving(FileSource):
    """Has the first half, and the rest once it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_let = asyncio.Event()

    async def ensure_some(self, start: int, stop: int) -> int:
        half = self.meta.size // 2
        if start < half:
            return min(stop, half)
        await self.is_let.wait()
        return await super().ensure_some(start, stop)


def test_a_run_that_waits_for_its_shard_keeps_its_workers_over_an_upgrade(
    wheels: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WATCH_SECONDS", 0.01)
    ticks: list[bool] = []
    on_tick = SampleRun.on_tick

    def count(run: SampleRun, seconds: float, busy: bool) -> None:
        ticks.append(busy)
        on_tick(run, seconds, busy)

    monkeypatch.setattr(SampleRun, "on_tick", count)

    async def main() -> None:
        python = await asyncio.to_thread(make_environment, tmp_path / "env", wheels["1.0"])
        async with open_engine(tmp_path / "data", python) as engine:
            version = await register(engine, USING)
            write_shard(shards / SHARD, [{"txt": b"grey"}] * 200)
            plan, unused = await plan_for(engine, version, shards)
            unused.close()
            source = Arriving(shards / SHARD)
            reading = await engine.runs.open(plan, source, request_id="r")
            assert isinstance(reading, Reading)
            await reading.start()
            [worker] = engine.pool._workers
            await wait_until(lambda: not worker.in_flight)
            await asyncio.to_thread(install, python, wheels["2.0"])
            assert await plan.environment.look() is None
            await plan.environment.zygote()
            assert worker.zygote.is_retired
            ticks.clear()
            await wait_until(lambda: len(ticks) > 2)
            source.is_let.set()
            assert colours(await read_to_end(reading)) == {b"red"}
            await wait_until(lambda: worker.is_gone)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_changes_beside_the_distributions_starts_nothing_anew(wheels: dict[str, Path], tmp_path: Path) -> None:
    async def main() -> None:
        python = await asyncio.to_thread(make_environment, tmp_path / "env", wheels["1.0"])
        async with open_engine(tmp_path / "data", python) as engine:
            environment = engine.environments["tiny"]
            zygote = await environment.zygote()
            [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
            (packages / "__pycache__").mkdir(exist_ok=True)
            (packages / "mine.py").write_text("")
            assert await environment.look() == zygote.environment_id
            assert await environment.zygote() is zygote

    asyncio.run(asyncio.wait_for(main(), 60))


@asynccontextmanager
async def open_engine(data: Path, python: Path, *, workers: int = 1) -> AsyncIterator[Engine]:
    """Results kept, an environment `tiny`."""
    async with ResultStore.open_directory(
        data / "results", capacity=1 << 30, most=1000, scratch_seconds=600
    ) as results:
        settings = settings_for(workers=workers)
        async with Engine.open(settings, data, [EnvironmentSettings("tiny", python)], results=results) as engine:
            yield engine


async def register(engine: Engine, source: str) -> Version:
    request = msgspec.structs.replace(request_for(source, decoder=None), environment="tiny")
    info, _ = await engine.register(request, probe_with=None, progress=lambda _: None)
    return engine.versions.get(info.name, info.digest)


async def plan_for(engine: Engine, version: Version, shards: Path) -> tuple[Plan, FileSource]:
    await engine.environment_of(version).look()
    source = FileSource(shards / SHARD)
    return await engine.plan(version, source.meta, REF, Spec.parse(f"{version.label},seed=1")), source


async def read_to_end(reading: Reading) -> bytes:
    data = bytearray()
    try:
        while (part := await reading.next()) is not None:
            data += bytes_of(part)
    finally:
        reading.close()
    return bytes(data)


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_an_environment_that_is_closed_while_it_starts_leaves_no_process(tmp_path: Path) -> None:
    async def main() -> None:
        where = {"stage": stage(tmp_path / "stage"), "scratch": tmp_path}
        environment = Environment("it", Path(sys.executable), **where, load_seconds=20)
        starting = asyncio.ensure_future(environment.zygote())
        await wait_until(lambda: bool(children()))
        await environment.close()
        with pytest.raises(TransformFailed):
            await starting
        assert children() == set()
        with pytest.raises(TransformFailed, match="has been removed"):
            await environment.zygote()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_environments_end_altogether_though_whoever_closes_them_is_stopped(tmp_path: Path) -> None:
    """However often, and in whatever of them; a process that nobody knows any more would stay for good."""

    async def main(stops: int) -> None:
        staged = stage(tmp_path / f"stage-{stops}")
        packages = Packages(PackageSettings(), tmp_path / f"packages-{stops}", stage=staged)
        named = [(f"other-{number}", Path(sys.executable)) for number in range(3)]
        environments = Environments(named, packages, stage=staged, scratch=tmp_path / f"homes-{stops}", load_seconds=20)
        for environment in environments:
            await environment.zygote()
        assert len(children()) == 4
        closing = asyncio.ensure_future(environments.close())
        for _ in range(stops):
            await asyncio.sleep(0)
            closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert children() == set()

    for stops in (1, 2, 3):
        asyncio.run(asyncio.wait_for(main(stops), 60))


def test_a_pool_that_is_left_while_a_worker_loads_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Not even where the environment lives on."""

    async def main() -> None:
        staged = stage(tmp_path / "stage")
        environment = Environment("it", Path(sys.executable), stage=staged, scratch=tmp_path / "home", load_seconds=20)
        source = "import time\ntime.sleep(60)\n\ndef transform(sample):\n    return sample\n"
        request = check_request(request_for(source), 1 << 20)
        info = build_info(request, "it", None, digest=compute_digest(request), parts=[], locked=[])
        zygote = await environment.zygote()
        try:
            alone = children()
            async with WorkerPool(settings_for()) as pool:
                warming = asyncio.ensure_future(pool.warm(Version(info, request.code, False), environment))
                await wait_until(lambda: len(children()) > len(alone))
                warming.cancel()
                await asyncio.wait([warming])
            assert children() == alone
            assert zygote.workers == 0
            assert list(zygote.scratch.glob("worker-*")) == []
        finally:
            await environment.close()

    asyncio.run(asyncio.wait_for(main(), 60))
