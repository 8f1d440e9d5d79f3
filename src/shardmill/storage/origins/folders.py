"""Listings in key order of a store that lists by folder: what lies in `a/` comes at the name `a` there, before `a.b`.

Such a store keeps keys as paths, and `start-after=a` skips the folder `a/`, too. So folder is asked for after folder,
and each comes where its name with the slash sorts. At most those wait whose names begin one another; the folders before
the start of a page that sort behind it are known by its name alone, and asked for when their turn comes. The order of
characters is that of their UTF-8 bytes.
"""

import heapq
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from shardmill.core.origins import OriginFacts
from shardmill.storage.origins.listing import LAST


@dataclass(frozen=True, slots=True)
class Document:
    """One answer of a store."""

    objects: list[OriginFacts]
    prefixes: list[str]
    token: str | None


Ask = Callable[[dict[str, str]], Awaitable[Document]]
"""Send a request with these parameters, beside those that are common to all."""

Entry = tuple[str, OriginFacts | None]
"""A whole key with its facts, or a folder with its slash."""


class OutOfOrder(Exception):
    """A store lists a name behind one that it should come before."""

    def __init__(self, name: str, last: str) -> None:
        super().__init__(f"{name!r} behind {last!r}")


async def is_by_folder(ask: Ask, prefix: str, folder: str) -> bool:
    """Whether a store lists by folder, told by one that there is: what follows all of `a.…` is in `a/`, or is not.

    Args:
        ask: The store.
        prefix: Of what is listed.
        folder: That has it, too, up to its next slash.
    """
    document = await ask({"prefix": prefix, "start-after": f"{folder[:-1]}.{LAST}", "max-keys": "1"})
    return not document.objects or document.objects[0].key > folder + LAST


async def list_level(ask: Ask, prefix: str, after: str, *, limit: int) -> AsyncGenerator[Entry, None]:
    """Keys up to the next slash, and folders, that start with `prefix` and sort after `after`, in order."""
    async with aclosing(_level(ask, prefix, after, limit)) as level:
        async for name, facts, is_seen in level:
            if facts is None and (name <= after or not (is_seen or await _is_there(ask, name))):
                continue
            yield name, facts


async def list_below(ask: Ask, prefix: str, after: str, *, limit: int) -> AsyncGenerator[Entry, None]:
    """All keys that start with `prefix` and sort after `after`, in order."""
    levels = [_level(ask, prefix, after, limit)]
    try:
        while levels:
            try:
                name, facts, _ = await anext(levels[-1])
            except StopAsyncIteration:
                levels.pop()
                continue
            if facts is None:
                levels.append(_level(ask, name, after, limit))
            else:
                yield name, facts
    finally:
        for level in reversed(levels):
            await level.aclose()


async def _is_there(ask: Ask, folder: str) -> bool:
    document = await ask({"prefix": folder, "max-keys": "1"})
    return bool(document.objects)


async def _level(
    ask: Ask, prefix: str, after: str, limit: int
) -> AsyncGenerator[tuple[str, OriginFacts | None, bool], None]:
    """As `list_level`, but the folder that has `after` in it comes, too; the last tells whether a folder was listed."""
    if not after.startswith(prefix):
        if after > prefix:
            return
        after = ""
    base = prefix[: prefix.rfind("/") + 1]
    start = base + after[len(base) :].partition("/")[0]
    # Folders that come before `start` by their name and behind it with their slash; the last is that of its own name.
    names = [start[:end] for end in range(len(base) + 1, len(start)) if start[end] < "/"]
    names += [start] if start != base else []
    waiting = [name + "/" for name in names if (name + "/").startswith(prefix)]
    heapq.heapify(waiting)
    seen: set[str] = set()
    last = ""
    query = {"prefix": prefix, "delimiter": "/", "max-keys": str(limit)}
    if start != base:
        query["start-after"] = start
    while True:
        document = await ask(query)
        entries: list[Entry] = [(facts.key, facts) for facts in document.objects]
        entries += [(folder, None) for folder in document.prefixes]
        for name, facts in sorted(entries, key=lambda entry: (_bare(entry), entry[1] is None)):
            while waiting and waiting[0] < _bare((name, facts)):
                last = heapq.heappop(waiting)
                yield last, None, last in seen
                seen.discard(last)
            if name < last:
                raise OutOfOrder(name, last)
            if facts is not None:
                last = name
                if name > after:
                    yield name, facts, True
            elif name != last and (name > after or after.startswith(name)):
                if name not in waiting:
                    heapq.heappush(waiting, name)
                seen.add(name)
        if document.token is None:
            break
        query["continuation-token"] = document.token
    while waiting:
        last = heapq.heappop(waiting)
        yield last, None, last in seen


def _bare(entry: Entry) -> str:
    """What the store sorts by."""
    name, facts = entry
    return name if facts is not None else name[:-1]
