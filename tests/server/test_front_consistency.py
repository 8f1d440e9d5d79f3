"""A write is visible to the next read, and no answer is torn, while writers and readers meet on few keys."""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from shardmill.testing.node import running_node
from tests.server.wire import Wire, request

KEYS = 4
READERS = 8
SECONDS = 3.0
SIZES = (1000, 70_000, 200_000, 1_500_000)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory behind `ais://notes`."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def wire(notes: Path) -> Iterator[Wire]:
    """A node of these tests alone: it is asked for a great many things."""
    buckets = ("--bucket", "ais://pool", "--bucket", f"ais://notes=dir-rw:{notes}")
    with running_node(*buckets, "--durability", "kill") as node:
        yield Wire(node, (str(notes),))


def body_of(number: int, size: int) -> bytes:
    """Every 8 bytes say which version they are of."""
    return number.to_bytes(8, "big") * (size // 8)


class Story:
    """Versions of keys: those that were stored before a read began, and those that a read has seen."""

    def __init__(self, wire: Wire, bucket: str, notes: Path | None) -> None:
        self.wire = wire
        self.bucket = bucket
        self.notes = notes
        self.written = [0] * KEYS
        self.is_over = threading.Event()
        self.wrong: list[str] = []
        self.reads = 0

    def path(self, key: int) -> str:
        return f"/o/ais/{self.bucket}/met-{key}"

    def write(self, key: int) -> None:
        """One writer a key; each version is a larger number."""
        chance, number = random.Random(key), 0
        with self.wire.connect() as peer:
            while not self.is_over.is_set():
                number += 1
                body = body_of(number, chance.choice(SIZES))
                if self.notes is not None and number % 2:
                    # Replaced by hand, all at once.
                    other = self.notes / f"other-{key}"
                    other.write_bytes(body)
                    os.rename(other, self.notes / f"met-{key}")
                elif self.removes(number):
                    peer.send(request("DELETE", self.path(key)))
                    assert peer.read().status == 204
                else:
                    peer.send(request("PUT", self.path(key), body=body))
                    assert peer.read().status in (200, 201)
                # A removed version counts as one: nothing older may be seen behind it.
                self.written[key] = number

    def removes(self, number: int) -> bool:
        """Whether a version is that there is none."""
        return number % 7 == 0 and (self.notes is None or number % 2 == 0)

    def read(self, seed: int) -> None:
        chance = random.Random(seed)
        seen = [0] * KEYS
        with self.wire.connect() as peer:
            while not self.is_over.is_set():
                key = chance.randrange(KEYS)
                written = self.written[key]
                least = max(written, seen[key])
                peer.send(request("GET", self.path(key)))
                answer = peer.read()
                self.reads += 1
                if answer.status == 404:
                    # One may be on its way that is not counted yet.
                    if written and not any(map(self.removes, range(written, self.written[key] + 2))):
                        self.wrong.append(f"key {key}: nothing after {written}")
                    continue
                if answer.status == 409:
                    # A file was replaced while it was read.
                    assert self.notes is not None
                    continue
                number = int.from_bytes(answer.body[:8], "big")
                if answer.body != number.to_bytes(8, "big") * (len(answer.body) // 8):
                    self.wrong.append(f"key {key}: torn at {number}")
                if number < least:
                    self.wrong.append(f"key {key}: {number} after {least}")
                seen[key] = max(seen[key], number)


@pytest.mark.parametrize("bucket", ["pool", "notes"])
def test_readers_see_what_was_written_and_nothing_between(wire: Wire, notes: Path, bucket: str) -> None:
    story = Story(wire, bucket, notes if bucket == "notes" else None)
    with ThreadPoolExecutor(KEYS + READERS) as threads:
        work = [threads.submit(story.write, key) for key in range(KEYS)]
        work += [threads.submit(story.read, seed) for seed in range(READERS)]
        # Until somebody fails, or for a while.
        wait(work, SECONDS, return_when=FIRST_EXCEPTION)
        story.is_over.set()
        for done in work:
            done.result()
    assert story.wrong == []
    assert story.reads > 100
    assert all(story.written)
