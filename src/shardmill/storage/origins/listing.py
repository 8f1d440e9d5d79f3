"""Pages of a listing, made of what a store lists: exact prefixes, any delimiter, and memory for one page."""

import bisect
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from shardmill.core.errors import BackendUnavailable, BadRequest
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.origins import OriginFacts
from shardmill.core.refs import check_key

SKIPPED = 2000  # keys read below a prefix that is rolled up, before the listing is begun anew behind it
LAST = "\U0010ffff"  # sorts behind every character


@dataclass(frozen=True, slots=True)
class Listed:
    """A key as the store has it, whole, with its facts."""

    facts: OriginFacts


Stream = Callable[[str, str], AsyncGenerator[Listed, None]]
"""List what lies below a folder (no slash at its end; empty: all) and, where the store can, sorts after a key."""


class Page:
    """The first `limit` entries of all that are added, in the order of their UTF-8 bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: list[bytes] = []
        self._entries: dict[bytes, ObjectMeta | None] = {}

    def add(self, name: str, meta: ObjectMeta | None) -> bool:
        """Add an object, or a prefix (None); False if it was there already or comes too late to be on the page."""
        encoded = name.encode()
        if encoded in self._entries or (self.is_over and encoded > self._names[-1]):
            return False
        bisect.insort(self._names, encoded)
        self._entries[encoded] = meta
        if len(self._names) > self._limit + 1:
            del self._entries[self._names.pop()]
        return True

    @property
    def count(self) -> int:
        return min(self._limit, len(self._names))

    @property
    def is_over(self) -> bool:
        """Whether there is more than fits."""
        return len(self._names) > self._limit

    def build(self, *, is_more: bool = False) -> ListPage:
        names = self._names[: self._limit]
        objects = tuple(meta for name in names if (meta := self._entries[name]) is not None)
        prefixes = tuple(name.decode() for name in names if self._entries[name] is None)
        return ListPage(objects, prefixes, names[-1].decode() if names and (is_more or self.is_over) else None)


def roll_up(key: str, prefix: str, delimiter: str) -> tuple[str, bool]:
    """The name that a key has in a listing, and whether that is a rolled-up prefix."""
    if not delimiter:
        return key, False
    head, mark, _ = key[len(prefix) :].partition(delimiter)
    return (prefix + head + mark, True) if mark else (key, False)


def is_listable(key: str) -> bool:
    """Whether a node can have the key at all."""
    try:
        check_key(key)
    except BadRequest:
        return False
    return True


def listed_meta(key: str, facts: OriginFacts) -> ObjectMeta:
    """An entry of a page."""
    return ObjectMeta(key, facts.size or 0, facts.etag, facts.version, facts.modified or 0.0)


async def list_stream(
    stream: Stream, *, cut: str, prefix: str, delimiter: str, after: str, limit: int, is_ordered: bool
) -> tuple[ListPage, int]:
    """One page, and how many keys were left out, of a store that lists folders only.

    Args:
        stream: Gives whole keys.
        cut: What all keys of the bucket start with; not part of the page's names.
        prefix: Of the listing.
        delimiter: Or empty.
        after: Names up to this one are left out.
        limit: Of objects and prefixes together.
        is_ordered: The stream is in the order of UTF-8 bytes; if not, each page reads all of it.
    """
    whole = cut + prefix
    folder = whole.rpartition("/")[0]
    if folder and ("" in folder.split("/") or {".", ".."} & set(folder.split("/"))):
        return ListPage((), (), None), 0  # no key that could be carried lies there
    page, unlisted = Page(limit), 0
    begin: str | None = max(cut + after if after else "", whole[:-1], key=str.encode)
    while begin is not None:
        restart: str | None = None
        skipped, is_first, last = 0, True, ""
        async with aclosing(stream(folder, _offset(begin))) as entries:
            async for entry in entries:
                path = entry.facts.key
                does_begin = not is_first or path.encode() > begin.encode()
                is_first = False
                if is_ordered and path < last:
                    raise BackendUnavailable(
                        f"the store lists {path!r} behind {last!r}, not by key, so that no page would be whole; give "
                        "the bucket an access key of its own, with which a store that lists by folder can be listed"
                    )
                last = path
                if not path.startswith(whole):
                    if is_ordered and path.encode() > whole.encode():
                        break
                    continue
                key = path[len(cut) :]
                name, is_prefix = roll_up(key, prefix, delimiter)
                if key.encode() <= after.encode() or name.encode() <= after.encode():
                    continue
                if not is_listable(key):
                    unlisted += 1
                    continue
                is_new = page.add(name, None if is_prefix else listed_meta(key, entry.facts))
                if is_ordered and page.is_over:
                    break
                skipped = 0 if is_new else skipped + 1
                if is_ordered and is_prefix and skipped >= SKIPPED and does_begin:
                    restart = cut + name + LAST
                    break
        begin = restart
    return page.build(), unlisted


def _offset(begin: str) -> str:
    """A key to begin after, as the library can take it; what comes before `begin` all the same is left out later."""
    segments = begin.rstrip("/").split("/")
    return "" if "" in segments or {".", ".."} & set(segments) else begin.rstrip("/")
