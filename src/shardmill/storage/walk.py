"""Files of a tree in key order, from any key on, with bounded memory.

A folder's names are sorted as its part of the keys, directories with their slash, so `a.b` comes before `a/b`. Of a
folder with more names than `WINDOW` only the next so many are held at once.
"""

import contextlib
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shardmill.core.refs import MAX_KEY
from shardmill.storage.tree import Tree

WINDOW = 100_000  # names of one folder held at once, some 10 MB
KEPT_NAMES = 4 * WINDOW  # of all folders remembered between pages

_TICK = 50_000_000  # ns; changes closer together may have one time
_COARSE_TICK = 3_000_000_000  # ns; the same where times are whole seconds
_SECOND = 1_000_000_000


Found = tuple[bytes, int]
"""A name and the descriptor of its folder, open until the next one is asked for."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Consecutive names of a folder in key order."""

    names: list[bytes]
    low: bytes
    """No name from here to the first one is missing."""
    is_last: bool


class Walk:
    """Seeks in one tree.

    Args:
        tree: Where.
        is_hidden: Names that are no part of keys.
    """

    def __init__(self, tree: Tree, *, is_hidden: Callable[[bytes], bool]) -> None:
        self._tree = tree
        self._is_hidden = is_hidden
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[tuple[int, int, int], _Window]] = OrderedDict()
        self._kept_names = 0

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
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
        with self._lock:
            kept = self._kept.get(base)
            if kept is not None and kept[0] == identity and _reaches(kept[1], low):
                self._kept.move_to_end(base)
                return kept[1]
        now = time.time_ns()
        window = self._read(folder, low)
        # A change within one tick of the clock leaves no trace in the folder's time.
        tick = _COARSE_TICK if status.st_mtime_ns % _SECOND == 0 else _TICK
        if now - status.st_mtime_ns > tick:
            self._keep(base, identity, window)
        return window

    def _keep(self, base: bytes, identity: tuple[int, int, int], window: _Window) -> None:
        with self._lock:
            old = self._kept.pop(base, None)
            self._kept[base] = identity, window
            self._kept_names += len(window.names) + 1 - (len(old[1].names) + 1 if old else 0)
            while self._kept_names > KEPT_NAMES and len(self._kept) > 1:
                _, (_, gone) = self._kept.popitem(last=False)
                self._kept_names -= len(gone.names) + 1

    def _read(self, folder: int, low: bytes) -> _Window:
        names: list[bytes] = []
        high: bytes | None = None
        # A small folder is kept whole, wherever the page begins.
        is_whole = True
        with os.scandir(folder) as entries:
            for entry in entries:
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
        return _Window(names, b"" if is_whole else low, high is None)

    def _key_name(self, entry: "os.DirEntry[str]") -> bytes | None:
        """The entry's part of a key; None for what is no object."""
        name = os.fsencode(entry.name)
        if self._is_hidden(name) or any(byte < 0x20 or byte == 0x7F for byte in name):
            return None
        try:
            name.decode()
            if entry.is_dir(follow_symlinks=self._tree.follows):
                return name + b"/"
            return name if entry.is_file(follow_symlinks=self._tree.follows) else None
        except (UnicodeDecodeError, OSError):
            return None


def _rest(names: list[bytes], start: int) -> Iterator[bytes]:
    """Without a copy: a page needs a thousand of what may be a hundred thousand."""
    for position in range(start, len(names)):
        yield names[position]


def _is_before(name: bytes, low: bytes) -> bool:
    """Whether neither the name nor anything below it is at `low` or behind it."""
    return name < low and not (name.endswith(b"/") and low.startswith(name))


def _reaches(window: _Window, low: bytes) -> bool:
    """Whether all that a page from `low` on begins with is in the window."""
    return window.low <= low and (window.is_last or low < window.names[-1])
