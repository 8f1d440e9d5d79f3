"""What is about to change, noted before it changes: after a kill the index is completed from these, not by a scan.

A note is one appended write, which survives the process. Two generations take turns: a file is removed once all of its
changes are in the index.
"""

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from shardmill.storage.files import write_all

ROTATE = 1 << 20  # bytes

_LENGTHS = struct.Struct("<HH")


class Generation:
    """One file of notes and how many of its changes are not in the index yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.pending = 0
        self.is_old = False


class Journal:
    """Notes of changes; used from the loop's thread but for `read_notes`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._old = sorted(directory.glob("*.notes"))
        numbers = [int(path.stem) for path in self._old if path.stem.isdigit()]
        self._numbers = itertools.count(max(numbers, default=0) + 1)
        self._current = self._next()

    def read_notes(self) -> Iterator[tuple[str, str]]:
        """`store id, key` of every change that an earlier process began."""
        for path in self._old:
            data = path.read_bytes()
            position = 0
            while position + _LENGTHS.size <= len(data):
                first, second = _LENGTHS.unpack_from(data, position)
                stop = position + _LENGTHS.size + first + second
                if stop > len(data):
                    break
                middle = position + _LENGTHS.size + first
                yield data[position + _LENGTHS.size : middle].decode(), data[middle:stop].decode()
                position = stop

    def forget_old(self) -> None:
        """The notes of earlier processes are in the index."""
        for path in self._old:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._old = []

    def note(self, store: str, key: str) -> Generation:
        """Note a change before it is made; give the generation back to `done`."""
        if self._current.size > ROTATE:
            self._current.is_old = True
            old, self._current = self._current, self._next()
            self._retire(old)
        generation = self._current
        first, second = store.encode(), key.encode()
        record = _LENGTHS.pack(len(first), len(second)) + first + second
        write_all(generation.descriptor, record)
        generation.size += len(record)
        generation.pending += 1
        return generation

    def done(self, generation: Generation) -> None:
        """The change is in the index, or was not made."""
        generation.pending -= 1
        self._retire(generation)

    def close(self) -> None:
        """Every change is in the index."""
        os.close(self._current.descriptor)
        self._current.path.unlink(missing_ok=True)

    def _retire(self, generation: Generation) -> None:
        if generation.is_old and not generation.pending:
            os.close(generation.descriptor)
            generation.path.unlink(missing_ok=True)

    def _next(self) -> Generation:
        return Generation(self._directory / f"{next(self._numbers)}.notes")
