"""Work done once: several readers of one URL, one of whom stalls; what a reader costs; and reading what is finished."""

import contextlib
import http.client
import os
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.processes import Spoken, cpu_of, spoken
from benchmarks.table import Row, Samples, ratio_of, wait_quiet
from benchmarks.transforms import HERE, Setting
from shardmill import Client
from shardmill.testing.node import RunningNode, running_node

BUCKET = "gs://bench"
READERS = 4
READS = 3  # of a shard a round: the kernel counts CPU in steps of 10 ms


class Shared:
    """A node with the function, and URLs of one shard; each seed is another result."""

    def __init__(self, node: RunningNode, client: Client, target: str, shard: str) -> None:
        self.node = node
        self.client = client
        self.shard = shard
        self._spec = client.transforms.add(target, "bench").uuid
        self._seed = 0

    def fresh(self) -> str:
        """A URL that nobody has read."""
        self._seed += 1
        return self.client.object_url(BUCKET, self.shard, self._spec, seed=self._seed)

    @property
    def plain(self) -> str:
        return self.client.object_url(BUCKET, self.shard)


@contextlib.contextmanager
def _shared(setting: Setting) -> Iterator[Shared]:
    buckets = ("--bucket", f"{BUCKET}=dir:{setting.shards[0].parent}", "--bucket", "ais://bench")
    with running_node(*buckets, "--workers", "2", *setting.flags) as node:
        with Client(node.endpoint) as client:
            yield Shared(node, client, setting.target, setting.shards[0].name)


def _read(url: str, readers: int = 1) -> float:
    """Seconds until all of so many curls have it."""
    start = time.perf_counter()
    curls = [subprocess.Popen(["curl", "-sSf", "-o", "/dev/null", url]) for _ in range(readers)]
    assert [curl.wait() for curl in curls] == [0] * readers
    return time.perf_counter() - start


@contextlib.contextmanager
def _stalled(url: str) -> Iterator[None]:
    """A reader that takes the first byte and no more."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        connection.request("GET", parts.path)
        connection.getresponse().read(1)
        yield
    finally:
        connection.close()


def measure(setting: Setting, rounds: int, webdataset: Path | None) -> list[Row]:
    """All of it, rounds interleaved.

    Args:
        setting: The function, and where it runs.
        rounds: Of the table.
        webdataset: An interpreter that has it, and what the function imports.
    """
    with _shared(setting) as shared:
        _read(shared.fresh())
        rows = _with_a_stalled_one(shared, rounds)
        rows += _cost_of_readers(shared, setting, rounds, webdataset)
        rows += _finished(shared, rounds)
    return [replace(row, what=f"{setting.name}: {row.what}") for row in rows]


def _with_a_stalled_one(shared: Shared, rounds: int) -> list[Row]:
    ratios = Samples()
    for number in range(rounds):
        taken = {}
        for is_beside in (False, True) if number % 2 == 0 else (True, False):
            url = shared.fresh()
            with _stalled(url) if is_beside else contextlib.nullcontext():
                taken[is_beside] = _read(url, READERS - 1)
            wait_quiet()
        ratios.add(taken[False] / taken[True])
    return [Row("three readers of one URL beside a stalled one, of their rate without it", ratios, "", at_least=0.8)]


def _cost_of_readers(shared: Shared, setting: Setting, rounds: int, webdataset: Path | None) -> list[Row]:
    """CPU of everybody who takes part, the node's as well: readers of one URL beside readers who make it themselves."""
    costs = {name: Samples() for name in ("curl", "made", "stock", "thin")}
    with contextlib.ExitStack() as stack:

        def start(way: str, python: Path, count: int) -> list[Spoken]:
            command: list[str | os.PathLike[str]] = [python, HERE / "pipeline.py", way]
            command += [setting.target] if way != "made" else []
            return [stack.enter_context(spoken(command)) for _ in range(count)]

        thin = start("thin", setting.python, 1)
        stock = start("stock", webdataset, READERS) if webdataset is not None else []
        made = start("made", webdataset, READERS) if webdataset is not None else []
        for number in range(rounds + 1):
            taken = {"curl": _cpu(shared, _read_by_curl, fresh=True)}
            # Each of the readers would run one.
            taken["thin"] = READERS * _cpu(shared, lambda url: _read_by(thin, url))
            if stock:
                taken["stock"] = _cpu(shared, lambda url: _read_by(stock, url))
                taken["made"] = _cpu(shared, lambda url: _read_by(made, url), fresh=True)
            # The first round warms.
            for name, seconds in taken.items() if number else ():
                costs[name].add(seconds)
    many = f"{READERS} readers of one URL, of {READERS}"
    rows = [Row(f"CPU per delivered sample, {many} thin loops'", ratio_of(costs["curl"], costs["thin"]), "")]
    if stock:
        what = f"CPU per delivered sample, {many} WebDataset pipelines'"
        rows.insert(0, Row(what, ratio_of(costs["curl"], costs["stock"]), "", at_most=0.3))
        what = f"CPU per sample, {READERS} WebDataset readers of one URL, of {READERS} WebDataset pipelines'"
        rows.append(Row(what, ratio_of(costs["made"], costs["stock"]), ""))
    return rows


def _cpu(shared: Shared, read: Callable[[str], float], *, fresh: bool = False) -> float:
    """CPU seconds of the node and of whoever reads a shard: as it is stored, or transformed."""
    before, readers = cpu_of(shared.node.pid), 0.0
    for _ in range(READS):
        readers += read(shared.fresh() if fresh else shared.plain)
        wait_quiet()
    return cpu_of(shared.node.pid) - before + readers


def _read_by_curl(url: str) -> float:
    before = os.times()
    _read(url, READERS)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _read_by(processes: list[Spoken], url: str) -> float:
    for process in processes:
        process.tell(url)
    return sum(float(process.hear()[1]) for process in processes)


def _finished(shared: Shared, rounds: int) -> list[Row]:
    """A finished result beside the same bytes as a stored object, and beside making it."""
    url = shared.fresh()
    same = _store(shared, url)
    of_stored, of_made = Samples(), Samples()
    for number in range(rounds + 1):
        taken = {same: 0.0, url: 0.0}
        # One read takes little longer than the start of curl.
        for turn in range(6):
            which = (same, url)[(turn + number) % 2]
            taken[which] += _read(which) / 3
        stored, finished = taken[same], taken[url]
        made = _read(shared.fresh())
        wait_quiet()
        of_stored.add(stored / finished)
        of_made.add(made / finished)
    # The first round verifies the stored blocks.
    return [
        Row(
            "a finished result by curl, of the rate of the same bytes stored",
            Samples(of_stored.values[1:]),
            "",
            at_least=0.9,
        ),
        Row("a finished result by curl, of the rate of making it", Samples(of_made.values[1:]), "", at_least=5),
    ]


def _store(shared: Shared, url: str) -> str:
    """The URL of an object with the bytes of that result, which is finished afterwards."""
    handle = shared.client.object("ais://bench/result.tar")
    path = shared.node.data / "result.tar"
    subprocess.run(["curl", "-sSf", "-o", str(path), url], check=True)
    handle.put(path)
    path.unlink()
    return shared.client.object_url("ais://bench", "result.tar")
