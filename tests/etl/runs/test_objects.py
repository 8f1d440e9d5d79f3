"""Functions and commands over whole objects: their bytes, their failures, and the same promises as for samples."""

import asyncio
import contextlib
import gzip
import io
import os
import random
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardmill.core.api import Kind, TransformRequest
from shardmill.core.errors import BadRequest, ShardmillError, TransformFailed
from shardmill.etl.engine import Engine
from shardmill.etl.runs.holding import HOLD
from shardmill.etl.runs.running import Finished, Reading
from shardmill.etl.versions.registry import Version
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.etl.runs.test_registry import open_parts, plan_for
from tests.etl.support import (
    IDENTITY,
    REF,
    FileSource,
    bytes_of,
    children,
    command_request,
    members,
    object_request,
    open_engine,
    open_reading,
    read,
    register,
    register_request,
    settings_for,
    wait_until,
    write_shard,
)

WHOLE: tuple[Kind, ...] = ("bytes", "stream", "command")


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file whose half can be compressed."""
    path = tmp_path / "s.bin"
    path.write_bytes(random.Random(5).randbytes(1_500_000) + b"shardmill" * 200_000)
    return path


def same_of(kind: Kind) -> TransformRequest:
    """Gives the object as it is."""
    match kind:
        case "bytes":
            return object_request("def transform(data):\n    return data\n")
        case "stream":
            code = "import shutil\ndef transform(reader, writer):\n    shutil.copyfileobj(reader, writer, 100_000)\n"
            return object_request(code, "stream")
        case _:
            return command_request(["cat"])


def gives(kind: Kind, megabytes: int, then: str) -> TransformRequest:
    """Gives so many MiB of noughts and then does something: `raise`, `hang`, `exit`, `succeed`."""
    endings = {"raise": "raise ValueError('enough')", "hang": "time.sleep(1000)", "exit": "os._exit(3)", "succeed": ""}
    if kind == "stream":
        code = f"""
            import os, time
            def transform(reader, writer):
                for _ in range({megabytes}):
                    writer.write(b"0" * (1 << 20))
                writer.flush()
                {endings[then]}
        """
        return object_request(code, "stream")
    commands = {"raise": "echo enough >&2; exit 3", "hang": "sleep 1000", "exit": "kill -9 $$", "succeed": ""}
    return command_request(["sh", "-c", f"head -c {megabytes << 20} /dev/zero | tr '\\0' 0; {commands[then]}"])


async def read_until_cut(engine: Engine, version: Version, file: Path, options: str = "") -> tuple[bytes, str]:
    """What came, and why no more did."""
    data = bytearray()
    with pytest.raises(ShardmillError) as caught:
        async with open_reading(engine, version, file, options) as reading:
            await reading.start()
            while (part := await reading.next()) is not None:
                data += bytes_of(part)
    return bytes(data), caught.value.message


@pytest.mark.parametrize("size", [0, 1, 511, 3_000_001])
@pytest.mark.parametrize("kind", WHOLE)
def test_an_object_passes_through_byte_for_byte(tmp_path: Path, kind: Kind, size: int) -> None:
    file = tmp_path / "x"
    file.write_bytes(random.Random(size).randbytes(size))

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, same_of(kind))
            assert version.info.kind == kind
            for _ in range(2):
                assert await read(engine, version, file) == file.read_bytes()
            totals = engine.statistics_of(version)
            assert (totals.runs, totals.samples, totals.bytes_in, totals.bytes_out) == (2, 2, 2 * size, 2 * size)
        assert not children()

    run(story())


def test_a_command_gives_what_it_gives_in_a_shell(tmp_path: Path, source: Path) -> None:
    expected = subprocess.run(["gzip", "-nc"], input=source.read_bytes(), capture_output=True, check=True).stdout

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            assert (
                await read(engine, await register_request(engine, command_request(["gzip", "-nc"])), source) == expected
            )

    run(story())


def test_no_path_of_the_node_is_in_what_a_command_says(tmp_path: Path, source: Path) -> None:
    script = "echo $1 $HOME/x $TMPDIR $PWD/y >&2; exit 1"

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            argv = ["sh", "-c", script, "sh", "{path}"]
            version = await register_request(engine, command_request(argv))
            with pytest.raises(TransformFailed) as caught:
                await read(engine, version, source)
            (failure,) = engine.failures.find(transform=version.label).failures
            for text in (caught.value.message, failure.output or ""):
                assert "shard-000000.tar x" in text
                assert str(tmp_path) not in text
                assert "worker-" not in text

    run(story())


def test_a_stream_is_read_and_given_while_it_goes_on(tmp_path: Path, source: Path) -> None:
    """Its first output is here while it waits for what only happens afterwards."""
    go_on = tmp_path / "go-on"
    code = f"""
        import os, time
        def transform(reader, writer):
            reader.seek(-9, 2)
            assert reader.read() == b"shardmill"
            reader.seek(0)
            assert reader.name == {REF.key!r}
            writer.write(reader.read(600_000))
            writer.flush()
            while not os.path.exists({str(go_on)!r}):
                time.sleep(0.01)
            writer.write(reader.read())
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, object_request(code, "stream"))
            data = bytearray()
            async with open_reading(engine, version, source) as reading:
                await reading.start()
                while (part := await reading.next()) is not None:
                    data += bytes_of(part)
                    go_on.touch()
            assert bytes(data) == source.read_bytes()

    run(story())


