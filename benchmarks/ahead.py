"""An announced list: six shards read one after the other, each worked on before the next is asked for."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row, Samples, wait_quiet
from benchmarks.transforms import HERE
from shardmill import Client
from shardmill.testing.node import running_node

BUCKET = "gs://bench"


@contextlib.contextmanager
def _client(shards: Path, depth: int) -> Iterator[Client]:
    with tempfile.TemporaryDirectory(prefix="shardmill-bench-") as folder:
        settings = Path(folder) / "settings.toml"
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


def measure(shards: list[Path], rounds: int) -> list[Row]:
    """Announced against unannounced, for a reader that works as long as a shard takes, and for one that only reads."""
    names = [path.name for path in shards]
    slow, quick = Samples(), Samples()
    with _client(shards[0].parent, 0) as plain, _client(shards[0].parent, 1) as announced:
        clients = (plain, announced)
        specs = [client.transforms.add(f"{HERE / 'functions.py'}:crop", "bench").uuid for client in clients]
        for client, spec in zip(clients, specs, strict=True):
            _read([client.object_url(BUCKET, names[0], spec)], 0)  # warms the workers
        one = _read([plain.object_url(BUCKET, name, specs[0]) for name in names], 0) / len(names)
        for _ in range(rounds):
            for samples, work in ((slow, one * 1.2), (quick, 0.0)):
                taken = []
                for client, spec in zip(clients, specs, strict=True):
                    urls = client.expand_object_urls(BUCKET, spec, names=names)
                    taken.append(_read(urls, work))
                    wait_quiet()
                samples.add(taken[1] / taken[0])
    return [
        Row("six shards announced, of the time unannounced; reader works 1.2 × a shard's time", slow, ""),
        Row("six shards announced, of the time unannounced; reader only reads", quick, ""),
    ]
