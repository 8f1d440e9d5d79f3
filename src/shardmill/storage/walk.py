"""Files of a tree in key order, from any key on, with bounded memory.

A folder's names are sorted as its part of the keys, directories with their slash, so `a.b` comes before `a/b`. They
are remembered until the folder changes, so that the next page reads no folder, unless there are links among them that
are followed; of one with more names than `WINDOW` only the next so many.
"""

import contextlib
import os
import re
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from shardmill.core.refs import MAX_KEY
from shardmill.storage.tree import Tree

WINDOW = 1_000_000  # names of one folder held at once
KEPT = 64 << 20  # bytes of names of all folders, remembered between pages; the last folder's stay whatever they take

_TICK = 50_000_000  # ns; changes closer together may have one time
_COARSE_TICK = 3_000_000_000  # ns; the same where times are whole seconds
_SECOND = 1_000_000_000
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_ABOUT = 200  # bytes of a folder with no names in it


Found = tuple[bytes, int]
"""A name and the descriptor of its folder, open until the next one is asked for."""


class _Names(Sequence[bytes]):
    """Names one behind the other: a million of them are some 20 MB, as objects they were 60."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self._text = b"".join(names)
        self._stops = array("Q" if len(self._text) >> 32 else "I")
        stop = 0
        for name in names:
            stop += len(name)
            self._stops.append(stop)

    @overload
    def __getitem__(self, number: int) -> bytes: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[bytes]: ...

    def __getitem__(self, number: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        return self._text[self._stops[number - 1] if number else 0 : self._stops[number]]

    def __len__(self) -> int:
        return len(self._stops)

    @property
    def memory(self) -> int:
        """Bytes, about."""
        return len(self._text) + len(self._stops) * self._stops.itemsize + _ABOUT


@dataclass(frozen=True, slots=True)
class _Window:
    """Consecutive names of a folder in key order."""

    names: _Names
    low: bytes
    """No name from here to the first one is missing."""
    is_last: bool
    has_links: bool
    """What they lead to may come, go or change, and the folder does not."""


_Identity = tuple[int, int, int, int]
"""What changes when a name in a folder does: device, inode, time of change of its names and of itself."""


class Walk:
    """Seeks in one tree.

    Args:
        tree: Where.
        is_hidden: Names that are no part of keys.
        remembers: The times of folders tell of changes.
    """

    def __init__(self, tree: Tree, *, is_hidden: Callable[[bytes], bool], remembers: bool = True) -> None:
        self._tree = tree
        self._is_hidden = is_hidden
        self._remembers = remembers
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[_Identity, _Window]] = OrderedDict()
        self._kept_memory = 0

    def seek(self, bound: bytes) -> Iterator[tuple[bytes, Found]]:
        """Keys >= `bound` in order, each with where it was found."""
        with self._tree.folder(()) as root:
            yield from self._below(root, b"", bound, frozenset())

    def status(self, found: Found) -> os.stat_result | None:
        """Of what was found; None: it has gone."""
        name, folder = found
        try:
            return os.stat(name, dir_fd=folder, follow_symlinks=self._tree.follows)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _below(
        self, folder: int, base: bytes, bound: bytes, above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[bytes, Found]]:
        """What is below a folder; `base` is its own key with its slash, `above` are the folders that it is in."""
        status = os.fstat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return  # a link leads back to a folder that it is in
        for name in self._names_from(folder, base, bound[len(base) :] if bound.startswith(base) else b""):
            key = base + name
            if len(key) > MAX_KEY:
                continue
            if name.endswith(b"/"):
                if bound <= key or bound.startswith(key):
                    with self._entered(name[:-1], folder) as inner:
                        if inner is not None:
                            yield from self._below(inner, key, bound, above | {identity})
            elif key >= bound:
                yield key, (name, folder)

    @contextlib.contextmanager
    def _entered(self, name: bytes, folder: int) -> Iterator[int | None]:
        try:
            inner = self._tree.enter(name, folder)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            yield inner
        finally:
            os.close(inner)

    def _names_from(self, folder: int, base: bytes, low: bytes) -> Iterator[bytes]:
        """Names >= `low`, and before them the one of the directory that holds it."""
        window = self._window(folder, base, low)
        # The entry before the bound may be that directory.
        yield from _rest(window.names, max(0, bisect_left(window.names, low) - 1))
        while not window.is_last:
            last = window.names[-1]
            window = self._window(folder, base, last)
            yield from _rest(window.names, bisect_right(window.names, last))

    def _window(self, folder: int, base: bytes, low: bytes) -> _Window:
        """Names from `low` on, remembered as long as the folder does not change."""
        status = os.fstat(folder)
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        with self._lock:
            kept = self._kept.get(base)
            if kept is not None and kept[0] == identity and _reaches(kept[1], low):
                self._kept.move_to_end(base)
                return kept[1]
        now = time.time_ns()
        window = self._read(folder, low)
        # A change within one tick of the clock leaves no trace in the folder's times.
        tick = _COARSE_TICK if status.st_ctime_ns % _SECOND == 0 else _TICK
        if now - status.st_ctime_ns > tick and self._remembers and not window.has_links:
            self._keep(base, identity, window)
        return window

    def _keep(self, base: bytes, identity: _Identity, window: _Window) -> None:
        with self._lock:
            old = self._kept.pop(base, None)
            self._kept[base] = identity, window
            self._kept_memory += window.names.memory - (old[1].names.memory if old else 0)
            while self._kept_memory > KEPT and len(self._kept) > 1:
                _, (_, gone) = self._kept.popitem(last=False)
                self._kept_memory -= gone.names.memory

    def _read(self, folder: int, low: bytes) -> _Window:
        names: list[bytes] = []
        high: bytes | None = None
        # A small folder is kept whole, wherever the page begins.
        is_whole = True
        has_links = False
        with os.scandir(folder) as entries:
            for entry in entries:
                has_links = has_links or (self._tree.follows and entry.is_symlink())
                name = self._key_name(entry)
                if name is None or (not is_whole and _is_before(name, low)) or (high is not None and name > high):
                    continue
                names.append(name)
                if len(names) >= 2 * WINDOW:
                    if is_whole:
                        is_whole = False
                        names = [name for name in names if not _is_before(name, low)]
                    if len(names) > WINDOW:
                        names.sort()
                        del names[WINDOW:]
                        high = names[-1]
        names.sort()
        return _Window(_Names(names), b"" if is_whole else low, high is None, has_links)

    def _key_name(self, entry: "os.DirEntry[str]") -> bytes | None:
        """The entry's part of a key; None for what is no object."""
        name = os.fsencode(entry.name)
        if self._is_hidden(name) or _CONTROL.search(name):
            return None
        try:
            name.decode()
            if entry.is_dir(follow_symlinks=self._tree.follows):
                return name + b"/"
            return name if entry.is_file(follow_symlinks=self._tree.follows) else None
        except (UnicodeDecodeError, OSError):
            return None


def _rest(names: Sequence[bytes], start: int) -> Iterator[bytes]:
    """Without a copy: a page needs a thousand of what may be a hundred thousand."""
    for position in range(start, len(names)):
        yield names[position]


def _is_before(name: bytes, low: bytes) -> bool:
    """Whether neither the name nor anything below it is at `low` or behind it."""
    return name < low and not (name.endswith(b"/") and low.startswith(name))


def _reaches(window: _Window, low: bytes) -> bool:
    """Whether all that a page from `low` on begins with is in the window."""
    return window.low <= low and (window.is_last or low < window.names[-1])
