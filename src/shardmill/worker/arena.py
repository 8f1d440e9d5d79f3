"""Where a worker writes framed samples: shared memory that the node reads from.

The worker allocates, the node releases; both see the same pages, so a sample is copied once. The first page holds the
progress cell, by which the node sees a worker that is stuck on one sample.
"""

import mmap
import struct

HEADER = 4096  # bytes before the first region
ALIGN = 64  # bytes; a cache line, so that regions never share one

_PROGRESS = struct.Struct("<QQQ")


class Arena:
    """First-fit allocation in a mapped descriptor; low addresses are reused first, because they are warm."""

    def __init__(self, descriptor: int, size: int, *, successor_of: "Arena | None" = None) -> None:
        """Args:
        descriptor: Its memory; not owned.
        size: Bytes of it.
        successor_of: The arena that it replaces; the sample in work stays the same.
        """
        self._map = mmap.mmap(descriptor, size)
        self.view = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(HEADER, size)]
        self._taken: dict[int, int] = {}
        self._ticks = 0
        self.size = size
        if successor_of is not None:
            self._ticks = successor_of._ticks
            self._map[: _PROGRESS.size] = successor_of._map[: _PROGRESS.size]

    def fits(self, size: int) -> bool:
        """Whether an empty arena would hold `size` bytes."""
        return size <= self.size - HEADER - ALIGN

    def allocate(self, size: int) -> int | None:
        """Offset of a free region, or None when there is no room now."""
        need = -(-max(size, 1) // ALIGN) * ALIGN
        for position, (start, stop) in enumerate(self._free):
            if stop - start >= need:
                if stop - start == need:
                    del self._free[position]
                else:
                    self._free[position] = (start + need, stop)
                self._taken[start] = start + need
                return start
        return None

    def shrink(self, offset: int, size: int) -> None:
        """Keep only the first `size` bytes of a region, at least one."""
        stop = self._taken[offset]
        kept = offset + -(-size // ALIGN) * ALIGN
        if kept < stop:
            self._taken[offset] = kept
            self._taken[kept] = stop
            self.release(kept)

    def release(self, offset: int) -> None:
        """Give a region back; an unknown offset is ignored, since it belonged to an arena that was replaced."""
        stop = self._taken.pop(offset, None)
        if stop is None:
            return
        free = self._free
        free.append((offset, stop))
        free.sort()
        merged: list[tuple[int, int]] = []
        for start, end in free:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._free = merged

    @property
    def taken(self) -> int:
        """Regions not yet given back."""
        return len(self._taken)

    def tick(self, batch: int, ordinal: int) -> None:
        """Say which sample is in work."""
        self._ticks += 1
        _PROGRESS.pack_into(self._map, 0, batch, ordinal, self._ticks)

    def close(self) -> None:
        self.view.release()
        self._map.close()


def read_progress(view: memoryview) -> tuple[int, int, int]:
    """`batch, ordinal, ticks` as the worker last said; no ticks: nothing yet."""
    return _PROGRESS.unpack_from(view, 0)
