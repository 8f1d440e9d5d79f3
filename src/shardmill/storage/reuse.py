"""Which scratch results give their file to the next run: the oldest that nobody has opened, beyond some bytes of them.

Writing over memory that the kernel has for a file already costs a tenth of having it find fresh memory. That a result
was needed after all shows when its key comes again; then, for a while, none gives its file away.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

UNREAD = 256 << 20  # bytes of results that nobody has opened; enough for a second reader who comes at once
WANTED_SECONDS = 3600.0  # that all are kept after one was asked for that was gone

_REMEMBERED = 10_000  # keys of results that are gone


class Unread:
    """Scratch results that are written and that nobody has opened.

    Args:
        limit: Bytes of them that stay.
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, limit: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._now = now
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._total = 0
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._wanted_until = 0.0

    def add(self, key: str, size: int) -> None:
        """The newest one."""
        self.discard(key)
        self._sizes[key] = size
        self._total += size

    def discard(self, key: str) -> None:
        """It was opened, or is gone: what was sent of it may still stand between the node and its reader."""
        self._total -= self._sizes.pop(key, 0)

    def choose(self, key: str) -> str | None:
        """The one whose file the spool of `key` is to have; it is none of these any more. None: a fresh file."""
        now = self._now()
        if key in self._gone:
            del self._gone[key]
            self._wanted_until = now + WANTED_SECONDS
        if now < self._wanted_until or self._total <= self._limit:
            return None
        chosen = next(iter(self._sizes))
        self.discard(chosen)
        self._gone[chosen] = None
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        return chosen
