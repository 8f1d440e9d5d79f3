"""Whether bytes of a file are in memory, so that reading them holds nobody up."""

import ctypes
import os

_CACHESTAT = 451  # of every architecture but one that nobody has; Linux 6.5
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROBES = 8  # looks into a slice where the kernel cannot count


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


class Residency:
    """Looks at the page cache. One object is used by one thread."""

    def __init__(self) -> None:
        self._syscall = ctypes.CDLL(None).syscall
        self._syscall.restype = ctypes.c_long
        self._range = _Range()
        self._counts = _Counts()
        self._references = ctypes.byref(self._range), ctypes.byref(self._counts)
        self._byte = bytearray(1)

    def has(self, descriptor: int, start: int, stop: int) -> bool:
        """All of [start, stop) is in memory, as far as can be told."""
        self._range.offset, self._range.length = start, stop - start
        number, descriptor_, (span, counts) = ctypes.c_long(_CACHESTAT), ctypes.c_int(descriptor), self._references
        if self._syscall(number, descriptor_, span, counts, ctypes.c_uint(0)) == 0:
            return int(self._counts.cached) >= -(-stop // _PAGE) - start // _PAGE
        # An older kernel, or a file that is not ours.
        step = max(_PAGE, (stop - start) // _PROBES)
        return all(self._has_byte(descriptor, place) for place in range(start, stop, step))

    def _has_byte(self, descriptor: int, place: int) -> bool:
        try:
            return os.preadv(descriptor, [self._byte], place, os.RWF_NOWAIT) == 1
        except OSError:
            return False
