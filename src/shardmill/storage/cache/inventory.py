"""What the cache of one bucket has on the disk, told to whoever asks."""

import bisect
import heapq
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.sources import CachedObject
from shardmill.storage.cache.entry import Entry
from shardmill.storage.cache.versions import Known
from shardmill.storage.paging import list_page


class Inventory:
    """Entries, and what is known to be current, by key."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._known: OrderedDict[str, Known] = OrderedDict()

    def cached(self, prefix: str = "") -> Sequence[CachedObject]:
        """Objects of which something is on the disk, by key."""
        return self.describe(self.cached_keys(prefix))

    def cached_keys(self, prefix: str, after: str = "", limit: int | None = None) -> Sequence[str]:
        """Keys behind `after` of objects of which something is on the disk, in order; may be called in a thread."""
        found = [key for key in list(self._entries) if key.startswith(prefix) and key > after]
        return sorted(found) if limit is None else heapq.nsmallest(limit, found)

    def describe(self, keys: Iterable[str]) -> Sequence[CachedObject]:
        """What is on the disk of objects; those of which nothing is are left out."""
        return [self._describe(entry) for key in keys if (entry := self._entries.get(key)) is not None]

    def cached_page(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """A page of a listing, as if there were no other objects; may be called in a thread."""
        # As many keys as the page shows are enough, unless some are rolled up.
        keys = self.cached_keys(prefix, after, None if delimiter else limit + 1)

        def seek(bound: bytes) -> Iterator[tuple[bytes, str]]:
            for place in range(bisect.bisect_left(keys, bound, key=str.encode), len(keys)):
                yield keys[place].encode(), keys[place]

        def load(_: bytes, key: str) -> ObjectMeta | None:
            entry = self._entries.get(key)
            return None if entry is None else entry.meta

        return list_page(seek, load, prefix=prefix, delimiter=delimiter, after=after, limit=limit)

    def cached_bytes(self, meta: ObjectMeta) -> int:
        """Bytes of an object, as a listing has it, that are on the disk; asks neither the origin nor the disk."""
        entry = self._entries.get(meta.key)
        # A listing may not tell the ETag, and what is there of another version is of no use.
        if entry is None or entry.meta.size != meta.size or meta.etag not in (None, entry.meta.etag):
            return 0
        return entry.bytes_there

    def _describe(self, entry: Entry) -> CachedObject:
        known = self._known.get(entry.key)
        return CachedObject(
            entry.key,
            entry.meta.size,
            entry.bytes_there,
            entry.version,
            entry.meta.etag,
            entry.used,
            time.monotonic() - known.asked if known is not None else None,
            entry.leases,
            entry.is_pinned,
        )

    def cached_ranges(self, key: str) -> Sequence[tuple[int, int]]:
        """Bytes [start, stop) of an object that are on the disk."""
        entry = self._entries.get(key)
        if entry is None:
            return ()
        return [(0, entry.meta.size)] if entry.is_complete else entry.blocks.ranges()