def test_a_function_gets_its_arguments_and_the_name_of_its_object(tmp_path: Path, source: Path) -> None:
    codes: dict[Kind, str] = {
        "bytes": "def transform(data, ref, text='none'):\n    return f'{len(data)} {ref} {text}'.encode()\n",
        "stream": "def transform(reader, writer, *, text='none', ref=None):\n"
        "    writer.write(f'{len(reader.read())} {ref} {text}'.encode())\n",
    }

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            for kind, code in codes.items():
                plain = await register_request(engine, object_request(code, kind))
                told = await register_request(engine, object_request(code, kind, args={"text": "a b"}))
                named = await register_request(engine, object_request(code, kind, args={"ref": "mine"}))
                assert len({plain.info.uuid, told.info.uuid, named.info.uuid}) == 3
                size = source.stat().st_size
                assert (await read(engine, plain, source)).decode() == f"{size} {REF} none"
                assert (await read(engine, told, source)).decode() == f"{size} {REF} a b"
                assert (await read(engine, named, source)).decode() == f"{size} mine none"

    run(story())


def test_a_commands_placeholders_are_filled(tmp_path: Path, source: Path) -> None:
    argv = ["printf", "%s|", "{name}", "{key}", "{size}x{size}", "{flag}", "{{name}}", "{ print }", "{path}"]

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, command_request(argv, args={"size": 64, "flag": True}))
            name, key, size, flag, literal, braces, path, end = (
                (await read(engine, version, source)).decode().split("|")
            )
            assert (name, key, size, flag) == ("shard-000000.tar", REF.key, "64x64", "true")
            assert (literal, braces, end) == ("{name}", "{ print }", "")
            assert path.endswith("/shard-000000.tar")

    run(story())


