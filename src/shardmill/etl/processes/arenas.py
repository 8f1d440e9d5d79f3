"""The node's view of a worker's shared memory, and leases on what stands in it."""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable

ARENA = 16 << 20  # bytes; holds two batches in work and what waits to be sent, pages are touched only when used

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedArena:
    """One memory file, sealed in size so that a worker cannot make the node fault by truncating it."""

    def __init__(self, size: int = ARENA) -> None:
        self.size = size
        self.descriptor = os.memfd_create("shardmill-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Give up the descriptor; the pages stay as long as a piece refers to them."""
        os.close(self.descriptor)
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        # What is being sent refers to the memory by itself; this object may be kept longer, by a dead worker's.
        del self._map


class Piece:
    """Framed bytes of one output sample: in an arena, or evacuated to the heap.

    Resources: exactly one `release`, after which `data` is gone.
    """

    __slots__ = ("_release", "cut", "data", "is_pinned", "offset", "size")

    def __init__(self, data: memoryview, offset: int, cut: int, release: Callable[["Piece"], None]) -> None:
        self.data: memoryview | bytes = data
        self.size = len(data)
        self.offset = offset
        self.cut = cut
        """Bytes that may be sent before the next sample is framed."""
        self.is_pinned = False
        """Its memory is being sent from and must stay where it is."""
        self._release: Callable[[Piece], None] | None = release

    def evacuate(self) -> None:
        """Copy the bytes to the heap and give the region back, unless it is pinned."""
        if self._release is not None and not self.is_pinned:
            data = bytes(self.data)
            self.release()
            # A view: every reader is given a part of it, and of bytes that would be a copy.
            self.data = memoryview(data)

    def release(self) -> None:
        release, self._release = self._release, None
        if isinstance(self.data, memoryview):
            self.data.release()
        self.data = b""
        if release is not None:
            release(self)
