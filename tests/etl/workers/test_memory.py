"""What a node holds for readers that stall, leave, or ask for a great deal: bounded by its settings, and given back."""

import http.client
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from shardmill.core.api import TransformInfo
from shardmill.etl.processes.arenas import ARENA
from shardmill.etl.processes.process_tree import live_descendants, resident_bytes
from tests.etl.judges import count_samples
from tests.etl.over_http import Served, serve
from tests.etl.support import IDENTITY, write_shard
from tests.shards.archives import END, header

MIB = 1 << 20
WORKERS = 2
RUN_WINDOW, NODE_WINDOW, SPOOL_WINDOW = 8 * MIB, 24 * MIB, 16 * MIB
SETTINGS = {
    "SHARDMILL_TRANSFORMS_RUN_WINDOW": str(RUN_WINDOW),
    "SHARDMILL_TRANSFORMS_NODE_WINDOW": str(NODE_WINDOW),
    "SHARDMILL_RESULTS_SPOOL_WINDOW": str(SPOOL_WINDOW),
    "SHARDMILL_TRANSFORMS_IDLE_WORKERS": "300ms",
}
ARENAS = WORKERS * ARENA
"""Pages of workers that the node has looked at count as the node's too."""
SLACK = 12 * MIB  # of Python's allocator, and what a socket of the transport holds
SAMPLE = 600_000
LARGE = "def transform(sample):\n    return {'bin': bytes(600_000)}\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    write_shard(path / "s.tar", [{"txt": b"x"}] * 400)
    return path


class Reader:
    """Takes the first byte, and no more until it is asked to."""

    def __init__(self, served: Served, path: str) -> None:
        self._connection = http.client.HTTPConnection(*served.address, timeout=60)
        self._connection.request("GET", path)
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        self._first = self._response.read(1)

    def read_all(self) -> bytes:
        return self._first + self._response.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


@contextmanager
def reading(served: Served, info: TransformInfo, options: str = "", *, count: int = 1) -> Iterator[list[Reader]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Reader(served, served.path(info, "s.tar", options))) for _ in range(count)]


def samples_done(served: Served) -> int:
    text = served.ask("GET", "/metrics").body.decode()
    return sum(int(float(value)) for value in re.findall(r"^shardmill_transform_samples_total\{.*\} (.+)$", text, re.M))


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def wait_stalled(served: Served) -> None:
    """Return when no further sample has been transformed for a while: every reader is waited for."""
    last, since = -1, time.monotonic()

    def has_stalled() -> bool:
        nonlocal last, since
        done = samples_done(served)
        if done != last:
            last, since = done, time.monotonic()
        return time.monotonic() - since > 0.7

    wait_until(has_stalled, 60)


@pytest.mark.parametrize("options", ["", ",seed=1"], ids=["streamed", "spooled"])
def test_a_stalled_reader_of_large_samples_holds_what_the_settings_say(directory: Path, options: str) -> None:
    with serve(directory, "--workers", str(WORKERS), environ=SETTINGS) as served:
        info = served.register(LARGE)
        served.get(info, "s.tar", ",count=20")
        before = resident_bytes(served.node.pid)
        with reading(served, info, options) as (reader,):
            wait_stalled(served)
            ahead = samples_done(served) - 20
            grown = resident_bytes(served.node.pid) - before
            assert grown < RUN_WINDOW + ARENAS + SLACK
            # It went on as far as it may, and no further.
            assert RUN_WINDOW // SAMPLE // 2 < ahead < 200
            assert count_samples(reader.read_all()) == 400


def test_stalled_readers_together_hold_what_the_settings_say(directory: Path) -> None:
    with serve(directory, "--workers", str(WORKERS), environ=SETTINGS) as served:
        info = served.register(LARGE)
        served.get(info, "s.tar", ",count=20")
        before = resident_bytes(served.node.pid)
        with reading(served, info, count=16) as readers:
            wait_stalled(served)
            grown = resident_bytes(served.node.pid) - before
            assert grown < NODE_WINDOW + 16 * 2 * SAMPLE + ARENAS + SLACK
            # Those who stall hold up nobody: a further reader gets all of it.
            assert count_samples(served.get(info, "s.tar").body) == 400
            assert count_samples(readers[-1].read_all()) == 400


def peak(pid: int) -> int:
    """The most memory that a process has had since it began."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_huge_samples_are_bounded_by_their_own_limit(directory: Path) -> None:
    limit = 40 * MIB
    environ = SETTINGS | {"SHARDMILL_TRANSFORMS_MAX_SAMPLE": str(limit)}
    with serve(directory, "--workers", str(WORKERS), environ=environ) as served:
        info = served.register("def transform(sample):\n    return {'bin': bytes(38 << 20)}\n", name="huge")
        endless = served.register(
            "def transform(sample):\n    while True: yield {'bin': bytes(1 << 20)}\n", name="endless"
        )
        before = peak(served.node.pid)
        with reading(served, info, ",count=12") as (reader,):
            wait_stalled(served)
            assert len(reader.read_all()) > 12 * 38 * MIB
        # Each worker has two samples in work, and memory of its own for one; the one that is sent comes on top.
        bound = before + RUN_WINDOW + (2 * WORKERS + 2) * limit + SLACK
        assert peak(served.node.pid) < bound
        wait_until(lambda: resident_bytes(served.node.pid) < before)
        answer = served.get(endless, "s.tar")
        assert (answer.status, "max_sample" in answer.error.message) == (422, True)
        assert peak(served.node.pid) < bound


def test_a_million_members_are_not_held_in_memory(directory: Path) -> None:
    """Names repeat, but never next to each other, so each member is a sample."""
    pair = header(b"a.txt", 0) + header(b"b.txt", 0)
    with (directory / "many.tar").open("wb") as file:
        for _ in range(500):
            file.write(pair * 1000)
        file.write(END)
    with serve(directory, "--workers", "1", environ=SETTINGS) as served:
        info = served.register(IDENTITY)
        served.get(info, "s.tar")
        before = peak(served.node.pid)
        answer = served.get(info, "many.tar", ",start=999990,count=100")
        assert (answer.status, len(answer.body)) == (200, 10240)
        assert answer.body.startswith(b"a.txt\0")
        with Reader(served, served.path(info, "many.tar")):
            wait_stalled(served)
        assert peak(served.node.pid) - before < RUN_WINDOW + ARENAS + 64 * MIB
    (directory / "many.tar").unlink()


def test_readers_who_leave_give_everything_back(directory: Path) -> None:
    source = "import time\ndef transform(sample):\n    time.sleep(0.005)\n    return {'bin': bytes(100_000)}\n"
    with serve(directory, "--workers", str(WORKERS), environ=SETTINGS) as served:
        info = served.register(source)
        served.get(info, "s.tar", ",count=1")
        pid = served.node.pid

        def held() -> tuple[int, int]:
            return len(live_descendants(pid)), len(list(Path(f"/proc/{pid}/fd").iterdir()))

        # Idle: the zygote alone is left.
        wait_until(lambda: held()[0] == 1)
        idle = held()
        for options in ("", ",seed=1", ",seed=2"):
            for round_ in range(5):
                with reading(served, info, options, count=10):
                    assert held()[1] > idle[1] + 10, round_
        scratch = served.node.data / "scratch"
        wait_until(lambda: held()[0] == 1 and held()[1] <= idle[1] and not list(scratch.glob("worker-*")))
        metrics = served.ask("GET", "/metrics").body.decode()
        assert re.search(r'^shardmill_runs\{state="running"\} 0', metrics, re.M)
