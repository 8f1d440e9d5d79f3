"""Pages of an origin's listing: believed for a moment, and remembered for when it cannot be asked."""

import time
from collections import OrderedDict

from shardmill.core.meta import ListPage
from shardmill.core.origins import ListOrigin

_KEPT = 20_000  # entries of all pages


class Listings:
    """Args:
    seconds: How long a page is believed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pages: OrderedDict[tuple[str, str, str, int], tuple[float, ListPage]] = OrderedDict()
        self._entries = 0
        self._changes = 0

    async def get(self, origin: ListOrigin, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page, as the origin gives it or gave it a moment ago."""
        asked = prefix, delimiter, after, limit
        found = self._pages.get(asked)
        if found is not None and time.monotonic() - found[0] < self._seconds:
            return found[1]
        began, changes = time.monotonic(), self._changes
        page = await origin.list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        if changes == self._changes:
            # What was asked for before a change may not show it.
            self._keep(asked, began, page)
        return page

    def last(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage | None:
        """The page as it was given last, however long ago, if nothing was changed since."""
        found = self._pages.get((prefix, delimiter, after, limit))
        return None if found is None else found[1]

    def clear(self) -> None:
        """Something was changed through this node: no page from before may be shown again."""
        self._changes += 1
        self._pages.clear()
        self._entries = 0

    def _keep(self, asked: tuple[str, str, str, int], began: float, page: ListPage) -> None:
        other = self._pages.pop(asked, None)
        if other is not None:
            self._entries -= _size(other[1])
        self._pages[asked] = began, page
        self._entries += _size(page)
        # The oldest come first.
        while self._entries > _KEPT:
            _, (_, oldest) = self._pages.popitem(last=False)
            self._entries -= _size(oldest)


def _size(page: ListPage) -> int:
    return 1 + len(page.objects) + len(page.prefixes)
