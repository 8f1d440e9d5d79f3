"""Whole objects of a cache kept open: with a descriptor of their own, so that an entry that nobody reads may leave."""

import os
import time

from shardmill.core.errors import ServerError
from shardmill.storage.cache.entry import Entry
from shardmill.storage.cache.upstream import Counters


class KeptEntry:
    """The source of an entry of which all is there; use `open_kept`.

    Bytes that an earlier process left are not read here before they were verified: whoever reads them first does it by
    `CachedSource`, which can bring what is damaged.
    """

    is_whole = True

    def __init__(self, entry: Entry, descriptor: int, counters: Counters) -> None:
        self.meta = entry.meta
        self.descriptor = descriptor
        self._entry = entry
        self._counters = counters
        self._is_closed = False

    def is_ready(self, start: int, stop: int) -> bool:
        """All of [start, stop) may be read."""
        return not self._entry.blocks.unverified(start, stop)

    def on_read(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are read; none is a use, too."""
        self._entry.used = time.time()
        if start < stop:
            self._counters.hits += 1
            self._counters.served += stop - start

    def hold(self, change: int) -> None:
        """See `core.kept.Kept`."""
        if change > 0:
            self._entry.leases += change
        else:
            self._entry.unlease()

    async def ensure(self, start: int, stop: int) -> None:
        if not self.is_ready(start, stop):
            raise ServerError(f"{self.meta.key}: what an earlier process left of it was not looked at yet")

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        await self.ensure(start, stop)
        return stop

    def release(self, position: int) -> None:
        """All of it stays."""

    async def check_unchanged(self) -> None:
        """A version's file is never written again but with the same bytes."""

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._entry.touch(self.descriptor)
            os.close(self.descriptor)


async def open_kept(entry: Entry, counters: Counters) -> KeptEntry:
    """Open an entry of which all is there.

    Raises:
        ServerError: Its file is gone.
        InsufficientStorage: There is no room for what has to be written first.
    """
    try:
        await entry.lease()
    except FileNotFoundError:
        raise ServerError(f"{entry.key}: its file is gone") from None
    try:
        return KeptEntry(entry, os.dup(entry.descriptor), counters)
    finally:
        entry.unlease()
