"""The C heap of a node: few arenas, so that what one thread gave back another can use.

glibc gives threads arenas of their own, eight a core. A node has some twenty threads that take and give buffers by
turns, so each arena keeps what its own busiest moment needed, and memory creeps up for hours: in ten minutes of mixed
traffic by 13 MiB, with two arenas by none. Allocations are made under the interpreter's lock, so nobody waits for one.
"""

import ctypes

_ARENA_MAX = -8  # M_ARENA_MAX of <malloc.h>
ARENAS = 2


def share_arenas() -> bool:
    """Have all threads that are started from now on share `ARENAS` arenas; False: the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_ARENA_MAX, ARENAS))
