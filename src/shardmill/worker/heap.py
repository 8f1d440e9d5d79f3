"""The C heap of a worker: what one sample gave back serves the next, instead of going back to the kernel.

glibc takes large blocks from the kernel, and gives the heap's end back once some of it is free. A transform of pictures
takes and gives megabytes a sample, so it would have pages cleared and mapped over and over.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of <malloc.h>

KEPT = 32 << 20  # bytes that may lie free at the end of the heap
LARGEST = 32 << 20  # bytes of a block taken from the heap; glibc allows no more


def keep_what_is_freed() -> bool:
    """Have this process, and those forked from it, keep freed memory; False: the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