@pytest.mark.parametrize("trailing", [0, 1000], ids=["a file of its own", "a file with more in it"])
def test_a_file_stands_under_its_own_name_and_cannot_be_changed(tmp_path: Path, source: Path, trailing: int) -> None:
    code = """
        import os, subprocess
        def transform(path):
            assert os.path.getsize(path) == int(os.environ.get("SIZE", os.path.getsize(path)))
            listed = subprocess.run(["cat", path], capture_output=True, check=True).stdout
            with open(path, "rb") as file:
                data = file.read()
            assert listed == data
            return os.path.basename(path).encode() + b"|" + data
    """
    whole = source.read_bytes()
    size = len(whole) - trailing

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, object_request(code, by_path=True))
            opened = FileSource(source)
            opened.meta = opened.meta.__class__(REF.key, size, "etag", "v1", 0.0)
            from shardmill.core.specs import Spec

            plan = await engine.plan(version, opened.meta, REF, Spec.parse(version.info.uuid))
            reading = await engine.runs.open(plan, opened, request_id="r")
            assert isinstance(reading, Reading)
            data = bytearray()
            try:
                await reading.start()
                while (part := await reading.next()) is not None:
                    data += bytes_of(part)
            finally:
                reading.close()
            assert bytes(data) == b"shard-000000.tar|" + whole[:size]
            assert source.read_bytes() == whole
            assert not list((tmp_path / "data" / "scratch").glob("worker-*/object-*"))

    run(story())


@pytest.mark.parametrize(
    ("argv", "gives"),
    [
        (["printf", "{name}"], None),
        (["printf", "%s", "{key}"], None),
        (["printf", "--", "{name}"], "--version"),
        (["printf", "%s", "of={name}"], "of=--version"),
    ],
)
def test_the_name_of_an_object_is_no_option_of_a_command(
    tmp_path: Path, source: Path, argv: list[str], gives: str | None
) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, command_request(argv))
            plan, file = await plan_for(engine, version, source, ",seed=1")
            file.meta = msgspec.structs.replace(file.meta, key="--version")
            reading = await engine.runs.open(plan, file, request_id="r")
            if gives is not None:
                assert await _read_all(reading) == gives.encode()
                return
            with pytest.raises(TransformFailed, match=r"begins with '-'.*give the command '--' before"):
                await _read_all(reading)

    run(story())


def test_a_seed_decides_what_a_whole_object_draws(tmp_path: Path, source: Path) -> None:
    drawing = "import random\ndef transform(data):\n    return random.randbytes(40)\n"

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            for request in (
                object_request(drawing),
                object_request(
                    "import numpy as np\ndef transform(r, w):\n    w.write(np.random.bytes(40))\n", "stream"
                ),
                command_request(["echo", "{seed}"]),
            ):
                version = await register_request(engine, request)
                first = await read(engine, version, source, ",seed=1")
                assert await read(engine, version, source, ",seed=1") == first
                assert await read(engine, version, source, ",seed=2") != first
                assert await read(engine, version, source, ",seed=1,epoch=1") != first
                assert await read(engine, version, source) != await read(engine, version, source)

    run(story())


@pytest.mark.parametrize("options", [",start=1", ",count=1", ",errors=skip:0.1"])
@pytest.mark.parametrize("kind", WHOLE)
def test_options_about_samples_are_refused(tmp_path: Path, source: Path, kind: Kind, options: str) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, same_of(kind))
            with pytest.raises(BadRequest, match=f"{kind!r} and has no samples; leave out {options[1:6].strip('=')}"):
                await read(engine, version, source, options)

    run(story())


