"""Transforming while streaming: rate, first byte and memory, beside bare processes that do only the work itself."""

import contextlib
import http.client
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import resident
from benchmarks.table import Row, Samples, ratio_of, wait_quiet
from shardmill import Client
from shardmill.testing.node import RunningNode, running_node

HERE = Path(__file__).parent
BUCKET = "gs://bench"
FIRST_BYTES = 3  # a round
MIDDLE = 50  # sample, of 100
STALLED_MIB = 64
"""What docs/guide/operating.md states for one stalled reader, two workers and samples of 600 KB."""


@dataclass(frozen=True)
class Setting:
    """What is measured: a function, where it runs, and the shards it is given."""

    name: str
    target: str
    """`FILE.py:FUNCTION`."""
    python: Path
    flags: tuple[str, ...]
    shards: list[Path]


def settings_for(shards: list[Path], torch: Path | None) -> list[Setting]:
    """Pillow and numpy in the node's own interpreter; torchvision where an interpreter with it is given."""
    found = [Setting("Pillow and numpy", f"{HERE / 'functions.py'}:crop", Path(sys.executable), (), shards)]
    if torch is not None:
        flags = ("--env", f"torch={torch}")
        found.append(Setting("torchvision", f"{HERE / 'torch_functions.py'}:crop", torch, flags, shards))
    return found


class Bare:
    """Processes that decode and call the function, on bytes in memory."""

    def __init__(self, setting: Setting, processes: int) -> None:
        command = [str(setting.python), str(HERE / "raw.py"), setting.target, *map(str, setting.shards)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        self.samples = sum(int(self._line(process).split()[1]) for process in self._processes)

    def rate(self) -> float:
        """Samples a second of all together, each running through its shards once."""
        start = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self._processes:
            self._line(process)
        return self.samples / (time.perf_counter() - start)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait()
            process.stdout.close()

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the bare process ended"
        return line


class Served:
    """A node with the function registered."""

    def __init__(self, node: RunningNode, setting: Setting) -> None:
        self.node = node
        self.client = Client(node.endpoint)
        info = self.client.transforms.add(setting.target, "bench")
        self.spec = info.uuid
        self._shard = setting.shards[0].name
        # One by one: a list would be announced, and the node would work ahead while nobody measures it.
        self.urls = [self.client.object_url(BUCKET, path.name, info.uuid) for path in setting.shards]

    def rate(self, samples: int) -> float:
        """Samples a second, curl reading one shard after the other."""
        # One curl: starting another for each shard takes as long as several samples.
        command = ["curl", "-sSf"]
        for url in self.urls:
            command += ["-o", "/dev/null", url]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        return samples / (time.perf_counter() - start)

    def first_byte(self, *, start: int = 0, leave: bool = False) -> float:
        """Seconds from the request to the first byte of the tar, of a URL that nobody has announced.

        Args:
            start: First sample.
            leave: Go after the first byte, instead of reading to the end: the node then ends the worker.
        """
        url = self.client.object_url(BUCKET, self._shard, self.spec, start=start or None)
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        try:
            began = time.perf_counter()
            connection.request("GET", parts.path)
            response = connection.getresponse()
            assert response.status == 200
            assert response.read(1)
            taken = time.perf_counter() - began
            if not leave:
                response.read()
            return taken
        finally:
            connection.close()

    @contextlib.contextmanager
    def stalled_reader(self) -> Iterator[None]:
        """A reader that takes the first byte and no more."""
        parts = urllib.parse.urlsplit(self.urls[0])
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        try:
            connection.request("GET", parts.path)
            connection.getresponse().read(1)
            yield
        finally:
            connection.close()


@contextlib.contextmanager
def served(setting: Setting, workers: int) -> Iterator[Served]:
    bucket = f"{BUCKET}=dir:{setting.shards[0].parent}"
    with running_node("--bucket", bucket, "--workers", str(workers), *setting.flags) as node:
        found = Served(node, setting)
        try:
            yield found
        finally:
            found.client.close()


def measure(setting: Setting, rounds: int) -> list[Row]:
    """Rates against the bare limit, rounds interleaved; then the first byte and the memory of a stalled reader."""
    rows = []
    for workers, least in ((1, 0.88), (2, 0.82)):
        rates, first, in_samples, in_the_middle, after_leaving, limit = (Samples() for _ in range(6))
        with contextlib.closing(Bare(setting, workers)) as bare, served(setting, workers) as node:
            samples = bare.samples // workers
            node.rate(samples)
            for _ in range(rounds):
                raw = bare.rate()
                wait_quiet()
                rate = node.rate(samples)
                wait_quiet()
                limit.add(raw)
                rates.add(rate)
                for _ in range(FIRST_BYTES):
                    seconds = node.first_byte()
                    first.add(seconds * 1000)
                    in_samples.add(seconds * raw / workers)
                    wait_quiet()
                    in_the_middle.add(node.first_byte(start=MIDDLE) / seconds)
                    wait_quiet()
                node.first_byte(leave=True)
                wait_quiet()
                after_leaving.add(node.first_byte() * 1000)
                wait_quiet()
            what = f"{setting.name}, {workers} worker{'s' * (workers > 1)}"
            ratios = ratio_of(rates, limit)
            rows.append(Row(f"{what}: rate through curl, of the bare processes'", ratios, "", at_least=least))
            rows.append(Row(f"{what}: samples a second", rates, "/s"))
            rows.append(Row(f"{what}: bare processes, samples a second", limit, "/s"))
            rows.append(Row(f"{what}: first byte of a warm transform", first, "ms", at_most=50))
            rows.append(Row(f"{what}: first byte, in times of a bare sample", in_samples, "", at_most=5))
            started = f"{what}: first byte with start={MIDDLE}, of that of the whole shard"
            rows.append(Row(started, in_the_middle, "", at_most=1.25))
            rows.append(Row(f"{what}: first byte after a reader has left in the middle", after_leaving, "ms"))
            if workers == 2:
                rows.append(_stalled(setting, node))
    return rows


def _stalled(setting: Setting, node: Served) -> Row:
    before = resident(node.node.pid)
    with node.stalled_reader():
        grown = Samples()
        for _ in range(20):
            time.sleep(0.1)
            grown.add((resident(node.node.pid) - before) / (1 << 20))
    what = f"{setting.name}: growth of the node's memory by a stalled reader"
    return Row(what, grown, "MiB", at_most=STALLED_MIB)
