"""What a worker does with messages that reach it in the middle of a batch."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etl.support import write_shard
from tests.worker.driving import ARENA, DrivenWorker, described, new_arena, zygote

SIZE = 1 << 20  # bytes that each sample gives: three of them, with their frames, fill the arena
FUNCTION = f"""
def transform(sample):
    return {{"__key__": sample["__key__"], "bin": bytes([int(sample["__key__"])]) * {SIZE}}}
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[DrivenWorker]:
    with zygote(tmp_path) as started:
        yield started.fork()


def test_a_waiting_batch_gives_back_regions_of_the_arena_that_there_was(worker: DrivenWorker, tmp_path: Path) -> None:
    """Else it would give away what the samples before it have in the new one, at the same offsets."""
    shard = write_shard(tmp_path / "shard.tar", [{"txt": b"x"} for _ in range(6)])
    samples = described(shard)
    assert worker.load(FUNCTION, decoder=None).head["t"] == "loaded"
    worker.open(shard)
    head = {"t": "batch", "source": 1, "seed": 1, "epoch": 0}

    worker.connection.send({**head, "batch": 1, "release": [], "samples": samples[:1]})
    first = worker.receive().head["results"][0][2][0][0]
    # The third of these finds no room; behind them waits a batch that brings back the region of the first sample.
    worker.connection.send({**head, "batch": 2, "release": [], "samples": samples[1:5]})
    worker.connection.send({**head, "batch": 3, "release": [first], "samples": samples[5:]})
    while (said := worker.receive().head)["t"] == "part":
        assert not said["final"]
    assert said["t"] == "need"
    successor = new_arena(2 * ARENA)
    worker.connection.send({"t": "room", "regions": [], "size": 2 * ARENA}, descriptors=(successor,))
    with mmap.mmap(successor, 2 * ARENA, prot=mmap.PROT_READ) as view:
        os.close(successor)
        placed: list[list[int]] = []
        is_over = False
        while not is_over:
            said = worker.receive().head
            placed += [item[2][0] for item in said["results"]]
            is_over = said["final"] and said["batch"] == 3
        assert len({offset for offset, _, _ in placed}) == len(placed) >= 2
        for ordinal, (offset, size, _) in enumerate(placed, 6 - len(placed)):
            assert view[offset : offset + size].count(bytes([ordinal])) >= SIZE