FAILING = {
    "raises": (object_request("def transform(data):\n    raise KeyError('nope')\n"), "KeyError: 'nope'"),
    "raises in a stream": (object_request("def transform(r, w):\n    raise KeyError('nope')\n", "stream"), "KeyError"),
    "exits": (object_request("def transform(data):\n    raise SystemExit(0)\n"), "SystemExit"),
    "returns text": (object_request("def transform(data):\n    return 'text'\n"), "returned str; return the output"),
    "returns from a stream": (
        object_request("def transform(r, w):\n    return b'x'\n", "stream"),
        "returned bytes; write the output",
    ),
    "writes text": (object_request("def transform(r, w):\n    w.write('x')\n", "stream"), "TypeError"),
    "exits with a status": (command_request(["sh", "-c", "echo one >&2; echo two >&2; exit 7"]), "status 7: two"),
    "dies": (command_request(["sh", "-c", "kill -SEGV $$"]), "sh was killed by SIGSEGV: it wrote nothing"),
    "reads what it cannot": (command_request(["gzip", "-dc"]), "gzip exited with status 1: gzip: stdin: not in gzip"),
    "fails behind its output": (command_request(["sh", "-c", "cat; exit 1"]), "sh exited with status 1"),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failure_is_told_before_the_first_byte_and_kept(tmp_path: Path, what: str) -> None:
    request, message = FAILING[what]
    file = tmp_path / "small"
    file.write_bytes(b"x" * 1000)

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, request)
            with pytest.raises(TransformFailed, match=message) as caught:
                await read(engine, version, file, request_id="abc")
            (failure,) = engine.failures.find(request="abc").failures
            assert failure.message == caught.value.message
            assert (failure.sample, failure.ordinal, failure.object, failure.ended_run) == (None, None, REF.key, True)
            if request.kind != "command":
                assert (caught.value.traceback is not None) == ("returned" not in message)
                assert "shardmill" not in (caught.value.traceback or "").replace(str(REF), "")
            else:
                assert (failure.output or "it wrote nothing").splitlines()[-1] in failure.message
            assert engine.statistics_of(version).failures == 1

    run(story())


def test_all_that_a_command_wrote_last_is_kept_with_its_failure(tmp_path: Path, source: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            command = "i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1"
            version = await register_request(engine, command_request(["sh", "-c", command]))
            with pytest.raises(TransformFailed, match="line 2999"):
                await read(engine, version, source)
            (failure,) = engine.failures.find(transform=version.label).failures
            assert failure.output is not None
            assert failure.output.endswith("line 2998\nline 2999")
            assert 10_000 < len(failure.output) <= 16 << 10

    run(story())


@pytest.mark.parametrize("kind", ["stream", "command"])
@pytest.mark.parametrize("then", ["raise", "exit"])
def test_a_failure_behind_the_first_bytes_holds_back_the_newest(
    tmp_path: Path, source: Path, kind: Kind, then: str
) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, gives(kind, 3, then))
            data, message = await read_until_cut(engine, version, source)
            # The end of the output might be all that the reader could know it by.
            assert 0 < len(data) <= (3 << 20) - HOLD
            assert len(data) % 2
            assert set(data) == {ord("0")}
            assert "enough" in message or "exited with status 3" in message or "SIGKILL" in message
            assert engine.failures.find(transform=version.label).total == 1

    run(story())


@pytest.mark.parametrize("kind", WHOLE)
def test_what_hangs_is_stopped_in_time(tmp_path: Path, source: Path, kind: Kind) -> None:
    requests = {
        "bytes": object_request("import time\ndef transform(data):\n    time.sleep(1000)\n"),
        "stream": gives("stream", 1, "hang"),
        "command": gives("command", 1, "hang"),
    }

    async def story() -> None:
        async with open_engine(tmp_path / "data", object_timeout=1) as engine:
            version = await register_request(engine, requests[kind])
            _, message = await read_until_cut(engine, version, source)
            assert "object_timeout" in message
            await wait_until(lambda: len(children()) <= 1)
        assert not children()

    run(story())


INFINITE = {
    "stream": object_request("def transform(r, w):\n    while True:\n        w.write(bytes(100_000))\n", "stream"),
    "command": command_request(["cat", "/dev/zero"]),
    "bytes": object_request("def transform(data):\n    return bytes(30 << 20)\n"),
}


@pytest.mark.parametrize("kind", INFINITE)
def test_output_without_end_is_stopped_at_the_cap(tmp_path: Path, source: Path, kind: str) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data", max_object_output=20 << 20) as engine:
            version = await register_request(engine, INFINITE[kind])
            data, message = await read_until_cut(engine, version, source)
            assert "max_object_output" in message
            assert 10 << 20 < len(data) < 20 << 20
            await wait_until(lambda: len(children()) <= 1)

    run(story())


