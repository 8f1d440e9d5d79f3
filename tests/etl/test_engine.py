"""The engine with real zygotes and workers: bytes, order, seeds, failures, hostile functions, what is left behind."""

import asyncio
import io
import os
import random
import signal
import tarfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.errors import BadShard, EnvironmentUnfit, SampleOutOfRange, ShardmillError, TransformFailed
from shardmill.etl.engine import Engine
from tests.etl.support import (
    IDENTITY,
    REF,
    FileSource,
    bytes_of,
    children,
    members,
    open_engine,
    open_reading,
    read,
    register,
    request_for,
    wait_until,
    write_shard,
)

DRAWING = """
    import random
    import numpy as np

    def transform(sample):
        rng = np.random.default_rng()
        sample["txt"] = f"{random.random()} {np.random.rand()} {rng.random()}"
        return sample
"""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = [{"txt": f"sample {ordinal}".encode(), "cls": str(ordinal % 7).encode()} for ordinal in range(100)]
    return write_shard(tmp_path / "shard.tar", samples)


def test_untouched_samples_come_back_byte_for_byte_in_order(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            data = await read(engine, await register(engine, IDENTITY), shard)
            assert members(data) == members(shard.read_bytes())
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                assert {member.mtime for member in archive} == {1_700_000_000}
        assert not children()
        assert not (tmp_path / "data" / "scratch").exists()

    run(story())


def test_a_seed_decides_the_bytes_whatever_the_number_of_workers(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        results = []
        for workers in (1, 2, 2):
            async with open_engine(tmp_path / "data", workers=workers) as engine:
                version = await register(engine, DRAWING)
                results.append(await read(engine, version, shard, ",seed=1,epoch=1"))
                other = await read(engine, version, shard, ",seed=1,epoch=2")
                assert members(other)["0003.cls"] == b"3"
        assert results[0] == results[1] == results[2]
        assert other != results[0]
        texts = [value for name, value in members(results[0]).items() if name.endswith("txt")]
        assert len(set(texts)) == 100

    run(story())


def test_without_a_seed_each_read_draws_afresh(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, DRAWING)
            first, second = members(await read(engine, version, shard)), members(await read(engine, version, shard))
            assert all(first[name] != second[name] for name in first if name.endswith("txt"))

    run(story())


def test_start_and_count_are_the_same_samples_of_the_whole(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, DRAWING)
            whole = await read(engine, version, shard, ",seed=5")
            done = engine.statistics_of(version).samples
            tail = await read(engine, version, shard, ",seed=5,start=50")
            assert engine.statistics_of(version).samples == done + 50, "what lies before was transformed"
            some = members(await read(engine, version, shard, ",seed=5,start=10,count=3"))
            assert tail.rstrip(b"\0") == whole[
                -len(tail.rstrip(b"\0")) - (len(whole) - len(whole.rstrip(b"\0"))) :
            ].rstrip(b"\0")
            assert list(some) == ["0010.cls", "0010.txt", "0011.cls", "0011.txt", "0012.cls", "0012.txt"]
            assert all(members(whole)[name] == data for name, data in some.items())
            with pytest.raises(SampleOutOfRange):
                await read(engine, version, shard, ",start=101")
            assert members(await read(engine, version, shard, ",start=99,count=50")).keys() == {"0099.cls", "0099.txt"}

    run(story())


def test_in_place_edits_count_as_touched_and_kept_objects_do_not(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"a.json": b'{"x" :  1}', "b.json": b'{"x" :  1}'}])

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(
                engine, 'def transform(sample):\n    sample["b.json"]["x"] = 2\n    return sample\n'
            )
            found = members(await read(engine, version, shard))
            assert found["0000.a.json"] == b'{"x" :  1}'
            assert found["0000.b.json"].replace(b" ", b"") == b'{"x":2}'

    run(story())


def test_none_drops_and_an_iterable_fans_out(tmp_path: Path, shard: Path) -> None:
    code = """
        def transform(sample):
            number = int(sample["__key__"])
            if number % 2:
                return None
            return ({"txt": f"{number} {part}"} for part in range(3))
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            found = members(await read(engine, await register(engine, code), shard, ",count=4"))
            assert list(found) == [f"{key}-{part}.txt" for key in ("0000", "0002") for part in range(3)]
            assert found["0002-1.txt"] == b"2 1"

    run(story())


def test_a_fan_out_larger_than_the_arena_arrives_whole(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}, {"txt": b"y"}])
    code = """
        def transform(sample):
            for part in range(30):
                yield {"bin": bytes([part]) * 3_000_000}
            yield {"bin": b"big" * 10_000_000}
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            found = members(await read(engine, await register(engine, code), shard))
            assert len(found) == 62
            assert found["0001-7.bin"] == bytes([7]) * 3_000_000
            assert found["0000-30.bin"] == b"big" * 10_000_000

    run(story())


