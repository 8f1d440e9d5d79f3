"""An opened object of a cached bucket: bytes from the disk, or as they arrive; without room, through memory.

When the disk turns out to be full, whoever reads goes on from memory, with the bytes that it has not done with.
"""

from collections.abc import Awaitable, Callable

from shardmill.core.errors import InsufficientStorage
from shardmill.core.meta import ObjectMeta
from shardmill.storage.cache.entry import Entry
from shardmill.storage.cache.upstream import Counters, Reader

Attach = Callable[[], Awaitable[Entry]]
"""An entry of the version, leased: the one that others have, or a new one."""
Passing = Callable[[int], Awaitable[Entry]]
"""An entry of the version, leased, that goes through memory from some byte on."""


class CachedSource:
    """See `core.sources.Source`. What it reads is decided with the first bytes that are asked for.

    Args:
        meta: Of the version.
        entry: Of it, leased; None: it is looked for when bytes are asked for.
        expected: Bytes that will be asked for, as far as is known; stop None: to the end.
        attach: Finds or makes an entry.
        passing: Makes one that goes through memory, for when there is no room on the disk.
    """

    def __init__(
        self,
        meta: ObjectMeta,
        entry: Entry | None,
        expected: tuple[int, int | None] | None,
        *,
        attach: Attach,
        passing: Passing,
        counters: Counters,
    ) -> None:
        self.meta = meta
        self._entry: Entry | None = None
        self._expected = expected
        self._attach = attach
        self._passing = passing
        self._counters = counters
        self._reader = Reader()
        self._served = 0
        self._low: int | None = None
        """Where the bytes begin that may be read again; None: none was asked for yet."""
        self._former: list[Entry] = []
        """Entries that it read before: a thread may be reading there."""
        self._is_used = False
        self._is_closed = False
        if entry is not None:
            self._bind(entry)

    @property
    def descriptor(self) -> int:
        """Valid once bytes were asked for."""
        assert self._entry is not None
        return self._entry.descriptor

    @property
    def is_whole(self) -> bool:
        return self._entry is not None and self._entry.is_complete and not self._entry.is_passing

    @property
    def is_kept(self) -> bool:
        """What it reads stays on the disk; known once bytes were asked for."""
        return self._entry is not None and not self._entry.is_passing

    def has(self, start: int, stop: int) -> bool:
        """Bytes [start, stop) are there already."""
        return self._entry is not None and self._entry.has(start, stop)

    async def ensure(self, start: int, stop: int) -> None:
        stop = min(stop, self.meta.size)
        await self._ensure(start, stop, stop)
        self._count(start, stop)

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        if start >= stop:
            return stop
        entry = await self._ensure(start, start + 1, stop)
        reached = entry.blocks.reach(start, stop)
        # What an earlier process left is looked at as far as it is handed out.
        if not await entry.verify(start, reached):
            return await self.ensure_some(start, stop)
        self._count(start, reached)
        return reached

    def release(self, position: int) -> None:
        if self._entry is not None:
            self._low = max(self._low or 0, position)
            self._entry.release(position)

    async def check_unchanged(self) -> None:
        """A version's file is never written again but with the same bytes."""

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._unbind()
            for entry in self._former:
                entry.unlease()

    async def _ensure(self, start: int, need: int, stop: int) -> Entry:
        """Bytes [start, need) are there and right; fetching goes on to `stop`, and as far as is expected."""
        entry = await self._bound(start, need)
        if start < need:
            while True:
                try:
                    if entry.blocks.reach(start, need) < need:
                        await entry.wait(self._reader, start, need, self._far(start, stop))
                except InsufficientStorage:
                    if entry.is_passing:
                        raise
                    entry = await self._pass(start, need)
                if await entry.verify(start, need):
                    break
        return entry

    def _count(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are ready; those that are asked for once more count once."""
        if stop > self._served:
            self._counters.served += stop - max(start, self._served)
            self._served = stop

    def _far(self, start: int, stop: int) -> int:
        """How far to fetch for one who is at `start`."""
        if self._expected is None:
            # Whoever begins somewhere without a word reads on from there.
            self._expected = start, None
        first, last = self._expected
        end = self._end(last)
        return max(stop, end) if first <= start < end else stop

    def _end(self, stop: int | None) -> int:
        return self.meta.size if stop is None else min(stop, self.meta.size)

    async def _bound(self, start: int, need: int) -> Entry:
        """The entry that bytes come from."""
        if self._low is None:
            self._low = start
        entry = self._entry
        if entry is None:
            try:
                self._bind(entry := await self._attach())
            except InsufficientStorage:
                # Not even for its name.
                self._counters.misses += 1
                self._is_used = True
                return await self._pass(start, start)
        if not self._is_used:
            if entry.has(*(self._expected or (start, need))):
                self._counters.hits += 1
            else:
                self._counters.misses += 1
            try:
                if not entry.is_complete:
                    await entry.reserve(*entry.blocks.span(start, self._far(start, start)))
            except InsufficientStorage:
                entry = await self._pass(start, start)
            self._is_used = True
        return entry

    async def _pass(self, start: int, need: int) -> Entry:
        """Go on from memory, with bytes [start, need) and all before them that may be read again."""
        low = min(start, self._low or 0)
        entry = await self._passing(low)
        if self._entry is not None:
            self._entry.part(self._reader)
            self._former.append(self._entry)
        self._bind(entry)
        if low < need:
            await entry.wait(self._reader, low, need, self._far(start, need))
        return entry

    def _bind(self, entry: Entry) -> None:
        self._entry = entry
        if self._expected is not None:
            # Who is slow to ask for its first bytes keeps what another one leaves.
            first, last = self._expected
            self._reader.want(*entry.blocks.span(min(first, self.meta.size), self._end(last)))
        entry.join(self._reader)

    def _unbind(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.part(self._reader)
            entry.unlease()