@pytest.mark.parametrize("kind", ["stream", "command"])
def test_memory_behind_a_stalled_reader_is_bounded_and_it_holds_up_nobody(
    tmp_path: Path, source: Path, kind: str
) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1, object_timeout=5, run_window=6 << 20) as engine:
            version = await register_request(engine, gives("stream" if kind == "stream" else "command", 60, "succeed"))
            same = await register_request(engine, same_of("bytes"))
            async with open_reading(engine, version, source) as reading:
                await reading.start()
                running = reading.running.run
                await wait_until(lambda: any(worker.is_parked for worker in engine.pool._workers))
                framed = running.state.framed
                # What is held back of each piece is a copy.
                assert running.state.outstanding <= 2 * (6 << 20)
                # The node's only lane is free for others, and time that is waited is not work.
                assert await read(engine, same, source) == source.read_bytes()
                worked = running._worked
                await asyncio.sleep(1.0)
                # Nothing but what was on its way when it was parked.
                assert running.state.framed <= framed + (1 << 20)
                assert running._worked - worked < 0.9
                total = 0
                while (part := await reading.next()) is not None:
                    total += len(bytes_of(part))
                assert total == 60 << 20

    run(story())


@pytest.mark.parametrize("kind", WHOLE)
def test_a_reader_who_leaves_ends_every_process(tmp_path: Path, source: Path, kind: Kind) -> None:
    session = "setsid sh -c 'sleep 1000' & sh -c 'sleep 1000; true'"
    requests = {
        "bytes": object_request(
            f"import subprocess\ndef transform(data):\n    subprocess.run(['sh', '-c', {session!r}])\n"
        ),
        "stream": gives("stream", 2, "hang"),
        "command": command_request(["sh", "-c", f"head -c 2000000 /dev/zero | tr '\\0' 0; {session}"]),
    }

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, requests[kind])
            engine.pool.retire(version.key)
            await wait_until(lambda: len(children()) == 1)
            before = set(os.listdir("/proc/self/fd"))
            async with open_reading(engine, version, source) as reading:
                if kind != "bytes":
                    await reading.start()
                await wait_until(lambda: len(children()) >= (2 if kind == "stream" else 5))
            started = time.monotonic()
            await wait_until(lambda: len(children()) == 1)
            assert time.monotonic() - started < 3
            await wait_until(lambda: set(os.listdir("/proc/self/fd")) <= before)
            await wait_until(lambda: not list((tmp_path / "data" / "scratch").glob("worker-*")))
            assert engine.runs.going_on == 0

    run(story())


@pytest.mark.parametrize("kind", WHOLE)
def test_a_worker_killed_before_the_first_byte_is_replaced(tmp_path: Path, source: Path, kind: Kind) -> None:
    """The first worker waits for what comes only when it is dead."""
    mark = tmp_path / "mark"
    functions: dict[Kind, str] = {
        "bytes": f"""
        import os, time
        def transform(data):
            while not os.path.exists({str(mark)!r}):
                time.sleep(0.01)
            return data
        """,
        "stream": f"""
        import os, time
        def transform(reader, writer):
            writer.write(reader.read(1000))
            writer.flush()
            while not os.path.exists({str(mark)!r}):
                time.sleep(0.01)
            writer.write(reader.read())
        """,
    }
    shell = f"head -c 0; while ! [ -e {mark} ]; do sleep 0.01; done; exec cat"
    request = object_request(functions[kind], kind) if kind in functions else command_request(["sh", "-c", shell])

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, request)
            reading = asyncio.create_task(read(engine, version, source))

            def busy() -> list[int]:
                return [worker.pid for worker in engine.pool._workers if worker.in_flight and worker.pid]

            await wait_until(lambda: len(busy()) == 1)
            (pid,) = busy()
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: busy() not in ([], [pid]))
            mark.touch()
            assert await reading == source.read_bytes()
            assert engine.failures.find(transform=version.label).total == 0

    run(story())


