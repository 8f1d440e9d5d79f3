"""Batches of 64 into tensors: shardmill's loader on transformed URLs beside loaders that run the function themselves.

Node and client share the same cores. The function is torchvision's transform alone for those that make tensors
themselves, so that none of them turns axes around for the store's sake.
"""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import Spoken, cpu_of, spoken
from benchmarks.table import Row, Samples, ratio_of, wait_quiet
from benchmarks.transforms import BUCKET, HERE, Bare, Served, Setting, served

LOADERS = HERE / "peers" / "loaders.py"
TENSORFLOW = HERE / "peers" / "tensorflow_service.py"
WORKERS = 2


@dataclass
class Loader:
    """One that gives batches, with what was measured of it."""

    name: str
    process: Spoken
    service: int | None = None
    """Process beside it that does work for it, and that is no node."""
    rate: Samples = field(default_factory=Samples)
    """Samples a second over a whole pass."""
    cpu: Samples = field(default_factory=Samples)
    """Milliseconds of the client's CPU, with its worker processes, a sample."""
    total: Samples = field(default_factory=Samples)
    """With that of the node or service."""

    def run(self, node: int) -> None:
        """One pass over everything."""
        others = [node] if self.service is None else [self.service]
        client, beside = cpu_of(self.process.pid), sum(map(cpu_of, others))
        samples, seconds, _ = map(float, self.process.ask())
        client, beside = cpu_of(self.process.pid) - client, sum(map(cpu_of, others)) - beside
        self.rate.add(samples / seconds)
        self.cpu.add(client / samples * 1000)
        self.total.add((client + beside) / samples * 1000)


def measure(setting: Setting, scratch: Path, rounds: int, tensorflow: Path | None) -> list[Row]:
    """All loaders in turn, in every round."""
    pictures = scratch / "pictures"
    _unpack(setting.shards, pictures)
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(contextlib.closing(Bare(setting, WORKERS)))
        node = stack.enter_context(served(setting, WORKERS))
        limit = Samples()
        loaders = list(_loaders(stack, setting, node, pictures))
        if tensorflow is not None:
            loaders.append(_tensorflow(stack, tensorflow, pictures))
        for number in range(rounds + 1):
            limit.add(bare.rate())
            wait_quiet()
            for loader in loaders[number % len(loaders) :] + loaders[: number % len(loaders)]:
                loader.run(node.node.pid)
                wait_quiet()
    # The first pass starts worker processes, which then stay.
    for kept in (limit, *(kept for loader in loaders for kept in (loader.rate, loader.cpu, loader.total))):
        del kept.values[0]
    return rows_of(loaders, limit)


def _loaders(stack: contextlib.ExitStack, setting: Setting, node: Served, pictures: Path) -> Iterator[Loader]:
    names = [path.name for path in setting.shards]
    plain = [node.client.object_url(BUCKET, name) for name in names]
    # Announced, as those of a training script are: a pass ends before the next begins, so nothing is done ahead of the
    # clock.
    transformed = node.client.expand_object_urls(BUCKET, node.spec, names=names)
    kinds: list[tuple[str, str, int, list[str]]] = [
        ("shardmill.torch on transformed URLs", "shardmill", 0, transformed),
        ("WebDataset on transformed URLs, 1 worker", "webdataset-in-store", 1, transformed),
        ("WebDataset on the client, 0 workers", "webdataset-here", 0, plain),
        ("WebDataset on the client, 1 worker, kept", "webdataset-here", 1, plain),
        ("WebDataset on the client, 2 workers, kept", "webdataset-here", 2, plain),
        ("WebDataset on the client, 2 workers, started with the pass", "webdataset-here-anew", 2, plain),
        ("SPDL on plain files, 2 threads", "spdl", 2, [str(pictures)]),
        ("LitData raw on plain files, 2 workers", "litdata", 2, [str(pictures)]),
    ]
    for name, kind, workers, sources in kinds:
        command: list[str | Path] = [setting.python, LOADERS, kind, setting.target, str(workers), *sources]
        yield Loader(name, stack.enter_context(spoken(command)))


def _tensorflow(stack: contextlib.ExitStack, python: Path, pictures: Path) -> Loader:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    service = stack.enter_context(spoken([python, TENSORFLOW, "serve"], quiet))
    address = f"localhost:{service.said[0]}"
    process = stack.enter_context(spoken([python, TENSORFLOW, "read", address, pictures], quiet))
    return Loader("tf.data service, TensorFlow's operations on plain files", process, service.pid)


def _unpack(shards: list[Path], directory: Path) -> None:
    directory.mkdir()
    for path in shards:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    (directory / f"{path.stem}-{os.path.basename(member.name)}").write_bytes(file.read())


HELD_TO = {
    "WebDataset on the client, 0 workers": 1.8,
    "WebDataset on the client, 2 workers, kept": 1.2,
    "WebDataset on the client, 2 workers, started with the pass": 1.2,
}
"""Loader → shardmill's rate as a multiple of its."""


def rows_of(loaders: list[Loader], limit: Samples) -> list[Row]:
    """With what shardmill, the first, is held to.

    Args:
        loaders: Measured.
        limit: Samples a second of bare processes, which make no batches.
    """
    ours, *peers = loaders
    rows = [Row(f"bare processes ({WORKERS}), without batches: the limit", limit, "samples/s")]
    rows += [Row(f"{loader.name}: batches", loader.rate, "samples/s", bar=loader.name) for loader in loaders]
    for peer in peers:
        rows.append(
            Row(
                f"shardmill.torch, of {peer.name}",
                ratio_of(ours.rate, peer.rate),
                "",
                at_least=HELD_TO.get(peer.name),
                contest="rate",
            )
        )
    for peer in peers:
        if peer.name in HELD_TO:
            rows.append(Row(f"the most that could be had, of {peer.name}", ratio_of(limit, peer.rate), ""))
    rows += [Row(f"{loader.name}: client's CPU per sample", loader.cpu, "ms") for loader in loaders]
    for peer in peers:
        if peer.name in HELD_TO:
            what = f"client's CPU per sample, of that of {peer.name}"
            rows.append(Row(what, ratio_of(ours.cpu, peer.cpu), "", at_most=0.25))
    rows += [Row(f"{loader.name}: CPU of client and store together", loader.total, "ms") for loader in loaders]
    for peer in peers:
        if peer.name in HELD_TO:
            what = f"CPU of client and store together, of that of {peer.name}"
            rows.append(Row(what, ratio_of(ours.total, peer.total), "", contest="cost"))
    return rows
