"""One page of a listing over anything that can seek: prefix, delimiter and resumption in one place, without I/O.

An entry is an object's key or a rolled-up prefix; entries are in order of their UTF-8 bytes, and a page holds those
that sort after `after`. A rolled-up subtree is skipped by one seek, never walked.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from shardmill.core.meta import ListPage, ObjectMeta

Found = TypeVar("Found")

Seek = Callable[[bytes], Iterator[tuple[bytes, Found]]]
"""From the first key >= the bound on: keys in order, each with what `Load` makes its metadata from."""

Load = Callable[[bytes, Found], ObjectMeta | None]
"""Metadata of a key; None: it is gone. Asked for at once, before the next key is."""


def list_page(seek: Seek[Found], load: Load[Found], *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
    """One page of at most `limit` entries."""
    if limit <= 0:
        return ListPage((), (), None)
    start, mark, last = prefix.encode(), delimiter.encode(), after.encode()
    objects: list[ObjectMeta] = []
    prefixes: list[str] = []
    bound = _first(start, mark, last)
    final = ""
    while bound is not None:
        jump: bytes | None = None
        for key, found in seek(bound):
            if not key.startswith(start):
                break
            cut = key.find(mark, len(start)) if mark else -1
            common = key[: cut + len(mark)] if cut >= 0 else None
            if common is not None and common <= last:
                jump = successor(common)
                break
            if len(objects) + len(prefixes) == limit:
                return ListPage(tuple(objects), tuple(prefixes), final)
            if common is not None:
                final = common.decode()
                prefixes.append(final)
                jump = successor(common)
                break
            meta = load(key, found)
            if meta is not None:
                objects.append(meta)
                final = meta.key
        bound = jump
    return ListPage(tuple(objects), tuple(prefixes), None)


def _first(start: bytes, mark: bytes, last: bytes) -> bytes | None:
    """Where entries that sort after `last` begin; a prefix that was given already is not even entered."""
    if not last:
        return start
    cut = last.find(mark, len(start)) if mark and last.startswith(start) else -1
    return successor(last[: cut + len(mark)]) if cut >= 0 else max(start, last + b"\0")


def successor(prefix: bytes) -> bytes | None:
    """The least byte string after all that start with `prefix`; None if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None
