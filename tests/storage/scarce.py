"""Files that really cannot be read, and descriptors that are really used up."""

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

_CAPSET = {"x86_64": 126, "aarch64": 91}
_VERSION_3 = 0x20080522


@contextlib.contextmanager
def common_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for which the modes of files hold, whoever runs the tests."""
    with ThreadPoolExecutor(4, initializer=_drop_capabilities) as threads:
        yield threads


def _drop_capabilities() -> None:
    """Of this thread alone; one that has none keeps none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.syscall(_CAPSET[os.uname().machine], header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No further file can be opened by this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    with contextlib.suppress(OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 1, hard))
        while True:
            held.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
