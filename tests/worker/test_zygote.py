"""The zygote: what it says of its environment, what it imports, and that nothing it is the parent of outlives it."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardmill.worker.zygote import cpu_level, describe
from tests.etl.support import write_shard
from tests.worker.driving import described, zygote


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_says_what_identifies_its_environment(tmp_path: Path) -> None:
    with zygote(tmp_path) as started:
        about = started.about
    assert about["pid"] == started.process.pid
    expected = describe()
    assert about["python"] == expected["python"]
    assert about["id"] == expected["id"]
    assert re.fullmatch("[0-9a-f]{64}", about["id"])
    assert re.fullmatch("x86-64-v[234]|aarch64|.+", cpu_level())


def test_modules_are_found_and_preloaded_or_their_failure_is_told(tmp_path: Path) -> None:
    with zygote(tmp_path) as started:
        started.connection.send({"t": "find", "id": 7, "modules": ["json", "numpy", "no_such_module", "numpy.no_such"]})
        found = started.receive("found")
        assert (found["id"], found["missing"]) == (7, ["no_such_module", "numpy.no_such"])
        loaded = started.preload("json", "no_such_module", "PIL.Image")
        assert loaded["modules"] == ["json", "PIL.Image"]
        assert loaded["failed"].keys() == {"no_such_module"}
        assert loaded["threads"] == []


def test_a_module_that_starts_a_thread_is_told(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    with zygote(tmp_path / "z") as started:
        (tmp_path / "z" / "stage" / "starts_a_thread.py").write_text(
            "import threading\nstop = threading.Event()\nthreading.Thread(target=stop.wait, daemon=True).start()\n"
        )
        assert len(started.preload("starts_a_thread")["threads"]) == 1


def test_an_exit_is_reported_with_its_status(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}])
    with zygote(tmp_path) as started:
        for body, status in (("os._exit(7)", 7), ("os.kill(os.getpid(), 15)", -15), ("os.kill(os.getpid(), 40)", -40)):
            worker = started.fork()
            worker.load(f"import os\ndef transform(sample):\n    {body}\n")
            worker.open(shard)
            with pytest.raises(AssertionError, match="closed its socket"):
                worker.run(described(shard))
            assert started.connection.receive() == ({"t": "exit", "pid": worker.pid, "status": status}, b"")


LEAVES = """
    import os, time

    def transform(sample):
        pids = []
        for number in range(5):
            reading, writing = os.pipe()
            if os.fork() == 0:
                if number % 2:
                    os.setsid()
                if number == 4 and os.fork():
                    os._exit(0)
                os.write(writing, b"%d" % os.getpid())
                os.close(writing)
                time.sleep(1000)
            os.close(writing)
            pids.append(os.read(reading, 20).decode())
        return {"txt": " ".join(pids)}
"""


def test_what_a_function_leaves_running_ends_with_its_worker(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}])
    with zygote(tmp_path) as started:
        worker = started.fork()
        worker.load(LEAVES)
        worker.open(shard)
        framed = worker.run(described(shard)).framed
        pids = [int(pid) for pid in framed[512 : 512 + int(framed[124:135], 8)].split()]
        assert len(pids) == 5
        assert any(map(is_alive, pids))
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("way", ["quit", "close", "kill"])
def test_no_worker_outlives_its_zygote(tmp_path: Path, way: str) -> None:
    with zygote(tmp_path) as started:
        workers = [started.fork() for _ in range(3)]
        for worker in workers:
            worker.load("def transform(sample):\n    while True: pass\n")
        match way:
            case "quit":
                started.connection.send({"t": "quit"})
            case "close":
                started.connection.sock.close()
            case "kill":
                started.process.kill()
        wait_until(lambda: not any(is_alive(worker.pid) for worker in workers))
        started.process.wait(10)


def test_a_worker_ends_when_its_node_is_gone(tmp_path: Path) -> None:
    with zygote(tmp_path) as started:
        worker = started.fork()
        worker.load("def transform(sample):\n    return sample\n")
        worker.connection.sock.close()
        wait_until(lambda: not is_alive(worker.pid))
        with contextlib.closing(started.fork()) as another:
            assert another.load("def transform(sample):\n    return sample\n").head["t"] == "loaded"
