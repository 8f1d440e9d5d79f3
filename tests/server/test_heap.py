"""Arenas of the C heap, as the C library tells them."""

import subprocess
import sys

import pytest

from shardmill.server.heap import ARENAS

COUNT = """
import ctypes, os, sys, threading
from shardmill.server.heap import share_arenas

if sys.argv[1] == "shared":
    assert share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
barrier = threading.Barrier(12)

def take():
    barrier.wait()
    assert libc.malloc(ctypes.c_size_t(1000))
    barrier.wait()

threads = [threading.Thread(target=take) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fflush(ctypes.c_void_p(file))
"""


@pytest.mark.parametrize("how", ["shared", "each its own"])
def test_threads_share_arenas(how: str) -> None:
    run = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    arenas = run.stdout.count("<heap nr=")
    assert (arenas <= ARENAS) == (how == "shared"), run.stdout
