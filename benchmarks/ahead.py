"""An announced list: six shards read one after the other, each worked on before the next is asked for."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row, Samples, wait_quiet
from benchmarks.transforms import BUCKET, HERE
from shardmill import Client
from shardmill.testing.node import running_node

SHARDS = 6
SLOWER = 1.2  # times what making a shard takes: the work of a reader that is the slower half


def measure(shards: list[Path], scratch: Path, rounds: int) -> list[Row]:
    """Announced against unannounced, for a reader that works longer than a shard takes, and for one that only reads."""
    directory = scratch / "shards"
    names = copy_shards(shards, directory)
    slow, quick = Samples(), Samples()
    with _client(directory, scratch, 0) as plain, _client(directory, scratch, 1) as announced:
        clients = (plain, announced)
        specs = [client.transforms.add(f"{HERE / 'functions.py'}:crop", "bench").uuid for client in clients]
        for client, spec in zip(clients, specs, strict=True):
            _read([client.object_url(BUCKET, names[0], spec)], 0)  # warms the workers
        for number in range(rounds):
            one = _read([plain.object_url(BUCKET, name, specs[0]) for name in names], 0) / SHARDS
            for samples, work in ((slow, one * SLOWER), (quick, 0.0)):
                taken = {}
                pairs = list(zip(clients, specs, strict=True))
                for client, spec in pairs if number % 2 == 0 else reversed(pairs):
                    urls = client.expand_object_urls(BUCKET, spec, names=names)
                    taken[client] = _read(urls, work)
                    wait_quiet()
                samples.add(taken[announced] / taken[plain])
    what = f"{SHARDS} shards announced, of the time unannounced"
    return [
        Row(f"{what}; the reader works {SLOWER} times as long as making a shard takes", slow, "", at_most=0.75),
        Row(f"{what}; the reader only reads", quick, "", at_most=1.05),
    ]


def copy_shards(shards: list[Path], directory: Path) -> list[str]:
    """Six of full size, however many there are: with few samples in each the start of curl would count most."""
    directory.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(SHARDS)]
    for number, name in enumerate(names):
        shutil.copyfile(shards[number % len(shards)], directory / name)
    return names


@contextlib.contextmanager
def _client(shards: Path, scratch: Path, depth: int) -> Iterator[Client]:
    settings = scratch / f"ahead-{depth}.toml"
    settings.write_text(f"[transforms]\nlook_ahead = {depth}\n")
    flags = ("--bucket", f"{BUCKET}=dir:{shards}", "--workers", "2", "--config", str(settings))
    with running_node(*flags) as node, Client(node.endpoint) as client:
        yield client


def _read(urls: list[str], work: float) -> float:
    """Seconds for a reader that takes a shard whole and then works on it."""
    start = time.perf_counter()
    for url in urls:
        subprocess.run(["curl", "-sSf", "-o", "/dev/null", url], check=True)
        time.sleep(work)
    return time.perf_counter() - start
