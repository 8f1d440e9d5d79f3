"""What is about to change, noted before it changes: after a kill the index is completed from these, not by a scan.

A note is one write, which survives the process; flushed, it survives a power cut too. Two files take turns, their space
taken at the start, so that objects can be removed from a full disk; a file is used again once all of its changes are in
the index. A record is two lengths, a checksum, the store's id and the key; nothing behind the first one that is not
whole counts.
"""

import contextlib
import itertools
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import xxhash

from shardmill.core.errors import InsufficientStorage
from shardmill.storage.files import disk_errors, reserve, sync_directory

ROTATE = 1 << 20  # bytes

_HEAD = struct.Struct("<HHI")
_END = bytes(_HEAD.size)
_LARGEST = 4096  # bytes; more than any record has


class Generation:
    """One file of notes and how many of its changes are not in the index yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.pending = 0
        with contextlib.suppress(InsufficientStorage), disk_errors("the journal"):
            reserve(self.descriptor, ROTATE + _LARGEST)

    def append(self, record: bytes) -> None:
        """Write one record and an end behind it; a failure leaves what was there."""
        with disk_errors("the journal"):
            written = os.pwrite(self.descriptor, record + _END, self.size)
            if written < len(record):
                # A record cut by a full disk fails its checksum, and the next one takes its place.
                raise InsufficientStorage("the journal: the disk is full; nothing was changed")
        self.size += len(record)

    def sync(self) -> None:
        """Make what is noted durable; blocking."""
        with disk_errors("the journal"):
            os.fdatasync(self.descriptor)

    def close(self) -> None:
        """Its notes stay where a change is not in the index."""
        os.close(self.descriptor)
        if not self.pending:
            self.path.unlink(missing_ok=True)


class Journal:
    """Notes of changes; `note` and `done` are for any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._old = sorted(directory.glob("*.notes"))
        numbers = [int(path.stem) for path in self._old if path.stem.isdigit()]
        self._numbers = itertools.count(max(numbers, default=0) + 1)
        self._current, spare = self._new(), self._new()
        self._spare = [spare]
        self._full: list[Generation] = []
        self._lock = threading.Lock()

    def read_notes(self) -> Iterator[tuple[str, str]]:
        """`store id, key` of every change that an earlier process began."""
        for path in self._old:
            yield from _records(path.read_bytes())

    def forget_old(self) -> None:
        """The notes of earlier processes are in the index."""
        for path in self._old:
            path.unlink(missing_ok=True)
        self._old = []

    def note(self, store: str, key: str) -> Generation:
        """Note a change before it is made; give the generation back to `done`.

        Raises:
            InsufficientStorage: The disk is full; nothing may be changed.
        """
        first, second = store.encode(), key.encode()
        with self._lock:
            if self._current.size > ROTATE:
                self._rotate()
            generation = self._current
            generation.append(_HEAD.pack(len(first), len(second), _checksum(first, second)) + first + second)
            generation.pending += 1
        return generation

    def done(self, generation: Generation) -> None:
        """The change is in the index, or was not made."""
        with self._lock:
            generation.pending -= 1
            if not generation.pending and generation in self._full:
                self._full.remove(generation)
                self._spare.append(generation)

    def close(self) -> None:
        """No change is on its way."""
        for generation in (self._current, *self._spare, *self._full):
            generation.close()

    def _rotate(self) -> None:
        if self._current.pending:
            self._full.append(self._current)
            self._current = self._spare.pop() if self._spare else self._new()
        # What is left of the notes before is of changes that the index has; looked up again they say the same.
        self._current.size = 0

    def _new(self) -> Generation:
        generation = Generation(self._directory / f"{next(self._numbers)}.notes")
        with contextlib.suppress(InsufficientStorage), disk_errors("the journal"):
            sync_directory(self._directory)
        return generation


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    position = 0
    while position + _HEAD.size <= len(data):
        length, more, checksum = _HEAD.unpack_from(data, position)
        start = position + _HEAD.size
        middle, position = start + length, start + length + more
        first, second = data[start:middle], data[middle:position]
        if not length or position > len(data) or checksum != _checksum(first, second):
            return
        yield first.decode(), second.decode()


def _checksum(store: bytes, key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(store + b"\0" + key) & 0xFFFFFFFF
