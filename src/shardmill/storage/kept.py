"""Objects kept open, within a bound for the whole node, and never one that has changed.

Whoever changes a key through its store does so inside `KeptKeys.changing`: what was kept leaves before the change,
nothing is kept while it goes on, and an opening that it crossed is not kept afterwards.
"""

import contextlib
import resource
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar

from shardmill.core.errors import ObjectNotFound
from shardmill.core.kept import Kept
from shardmill.core.sources import Source

MOST = 4096  # objects kept open

Opened = TypeVar("Opened", bound=Source)


def most_kept() -> int:
    """How many objects may be kept open: a quarter of the descriptors that the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(16, min(MOST, soft // 4))


class Shelf:
    """All that is kept of all stores, in the order of use as far as a bit a look tells it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Kept, Callable[[], None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, kept: Kept, forget: Callable[[], None]) -> None:
        """Keep one more; `forget` is called when it has to leave for others."""
        while len(self._kept) >= self._most:
            oldest, leave = self._kept.popitem(last=False)
            if oldest.is_used:
                # A second chance for what was asked for since it came here.
                oldest.is_used = False
                self._kept[oldest] = leave
            else:
                leave()
        self._kept[kept] = forget

    def take(self, kept: Kept) -> None:
        """It has left."""
        self._kept.pop(kept, None)

    def sweep(self) -> None:
        """Close what nobody asked for since the last sweep: a file that was removed by hand gives its space back."""
        for kept, leave in list(self._kept.items()):
            if kept.is_used:
                kept.is_used = False
            else:
                leave()

    def clear(self) -> None:
        """Keep nothing."""
        for leave in list(self._kept.values()):
            leave()


class _Opening:
    """One on its way; `is_crossed`: the key was changed meanwhile."""

    __slots__ = ("is_crossed",)

    def __init__(self) -> None:
        self.is_crossed = False


class KeptKeys:
    """What is kept of one store. Everything here happens on the loop.

    Args:
        is_there: Makes the look of `Kept` for a key and what was opened, or None for no object.
    """

    def __init__(
        self, shelf: Shelf, is_there: Callable[[str, Source | None], Callable[[], bool] | None] | None = None
    ) -> None:
        self._shelf = shelf
        self._is_there = is_there
        self._kept: dict[str, Kept] = {}
        self._openings: dict[str, set[_Opening]] = {}
        self._changing: dict[str, int] = {}
        self._is_closed = False

    def get(self, key: str) -> Kept | None:
        """What is kept of a key."""
        kept = self._kept.get(key)
        if kept is not None and not kept.is_current:
            # Somebody found that it is not there any more.
            self.drop(key)
            return None
        return kept

    async def open(
        self,
        key: str,
        opening: Awaitable[Opened],
        is_ready: Callable[[Opened], Callable[[int, int], bool]],
        *,
        on_read: Callable[[Opened, int, int], None] | None = None,
        hold: Callable[[Opened, int], None] | None = None,
    ) -> Kept | None:
        """Open an object to be kept; None: it is being changed, so nothing is said of it.

        Args:
            key: Of the object.
            opening: Opens it; raises ObjectNotFound.
            is_ready: The method of what is opened that `Kept` has.
            on_read: Another one; None: nobody is told.
            hold: A third one.
        """
        mark = _Opening()
        if key in self._changing or self._is_closed:
            mark.is_crossed = True
        self._openings.setdefault(key, set()).add(mark)
        source: Opened | None = None
        try:
            try:
                source = await opening
                kept = Kept(
                    source,
                    is_ready=is_ready(source),
                    is_there=self._look_for(key, source),
                    on_read=partial(on_read, source) if on_read is not None else None,
                    hold=partial(hold, source) if hold is not None else None,
                )
            except ObjectNotFound as error:
                kept = Kept(None, absent=error, is_there=self._look_for(key, None))
        finally:
            self._end(key, mark)
        known = self.get(key)
        if mark.is_crossed or known is not None:
            kept.leave()
            return known
        self._kept[key] = kept
        self._shelf.put(kept, lambda: self.drop(key))
        return kept

    @contextlib.contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """The object is being replaced or removed for the block."""
        self._changing[key] = self._changing.get(key, 0) + 1
        self.changed(key)
        try:
            yield
        finally:
            self.changed(key)
            self._changing[key] -= 1
            if not self._changing[key]:
                del self._changing[key]

    def drop(self, key: str) -> None:
        """Keep nothing of a key."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._shelf.take(kept)
            kept.leave()

    def close(self) -> None:
        """Keep nothing any more: the store is gone."""
        self._is_closed = True
        for key in [*self._kept, *self._openings]:
            self.changed(key)

    def changed(self, key: str) -> None:
        """The object was replaced or removed in this moment."""
        self.drop(key)
        for mark in self._openings.get(key, ()):
            mark.is_crossed = True

    def _end(self, key: str, mark: _Opening) -> None:
        marks = self._openings[key]
        marks.discard(mark)
        if not marks:
            del self._openings[key]

    def _look_for(self, key: str, source: Source | None) -> Callable[[], bool] | None:
        return self._is_there(key, source) if self._is_there is not None else None