@pytest.mark.parametrize("kind", ["stream", "command"])
def test_a_worker_killed_behind_the_first_byte_cuts_the_output(tmp_path: Path, source: Path, kind: str) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, gives("stream" if kind == "stream" else "command", 2, "hang"))
            async with open_reading(engine, version, source) as reading:
                await reading.start()
                (worker,) = [worker for worker in engine.pool._workers if worker.in_flight]
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)
                with pytest.raises(TransformFailed, match="SIGKILL"):
                    while await reading.next() is not None:
                        pass
            await wait_until(lambda: len(children()) <= 1)
            assert engine.failures.find(transform=version.label).total == 1

    run(story())


RETAR = """
    import io, tarfile
    def transform(reader, writer, stop=10**9):
        with tarfile.open(fileobj=reader, mode="r|") as shard, tarfile.open(fileobj=writer, mode="w|") as out:
            for number, member in enumerate(shard):
                if number == stop:
                    out.fileobj.flush() if hasattr(out.fileobj, "flush") else None
                    raise ValueError("stopped")
                data = shard.extractfile(member).read()[::-1]
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
"""


def test_a_stream_that_makes_a_tar_never_ends_between_members(tmp_path: Path) -> None:
    order = random.Random(8)
    shard = write_shard(
        tmp_path / "t.tar", [{"a": order.randbytes(order.randrange(9000)), "b": b"1"} for _ in range(80)]
    )
    whole = members(shard.read_bytes())

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, object_request(RETAR, "stream"))
            made = members(await read(engine, version, shard))
            assert made == {name: data[::-1] for name, data in whole.items()}
            for stop in (30, 60, 61, 159):
                failing = await register_request(engine, object_request(RETAR, "stream", args={"stop": stop}))
                data, message = await read_until_cut(engine, failing, shard)
                assert "stopped" in message
                if data:
                    assert not tarfile_is_content(data)
                    assert not gnu_tar_is_content(data)

    run(story())


def test_readers_of_a_seeded_object_share_one_run_and_its_result(tmp_path: Path, source: Path) -> None:
    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            for kind in WHOLE:
                version = await register_request(engine, same_of(kind))
                opened = []
                for _ in range(3):
                    plan, file = await plan_for(engine, version, source, ",seed=1")
                    opened.append(await engine.runs.open(plan, file, request_id="r"))
                assert all(isinstance(reading, Reading) for reading in opened)
                datas = await asyncio.gather(*(_read_all(reading) for reading in opened))
                assert set(datas) == {source.read_bytes()}
                assert engine.statistics_of(version).runs == 1
                plan, file = await plan_for(engine, version, source, ",seed=1")
                await wait_until(lambda plan=plan: engine.runs.has_result(plan))
                finished = await engine.runs.open(plan, file, request_id="r")
                assert isinstance(finished, Finished)
                assert finished.source.meta.size == source.stat().st_size
                finished.source.close()

    run(story())


async def _read_all(reading: Reading | Finished) -> bytes:
    assert isinstance(reading, Reading)
    data = bytearray()
    with contextlib.closing(reading):
        await reading.start()
        while (part := await reading.next()) is not None:
            data += bytes_of(part)
    return bytes(data)


def test_another_executable_is_another_result(tmp_path: Path, source: Path) -> None:
    tool = tmp_path / "tool"

    def install(text: str) -> None:
        tool.write_text(f"#!/bin/sh\necho {text}\n")
        tool.chmod(0o755)

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, _):
            install("one")
            version = await register_request(engine, command_request([str(tool)]))
            first, file = await plan_for(engine, version, source, ",seed=1")
            file.close()
            install("the second")
            second, file = await plan_for(engine, version, source, ",seed=1")
            file.close()
            assert first.key != second.key

    run(story())