def test_an_infinite_generator_is_stopped_at_the_cap(tmp_path: Path, shard: Path) -> None:
    code = """
        def transform(sample):
            while True:
                yield {"bin": bytes(1_000_000)}
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data", max_sample=50 << 20) as engine:
            with pytest.raises(TransformFailed, match="max_sample"):
                await read(engine, await register(engine, code), shard, ",errors=skip:1")

    run(story())


def test_skip_drops_the_failing_sample_and_keeps_its_story(tmp_path: Path, shard: Path) -> None:
    code = """
        def transform(sample):
            if sample["__key__"] == "0007":
                raise ValueError("seven is not liked")
            return sample
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, code)
            found = members(await read(engine, version, shard, ",errors=skip:0.02", request_id="abc"))
            assert len(found) == 198
            assert "0007.txt" not in found
            failures = engine.failures.find(request="abc")
            assert failures.total == 1
            (failure,) = failures.failures
            assert (failure.sample, failure.ordinal, failure.object) == ("0007", 7, REF.key)
            assert failure.traceback is not None
            assert 'File "/home/user/transform.py", line 4, in transform' in failure.traceback
            assert "seven is not liked" in failure.traceback
            assert "shardmill" not in failure.traceback
        async with open_engine(tmp_path / "data") as engine:
            assert engine.failures.find(transform=version.info.name).total == 1

    run(story())


def test_a_function_that_always_raises_fails_before_the_first_byte(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, 'def transform(sample):\n    raise KeyError("nope")\n')
            for options in ("", ",errors=skip:1"):
                with pytest.raises(TransformFailed) as caught:
                    await read(engine, version, shard, options)
                assert caught.value.traceback is not None
                assert "KeyError" in caught.value.traceback

    run(story())


@pytest.mark.parametrize("length", [0, 100, 512, 700, 5000, 20_000])
def test_a_truncated_shard_never_ends_cleanly(tmp_path: Path, shard: Path, length: int) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[:length])

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, IDENTITY)
            with pytest.raises(BadShard):
                await read(engine, version, cut, ",errors=skip:1")

    run(story())


def test_killed_workers_change_nothing(tmp_path: Path, shard: Path) -> None:
    slow = DRAWING.replace("rng =", "import time; time.sleep(0.01); rng =")

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, slow)
            expected = await read(engine, version, shard, ",seed=3")
            killed: set[int] = set()
            data = b""
            async with open_reading(engine, version, shard, ",seed=3") as reading:
                while (part := await reading.next()) is not None:
                    data += bytes_of(part)
                    alive = [worker.pid for worker in engine.pool._workers if worker.in_flight and worker.pid]
                    if alive and len(killed) < 3 and len(data) > 20_000 * (len(killed) + 1):
                        killed.add(alive[0])
                        os.kill(alive[0], signal.SIGKILL)
            assert len(killed) == 3
            assert data == expected

    run(story())


