"""Work done once: several readers of one URL, one of whom stalls; what a reader costs; and reading what is finished."""

import contextlib
import http.client
import os
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.processes import cpu_of
from benchmarks.table import Row, Samples, wait_quiet
from benchmarks.transforms import HERE, Setting
from shardmill import Client
from shardmill.testing.node import RunningNode, running_node

BUCKET = "gs://bench"
READERS = 4


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


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def measure(setting: Setting, rounds: int) -> list[Row]:
    """All of it, rounds interleaved."""
    with _shared(setting) as shared:
        _read(shared.fresh())
        rows = _with_a_stalled_one(shared, rounds)
        rows.append(_cost_of_readers(shared, setting, rounds))
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


def _cost_of_readers(shared: Shared, setting: Setting, rounds: int) -> Row:
    """CPU of node, workers and curls, of that of client-side pipelines with the node's part in them."""
    ratios = Samples()
    pipeline = [str(setting.python), str(HERE / "pipeline.py"), setting.target]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(pipeline, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(rounds + 1):
            before, children = cpu_of(shared.node.pid), _children_cpu()
            _read(shared.fresh(), READERS)
            offloaded = cpu_of(shared.node.pid) - before + _children_cpu() - children
            wait_quiet()
            before = cpu_of(shared.node.pid)
            process.stdin.write(f"{shared.plain}\n")
            process.stdin.flush()
            samples, seconds = process.stdout.readline().split()
            single = float(seconds) + cpu_of(shared.node.pid) - before
            wait_quiet()
            assert int(samples) > 0
            # Each of the readers would run a pipeline of its own.
            ratios.add(offloaded / (READERS * single))
        process.stdin.close()
        process.wait()
    what = f"CPU per delivered sample, {READERS} readers of one URL, of {READERS} client-side pipelines'"
    return Row(what, Samples(ratios.values[1:]), "", at_most=0.3)


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