def test_a_command_that_is_found_elsewhere_now_is_the_one_that_runs(tmp_path: Path, source: Path) -> None:
    folders = [tmp_path / "before", tmp_path / "behind"]

    def install(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "tool").write_text(f"#!/bin/sh\necho {text}\n")
        (folder / "tool").chmod(0o755)

    async def story() -> None:
        path = ":".join([*map(str, folders), os.defpath])
        async with Engine.open(replace(settings_for(), command_path=path), tmp_path / "data", ()) as engine:
            install(folders[1], "one")
            version = await register_request(engine, command_request(["tool"]))
            assert await read(engine, version, source, seed=1) == b"one\n"
            install(folders[0], "another")
            assert await read(engine, version, source, seed=1) == b"another\n"

    run(story())


def test_what_a_command_gave_while_it_was_replaced_is_not_kept(tmp_path: Path, source: Path) -> None:
    """It may be of either; kept as of the one, it would be there again when that one is put back."""
    tool, going_on = tmp_path / "tool", tmp_path / "going-on"

    def install(text: str) -> None:
        tool.with_name("new").write_text(f"#!/bin/sh\nwhile ! [ -e {going_on} ]; do sleep 0.05; done; echo {text}\n")
        tool.with_name("new").chmod(0o755)
        tool.with_name("new").replace(tool)

    async def story() -> None:
        async with open_parts(tmp_path / "data") as (engine, results):
            install("one")
            version = await register_request(engine, command_request([str(tool)]))
            plan, file = await plan_for(engine, version, source, ",seed=1")
            opened = await engine.runs.open(plan, file, request_id="r")
            install("another")
            going_on.touch()
            assert (await _read_all(opened)).strip() in (b"one", b"another")
            await wait_until(lambda: engine.runs.going_on == 0)
            assert results.list() == []
            plan, file = await plan_for(engine, version, source, ",seed=1")
            assert await _read_all(await engine.runs.open(plan, file, request_id="r")) == b"another\n"
            await wait_until(lambda: len(results.list()) == 1)

    run(story())


PROBED = {
    "still bytes": (same_of("bytes"), True, True),
    "still stream": (same_of("stream"), True, True),
    "still command": (same_of("command"), True, True),
    "drawing bytes": (
        object_request("import random\ndef transform(d):\n    return random.randbytes(9)\n"),
        False,
        True,
    ),
    "drawing command": (command_request(["echo", "{seed}"]), False, True),
    "clock": (command_request(["date"]), False, False),
    "entropy": (object_request("import os\ndef transform(d):\n    return os.urandom(9)\n"), False, False),
    "without end": (command_request(["cat", "/dev/zero"]), True, True),
}


@pytest.mark.parametrize("what", PROBED)
def test_a_probe_tells_whether_an_object_comes_out_the_same_again(tmp_path: Path, source: Path, what: str) -> None:
    request, deterministic, reproducible = PROBED[what]

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, request, probe=source)
            report = version.info.probe
            assert report is not None
            assert (report.deterministic, report.reproducible, report.samples) == (deterministic, reproducible, 1)
            opened = FileSource(source)
            from shardmill.core.specs import Spec

            plan = await engine.plan(version, opened.meta, REF, Spec.parse(version.info.uuid))
            opened.close()
            assert plan.is_shared == deterministic

    run(story())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (object_request("def transform(data):\n    raise ValueError('boom')\n"), "boom"),
        (command_request(["sh", "-c", "echo first >&2; echo boom >&2; exit 1"]), "first\nboom"),
        (command_request(["no-such-command-x"]), "'no-such-command-x' is not found in"),
        (command_request(["/no/such/file"]), "is no executable file"),
        (object_request("import nothing_of_that_name_x\ndef transform(d): return d"), "nothing_of_that_name_x"),
    ],
)
def test_what_cannot_work_is_refused_at_registration(
    tmp_path: Path, source: Path, request_: TransformRequest, message: str
) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            with pytest.raises(TransformFailed) as caught:
                await register_request(engine, request_, probe=source)
            assert message in caught.value.message
            assert not engine.versions.list()

    run(story())