HOSTILE = {
    "loops": ("while True: pass", "sample_timeout"),
    "sleeps": ("import time; time.sleep(1000)", "sample_timeout"),
    "exits": ("import os; os._exit(0)", "exited with status 0"),
    "raises SystemExit": ("raise SystemExit(3)", "SystemExit"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "prints": ("for _ in range(1000): print('x' * 10**6)", "max_print"),
    "closes descriptors": ("import os; os.closerange(0, 1024)", "worker process"),
    "leaks": ("global kept; kept = []\n    while True: kept.append(bytearray(50 << 20))", "memory limit"),
    "leaves a daemon": (
        "import os\n    if os.fork() == 0:\n        os.setsid()\n        import time; time.sleep(1000)\n    raise ValueError('left')",
        "left",
    ),
    "kills its group": ("import os; os.killpg(0, 9)", "SIGKILL"),
    "ignores signals": (
        "import signal, time\n    signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)",
        "sample_timeout",
    ),
    "raises hugely": ("raise ValueError('x' * 10**8)", "ValueError"),
    "returns nonsense": ("return 42", "int"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_function_fails_its_request_in_time_and_nothing_else(tmp_path: Path, shard: Path, what: str) -> None:
    body, message = HOSTILE[what]
    # On a busy machine what fails by itself may take its time: only what would go on for ever is to run into this limit.
    sample_timeout = 1 if message == "sample_timeout" else 60

    async def story() -> None:
        async with open_engine(tmp_path / "data", sample_timeout=sample_timeout, memory=500 << 20) as engine:
            good = await register(engine, IDENTITY, name="good")
            expected = await read(engine, good, shard)
            bad = await register(engine, f"def transform(sample):\n    {body}\n    return sample\n", name="bad")
            # Two tries, and far less than the functions would take.
            async with asyncio.timeout(30):
                with pytest.raises(TransformFailed, match=message):
                    await read(engine, bad, shard)
            assert await read(engine, good, shard) == expected

            def only_zygotes_are_left() -> bool:
                # A second worker may still have been starting when the first one answered.
                engine.pool.retire(bad.key)
                engine.pool.retire(good.key)
                return len(children()) <= len(list(engine.environments))

            await wait_until(only_zygotes_are_left)
            await wait_until(lambda: not list((tmp_path / "data" / "scratch").glob("worker-*")))
        assert not children()

    run(story())


def test_a_worker_has_no_network_no_secrets_and_its_own_home(tmp_path: Path, shard: Path) -> None:
    code = """
        import os, socket, subprocess

        def transform(sample):
            try:
                socket.create_connection(("127.0.0.1", 9), timeout=1)
                net = "reached"
            except ConnectionRefusedError:
                net = "reached"
            except OSError as error:
                net = type(error).__name__
            curl = subprocess.run(["python3", "-c", "import socket; socket.socket()"], capture_output=True).returncode
            secret = os.environ.get("SHARDMILL_TEST_SECRET", "none")
            return {"txt": f"{net} {curl != 0} {secret} {os.getsid(0) == os.getpid()} {os.path.samefile(os.environ['HOME'], '.')}"}
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            found = members(await read(engine, await register(engine, code), shard, ",count=1"))
            assert found["0000.txt"] == b"PermissionError True none True True"
            assert engine.pool.layers["network"]
            assert engine.pool.layers["no_new_privileges"]

    os.environ["SHARDMILL_TEST_SECRET"] = "hunter2"
    try:
        run(story())
    finally:
        del os.environ["SHARDMILL_TEST_SECRET"]


def test_a_reader_who_leaves_frees_everything(tmp_path: Path, shard: Path) -> None:
    code = "import time\ndef transform(sample):\n    time.sleep(0.2)\n    return sample\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, code)
            before = set(os.listdir("/proc/self/fd"))
            async with open_reading(engine, version, shard) as reading:
                await reading.start()
            await wait_until(lambda: all(not worker.in_flight for worker in engine.pool._workers), 10.0)
            engine.pool.retire(version.key)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= len(before), 10.0)
            assert engine.runs.going_on == 0

    run(story())


def test_memory_ahead_of_a_stalled_reader_is_bounded(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}] * 400)
    code = 'def transform(sample):\n    return {"bin": bytes(600_000)}\n'

    async def story() -> None:
        async with open_engine(tmp_path / "data", run_window=8 << 20) as engine:
            version = await register(engine, code)
            async with open_reading(engine, version, shard) as reading:
                await reading.start()
                state = reading.running.run.state
                previous = -1
                while state.outstanding != previous:
                    previous = state.outstanding
                    await asyncio.sleep(0.3)
                assert 4 << 20 < previous < 12 << 20
                total = 0
                while (part := await reading.next()) is not None:
                    total += len(bytes_of(part))
                assert total > 400 * 600_000

    run(story())


def test_two_versions_share_the_lanes(tmp_path: Path, shard: Path) -> None:
    code = "import time\ndef transform(sample):\n    time.sleep(0.01)\n    sample['txt'] = {!r}\n    return sample\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1) as engine:
            one = await register(engine, code.format("one"), name="one")
            two = await register(engine, code.format("two"), name="two")
            finished: list[str] = []

            async def go(version: Any, options: str) -> None:
                data = await read(engine, version, shard, options)
                assert members(data)["0001.txt"].decode() == version.info.name
                finished.append(version.info.name)

            await asyncio.gather(go(one, ""), go(two, ",count=10"))
            assert finished == ["two", "one"]

    run(story())


def test_a_registration_survives_a_restart_and_its_code_stays(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, DRAWING)
            expected = await read(engine, version, shard, ",seed=1")
        async with open_engine(tmp_path / "data") as engine:
            again = engine.versions.get("t", version.info.digest[:12])
            assert again == version
            assert await read(engine, again, shard, ",seed=1") == expected
            changed = await register(engine, DRAWING.replace("rng.random()", "rng.random() + 1"))
            assert changed.info.digest != version.info.digest
            assert engine.versions.get("t").info.digest == changed.info.digest
            assert await read(engine, again, shard, ",seed=1") == expected
            _, is_new = await engine.register(request_for(DRAWING), probe_with=None, progress=lambda _: None)
            assert not is_new
            assert engine.versions.get("t").info.digest == version.info.digest

    run(story())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_xyz\ndef transform(s): return s", "no_such_module_xyz"),
        ("def other(s): return s", "transform"),
        ("transform = 5", "not callable"),
        ("def transform(:", "SyntaxError"),
        ("import os\nos._exit(3)\ndef transform(s): return s", "closed|exited|worker"),
    ],
)
def test_code_that_cannot_be_loaded_is_refused_at_registration(tmp_path: Path, source: str, message: str) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data", load_timeout=3) as engine:
            with pytest.raises(TransformFailed, match=message):
                await register(engine, source)
            assert not engine.versions.list()

    run(story())


def test_a_garbage_pickle_is_refused(tmp_path: Path) -> None:
    import msgspec

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            for payload in (b"\x80\x05garbage", b"<html>", b"\x80\x04]q\x00("):
                request = request_for(IDENTITY)
                code = msgspec.structs.replace(request.code, encoding="cloudpickle", payload=payload)
                with pytest.raises(TransformFailed, match="cannot be loaded"):
                    await engine.register(
                        msgspec.structs.replace(request, code=code), probe_with=None, progress=lambda _: None
                    )

    run(story())


def test_no_environment_that_fits_names_both_versions(tmp_path: Path) -> None:
    import msgspec

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            request = request_for(IDENTITY)
            other = msgspec.structs.replace(request, code=msgspec.structs.replace(request.code, python="2.7"))
            with pytest.raises(EnvironmentUnfit, match=r"Python 2\.7.*--env"):
                await engine.register(other, probe_with=None, progress=lambda _: None)
            missing = msgspec.structs.replace(
                request, code=msgspec.structs.replace(request.code, modules=["no_such_module_xyz"])
            )
            with pytest.raises(EnvironmentUnfit, match="no_such_module_xyz not installed"):
                await engine.register(missing, probe_with=None, progress=lambda _: None)

    run(story())


async def probe(engine: Engine, source: str, shard: Path) -> Any:
    opened = FileSource(shard)
    try:
        info, _ = await engine.register(request_for(source), probe_with=(opened, str(REF)), progress=lambda _: None)
    finally:
        opened.close()
    return info.probe


def test_a_probe_tells_whether_a_function_draws_and_is_reproducible(tmp_path: Path, shard: Path) -> None:
    entropy = "import os\ndef transform(sample):\n    sample['txt'] = os.urandom(8).hex()\n    return sample\n"
    counting = (
        "n = 0\ndef transform(sample):\n    global n\n    n += 1\n    sample['txt'] = str(n)\n    return sample\n"
    )

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            still = await probe(engine, IDENTITY, shard)
            assert (still.deterministic, still.reproducible, still.samples) == (True, True, 4)
            drawing = await probe(engine, DRAWING, shard)
            assert (drawing.deterministic, drawing.reproducible) == (False, True)
            for source in (entropy, counting):
                report = await probe(engine, source, shard)
                assert not report.reproducible
            with pytest.raises(TransformFailed, match="boom") as caught:
                await probe(engine, "def transform(sample):\n    raise ValueError('boom')\n", shard)
            assert caught.value.traceback is not None
            assert 'transform.py", line 2' in caught.value.traceback

    run(story())


def test_a_killed_zygote_is_replaced(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register(engine, DRAWING)
            expected = await read(engine, version, shard, ",seed=1")
            zygote = await engine.environments["default"].zygote()
            os.kill(zygote.about["pid"], signal.SIGKILL)
            await wait_until(lambda: not engine.pool._workers)
            assert await read(engine, version, shard, ",seed=1") == expected

    run(story())


def test_more_runs_than_allowed_are_busy(tmp_path: Path, shard: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data", max_runs=1) as engine:
            version = await register(engine, IDENTITY)
            async with open_reading(engine, version, shard):
                with pytest.raises(ShardmillError) as caught:
                    await read(engine, version, shard)
                assert caught.value.status == 503
                assert caught.value.retry_after

    run(story())


def test_random_reads_of_random_shards_agree_with_doing_it_inline(tmp_path: Path) -> None:
    """Sizes from nothing to larger than a window's share, decoded and encoded, against plain Python."""
    order = random.Random(7)
    samples = [{"txt": os.urandom(order.choice([0, 1, 511, 512, 513, 70_000])).hex().encode()} for _ in range(60)]
    shard = write_shard(tmp_path / "s.tar", samples)
    code = "def transform(sample):\n    sample['txt'] = sample['txt'][::-1]\n    sample['n.json'] = len(sample['txt'])\n    return sample\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data", run_window=200_000) as engine:
            found = members(await read(engine, await register(engine, code), shard))
            for ordinal, sample in enumerate(samples):
                assert found[f"{ordinal:04d}.txt"] == sample["txt"][::-1]
                assert found[f"{ordinal:04d}.n.json"] == str(len(sample["txt"])).encode()

    run(story())
