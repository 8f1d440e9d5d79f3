"""A worker's side of the protocol: what it reports when, and how it and its node share room."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.etl.support import write_shard
from tests.worker.driving import DrivenWorker, DrivenZygote, described, zygote

# Of an arena of 4 MiB one fits.
LARGE = "def transform(sample):\n    sample['bin'] = sample['txt'].encode() * 3_000_000\n    return sample\n"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrivenZygote]:
    with zygote(tmp_path_factory.mktemp("loop")) as driven:
        yield driven


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s.tar", [{"txt": bytes([97 + ordinal])} for ordinal in range(26)])


@pytest.fixture
def worker(started: DrivenZygote, shard: Path) -> Iterator[DrivenWorker]:
    with contextlib.closing(started.fork()) as forked:
        forked.open(shard)
        yield forked


def send_batch(worker: DrivenWorker, number: int, samples: list[list[Any]], release: list[int]) -> None:
    head = {"t": "batch", "batch": number, "source": 1, "seed": 1, "epoch": 0, "release": release}
    worker.connection.send({**head, "samples": samples})


def part(worker: DrivenWorker) -> dict[str, Any]:
    head = worker.receive().head
    assert head["t"] == "part", head
    return head


def output(worker: DrivenWorker) -> tuple[int, int]:
    """Offset and size of the next output; a batch that took long ends with a report of nothing."""
    while not (results := heard(worker, "part")["results"]):
        pass
    ((_, outcome, ((offset, size, _),), *_),) = results
    assert outcome == "out"
    return offset, size


def heard(worker: DrivenWorker, kind: str) -> dict[str, Any]:
    """The next message that says something; it is of that kind."""
    while True:
        head = worker.receive().head
        if head["t"] != "part" or head["results"] or kind != "need":
            assert head["t"] == kind, head
            return head


def test_room_that_is_given_back_with_a_waiting_batch_is_there_for_the_one_in_work(
    worker: DrivenWorker, shard: Path
) -> None:
    samples = described(shard)
    worker.load(LARGE)
    send_batch(worker, 1, samples[:1], [])
    offset, size = output(worker)
    assert worker.read(offset, size).count(b"a") > 3_000_000
    # The second needs the room of the first, which comes back with the third.
    send_batch(worker, 2, samples[1:2], [])
    assert heard(worker, "need")["fits"]
    send_batch(worker, 3, samples[2:3], [offset])
    worker.connection.send({"t": "room", "regions": [], "size": None})
    second, size = output(worker)
    assert worker.read(second, size).count(b"b") > 3_000_000
    heard(worker, "need")
    worker.connection.send({"t": "room", "regions": [second], "size": None})
    third, size = output(worker)
    assert worker.read(third, size).count(b"c") > 3_000_000


def test_results_of_a_slow_batch_are_told_while_it_goes_on(worker: DrivenWorker, shard: Path) -> None:
    worker.load("import time\ndef transform(sample):\n    time.sleep(0.05)\n    return sample\n")
    send_batch(worker, 1, described(shard)[:5], [])
    heads = [part(worker)]
    while not heads[-1]["final"]:
        heads.append(part(worker))
    told = [[ordinal for ordinal, *_ in head["results"]] for head in heads]
    # The last result comes with the end of the batch: a run may be over with it, and whoever still has a batch of a run
    # that is over is killed.
    assert told == [[0], [1], [2], [3], [4]]
    seconds = [sum(values) for values in zip(*(head["seconds"] for head in heads), strict=True)]
    assert seconds[2] >= 0.25


def test_many_results_are_told_in_parts(worker: DrivenWorker, tmp_path: Path) -> None:
    many = write_shard(tmp_path / "many.tar", [{"txt": b"x"}] * 300)
    worker.load("def transform(sample):\n    return None\n")
    worker.open(many)
    send_batch(worker, 1, described(many), [])
    found: list[int] = []
    while True:
        head = part(worker)
        assert len(head["results"]) <= 64
        found += [ordinal for ordinal, *_ in head["results"]]
        if head["final"]:
            break
    assert found == list(range(300))


def test_what_the_node_refuses_room_for_is_no_ordinary_failure(worker: DrivenWorker, shard: Path) -> None:
    worker.load("def transform(sample):\n    return {'bin': bytes(100 << 20)}\n")
    results = worker.run(described(shard)[:2], limit=50 << 20)
    assert [outcome[0] for outcome in results.outcomes.values()] == ["fatal", "fatal"]
    assert results.message(0) == "too large"


def test_a_fan_out_larger_than_the_arena_comes_in_pieces(worker: DrivenWorker, shard: Path) -> None:
    worker.load(
        "def transform(sample):\n    for part in range(12):\n        yield {'bin': bytes([part]) * 1_500_000}\n"
    )
    results = worker.run(described(shard)[:2])
    assert [len(pieces) for pieces in results.outputs.values()] == [12, 12]
    for pieces in results.outputs.values():
        assert [piece.count(bytes([number])) > 1_000_000 for number, piece in enumerate(pieces) if number] == [
            True
        ] * 11


def test_a_source_is_closed_when_it_is_forgotten(worker: DrivenWorker, shard: Path) -> None:
    worker.load("import os\ndef transform(sample):\n    return {'txt': ' '.join(os.listdir('/proc/self/fd'))}\n")
    before = worker.run(described(shard)[:1]).framed
    for _ in range(20):
        worker.connection.send({"t": "forget", "source": 1})
        worker.open(shard)
    assert len(worker.run(described(shard)[:1]).framed) == len(before)


def test_the_sample_in_work_is_seen_by_the_node(worker: DrivenWorker, shard: Path) -> None:
    worker.load("import time\ndef transform(sample):\n    time.sleep(1000 if sample['__key__'] == '0003' else 0)\n")
    send_batch(worker, 7, described(shard)[:6], [])
    deadline = time.monotonic() + 10
    while worker.progress()[:2] != (7, 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
