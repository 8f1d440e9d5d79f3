"""Functions that follow one another in one worker: the same promises as for one, whichever of them breaks its part."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.api import Kind
from shardmill.core.errors import ShardmillError, TransformFailed
from shardmill.etl.engine import Engine
from shardmill.etl.versions.pipelines import build_pipeline
from shardmill.etl.versions.registry import Version
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.etl.support import (
    bytes_of,
    children,
    members,
    object_request,
    open_engine,
    open_reading,
    read,
    register_request,
    request_for,
    wait_until,
    write_shard,
)

KINDS: tuple[Kind, ...] = ("sample", "bytes")
SAMPLES = 30
GOOD = {
    "sample": "    import random\n    x['txt'] = x['txt'] + f' {random.random()}' * 500\n    return x\n",
    "bytes": "    return x[::-1]\n",
}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s.tar", [{"txt": b"%d" % number} for number in range(SAMPLES)])


async def follow(engine: Engine, kind: Kind, *bodies: str) -> Version:
    """Register functions of these bodies, which take `x`, and what they are one after the other."""
    parts = []
    for body in bodies:
        code = f"def transform(x):\n{body}"
        request = request_for(code) if kind == "sample" else object_request(code, kind)
        parts.append(await register_request(engine, request))
    # Each was loaded by a worker, which would be kept for it.
    for part in parts:
        engine.pool.retire(part.key)
    info, _ = await engine.register(build_pipeline("both", parts, None), probe_with=None, progress=lambda _: None)
    return engine.versions.get(info.name, info.digest)


async def follow_bad(engine: Engine, kind: Kind, position: int, bad: str) -> Version:
    """Two functions, of which the one at `position` has this body."""
    bodies = [GOOD[kind], GOOD[kind]]
    bodies[position] = bad
    return await follow(engine, kind, *bodies)


async def read_until_cut(engine: Engine, version: Version, shard: Path, options: str = "") -> tuple[bytes, str]:
    """What came, and why no more did."""
    data = bytearray()
    with pytest.raises(ShardmillError) as caught:
        async with open_reading(engine, version, shard, options) as reading:
            await reading.start()
            while (part := await reading.next()) is not None:
                data += bytes_of(part)
    return bytes(data), caught.value.message


def busy(engine: Engine) -> list[int]:
    return [worker.pid for worker in engine.pool._workers if worker.in_flight and worker.pid]


def test_what_one_gives_the_next_takes_as_it_is_in_the_same_process(tmp_path: Path, shard: Path) -> None:
    first = "    import os\n    x['mine'] = (os.getpid(), lambda: 'kept')\n    return x\n"
    second = (
        "    import os\n    pid, say = x.pop('mine')\n    x['txt'] = f'{pid == os.getpid()} {say()}'\n    return x\n"
    )

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await follow(engine, "sample", first, second)
            assert set(members(await read(engine, version, shard)).values()) == {b"True kept"}
            assert engine.statistics_of(version).samples == SAMPLES

    run(story())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_killed_before_the_first_byte_is_replaced(
    tmp_path: Path, shard: Path, kind: Kind, position: int
) -> None:
    """The first worker waits for what comes only when it is dead."""
    mark = tmp_path / "mark"
    wait = f"    import os, time\n    while not os.path.exists({str(mark)!r}):\n        time.sleep(0.01)\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1) as engine:
            expected = await read(engine, await follow(engine, kind, GOOD[kind], GOOD[kind]), shard, seed=1)
            version = await follow_bad(engine, kind, position, wait + GOOD[kind])
            reading = asyncio.create_task(read(engine, version, shard, seed=1))
            await wait_until(lambda: len(busy(engine)) == 1)
            (pid,) = busy(engine)
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: busy(engine) not in ([], [pid]))
            mark.touch()
            assert await reading == expected
            assert engine.failures.find(transform=version.label).total == 0

    run(story())


def test_workers_killed_midway_change_nothing(tmp_path: Path, shard: Path) -> None:
    slow = "    import time\n    time.sleep(0.01)\n" + GOOD["sample"]

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await follow(engine, "sample", slow, slow)
            expected = await read(engine, version, shard, seed=3)
            killed: set[int] = set()
            data = b""
            async with open_reading(engine, version, shard, seed=3) as reading:
                while (part := await reading.next()) is not None:
                    data += bytes_of(part)
                    alive = [pid for pid in busy(engine) if pid not in killed]
                    if alive and len(killed) < 2 and len(data) > 20_000 * (len(killed) + 1):
                        killed.add(alive[0])
                        os.kill(alive[0], signal.SIGKILL)
            assert len(killed) == 2
            assert data == expected

    run(story())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_hangs_is_stopped_in_time(tmp_path: Path, shard: Path, kind: Kind, position: int) -> None:
    hang = "    import time\n    time.sleep(1000)\n"
    if kind == "sample":
        hang = "    import time\n    if x['__key__'] == '0020':\n        time.sleep(1000)\n" + GOOD[kind]
    setting = "sample_timeout" if kind == "sample" else "object_timeout"

    async def story() -> None:
        async with open_engine(tmp_path / "data", **{setting: 1}) as engine:
            version = await follow_bad(engine, kind, position, hang)
            data, message = await read_until_cut(engine, version, shard)
            assert setting in message
            assert bool(data) is (kind == "sample")
            assert not tarfile_is_content(data)
            assert not gnu_tar_is_content(data)
            # The other one only waits for work.
            engine.pool.retire(version.key)
            await wait_until(lambda: len(children()) <= 1)

    run(story())


def test_output_without_end_of_the_first_ends_though_the_second_drops_it(tmp_path: Path, shard: Path) -> None:
    endless = "    while True:\n        yield {'txt': 'more'}\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data", sample_timeout=1) as engine:
            version = await follow(engine, "sample", endless, "    return None\n")
            data, message = await read_until_cut(engine, version, shard, ",errors=skip:1")
            assert data == b""
            assert "sample_timeout" in message

    run(story())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_output_without_end_is_stopped_at_the_cap(tmp_path: Path, shard: Path, kind: Kind, position: int) -> None:
    bad = "    return bytes(30 << 20)\n"
    if kind == "sample":
        bad = "    while True:\n        yield {'txt': 'x' * 1_000_000}\n"
    setting = "max_sample" if kind == "sample" else "max_object_output"

    async def story() -> None:
        async with open_engine(tmp_path / "data", **{setting: 20 << 20}) as engine:
            version = await follow_bad(engine, kind, position, bad)
            data, message = await read_until_cut(engine, version, shard)
            assert setting in message
            assert len(data) < 20 << 20
            assert engine.failures.find(transform=version.label).total == 1
            assert len(await read(engine, await follow(engine, kind, GOOD[kind], GOOD[kind]), shard))

    run(story())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_who_leaves_ends_every_process(tmp_path: Path, shard: Path, kind: Kind, position: int) -> None:
    start = "import subprocess; subprocess.run(['sh', '-c', \"setsid sh -c 'sleep 1000' & sh -c 'sleep 1000; true'\"])"
    bad = f"    if isinstance(x, bytes) or x['__key__'] == '0020':\n        {start}\n{GOOD[kind]}"

    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1) as engine:
            version = await follow_bad(engine, kind, position, bad)
            engine.pool.retire(version.key)
            await wait_until(lambda: len(children()) == 1)
            before = set(os.listdir("/proc/self/fd"))
            async with open_reading(engine, version, shard) as reading:
                if kind == "sample":
                    await reading.start()
                await wait_until(lambda: len(children()) >= 5)
            await wait_until(lambda: len(children()) == 1)
            await wait_until(lambda: set(os.listdir("/proc/self/fd")) <= before)
            await wait_until(lambda: not list((tmp_path / "data" / "scratch").glob("worker-*")))
            assert engine.runs.going_on == 0

    run(story())


@pytest.mark.parametrize("position", [0, 1])
def test_a_failure_midway_cuts_where_no_reader_takes_it_for_whole(tmp_path: Path, shard: Path, position: int) -> None:
    bad = "    if x['__key__'] == '0020':\n        raise ValueError('twenty')\n" + GOOD["sample"]

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await follow_bad(engine, "sample", position, bad)
            data, message = await read_until_cut(engine, version, shard)
            assert "twenty" in message
            assert data
            assert not tarfile_is_content(data)
            assert not gnu_tar_is_content(data)
            found = members(await read(engine, version, shard, ",errors=skip:0.1"))
            assert len(found) == SAMPLES - 1
            with pytest.raises(TransformFailed, match="twenty"):
                await read(engine, version, shard, ",start=20,count=1")

    run(story())
