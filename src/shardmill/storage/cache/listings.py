"""Pages of an origin's listing, remembered for a moment."""

import time
from collections import OrderedDict

from shardmill.core.meta import ListPage
from shardmill.core.origins import ListOrigin

_KEPT = 256  # pages


class Listings:
    """Args:
    seconds: How long a page is believed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pages: OrderedDict[tuple[str, str, str, int], tuple[float, ListPage]] = OrderedDict()

    async def get(self, origin: ListOrigin, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page, as the origin gives it or gave it a moment ago."""
        asked = prefix, delimiter, after, limit
        found = self._pages.get(asked)
        if found is not None and time.monotonic() - found[0] < self._seconds:
            return found[1]
        began = time.monotonic()
        page = await origin.list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        self._pages[asked] = began, page
        self._pages.move_to_end(asked)
        while len(self._pages) > _KEPT:
            self._pages.popitem(last=False)
        return page

    def clear(self) -> None:
        """Something was changed."""
        self._pages.clear()