def test_a_command_has_the_confinement_of_a_worker(tmp_path: Path, source: Path) -> None:
    script = """
import os, resource, socket
try:
    socket.socket(); net = "reached"
except PermissionError:
    net = "refused"
print(net, sorted(os.environ), os.getpgrp() == os.getpid(), os.path.samefile(os.environ["HOME"], "."))
print(resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 1 << 30, len(os.listdir("/proc/self/fd")), os.listdir("."))
"""

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, command_request(["python3", "-S", "-c", script]))
            os.environ["SHARDMILL_TEST_SECRET"] = "hunter2"
            try:
                text = (await read(engine, version, source)).decode()
            finally:
                del os.environ["SHARDMILL_TEST_SECRET"]
            assert text.startswith("refused ")
            assert "SHARDMILL" not in text
            assert "True True\nTrue 4 []" in text

    run(story())


def test_files_that_a_command_leaves_are_removed(tmp_path: Path, source: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            leave = command_request(["sh", "-c", "echo x > left; mkdir deep; echo y > deep/left; pwd; ls"])
            version = await register_request(engine, leave)
            for _ in range(2):
                lines = (await read(engine, version, source)).decode().splitlines()
                assert lines[1:] == ["deep", "left"]
                assert not Path(lines[0]).exists()

    run(story())


def test_what_a_command_leaves_running_neither_lives_on_nor_holds_up_the_answer(tmp_path: Path, source: Path) -> None:
    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, command_request(["sh", "-c", "sleep 1000 & echo done"]))
            assert await read(engine, version, source) == b"done\n"
            await wait_until(lambda: len(children()) <= 2)

    run(story())


def test_commands_and_samples_take_turns_on_one_worker_lane(tmp_path: Path, source: Path) -> None:
    shard = write_shard(tmp_path / "t.tar", [{"txt": b"%d" % number} for number in range(50)])

    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1) as engine:
            samples = await register(engine, IDENTITY, name="samples")
            zipped = await register_request(engine, command_request(["gzip", "-nc"]))
            results = await asyncio.gather(
                *(
                    read(engine, version, file)
                    for _ in range(3)
                    for version, file in ((samples, shard), (zipped, source))
                )
            )
            assert [members(data) for data in results[::2]] == [members(shard.read_bytes())] * 3
            assert {gzip.decompress(data) for data in results[1::2]} == {source.read_bytes()}

    run(story())


def test_a_thread_that_a_function_leaves_behind_can_give_nothing_more(tmp_path: Path, source: Path) -> None:
    code = """
        import threading, time
        left = []
        def transform(reader, writer):
            def later():
                while True:
                    try:
                        writer.write(b"late" * 1000)
                    except ValueError as error:
                        left.append(str(error))
                        return
                    time.sleep(0.001)
            if left:
                writer.write(left[0].encode())
                return
            threading.Thread(target=later, daemon=True).start()
            writer.write(b"in time")
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data", workers=1) as engine:
            version = await register_request(engine, object_request(code, "stream"))
            first = await read(engine, version, source)
            assert first.replace(b"late", b"") == b"in time"
            await asyncio.sleep(0.05)
            assert await read(engine, version, source) == b"the object's run is over"

    run(story())


def pictures_of(data: bytes) -> Iterator[tuple[int, int]]:
    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as picture:
        yield picture.size


def test_a_picture_is_made_smaller(tmp_path: Path, picture: Path) -> None:
    code = """
        import io
        import PIL.Image
        def transform(data, width):
            out = io.BytesIO()
            with PIL.Image.open(io.BytesIO(data)) as picture:
                height = round(picture.height * width / picture.width)
                picture.convert("RGB").resize((width, height)).save(out, "JPEG", quality=85)
            return out.getvalue()
    """

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            for width in (100, 50):
                version = await register_request(engine, object_request(code, args={"width": width}))
                (size,) = pictures_of(await read(engine, version, picture))
                assert size[0] == width

    run(story())
