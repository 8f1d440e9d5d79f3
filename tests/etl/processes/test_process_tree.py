"""What the kernel tells of processes: descendants at any depth, memory of every kind, processor time."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardmill.etl.processes.process_tree import (
    cpu_seconds,
    live_descendants,
    proportional_bytes,
    resident_bytes,
    resident_bytes_at_most,
)

MIB = 1 << 20


@contextmanager
def running(source: str) -> Iterator[int]:
    """A Python process that has run the source and waits; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{source}\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            os.killpg(process.pid, 9)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_descendants_at_any_depth_are_found_and_dead_ones_are_not() -> None:
    with running(
        "import os, time\nif os.fork() == 0:\n    os.fork(); time.sleep(1000)\nif os.fork() == 0: os._exit(0)"
    ) as pid:
        # A child and its child; the zombie is none.
        wait_until(lambda: len(live_descendants(pid)) == 2)
    assert live_descendants(pid) == []


def test_children_of_threads_are_found() -> None:
    source = (
        "import subprocess, threading\n"
        "thread = threading.Thread(target=lambda: (subprocess.Popen(['sleep', '1000']), threading.Event().wait()), daemon=True)\n"
        "thread.start()"
    )
    with running(source) as pid:
        wait_until(lambda: len(live_descendants(pid)) == 1)


@pytest.mark.parametrize(
    "source",
    [
        "kept = bytearray(b'x' * (64 << 20))",
        "import mmap; kept = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)",
        "import mmap, os\nfile = os.memfd_create('x'); os.ftruncate(file, 64 << 20)\nkept = mmap.mmap(file, 64 << 20, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)",
    ],
)
def test_memory_of_its_own_and_shared_memory_count(source: str) -> None:
    with running("pass") as plain, running(source) as large:
        for measure in (resident_bytes, proportional_bytes):
            assert 60 * MIB < measure(large) - measure(plain) < 80 * MIB
        # The kernel counts this one by processors, and may be a few pages behind.
        assert resident_bytes_at_most(large) > resident_bytes(large) - MIB


def test_what_a_fork_shares_is_divided() -> None:
    with running(
        "kept = b'x' * (64 << 20)\nimport os, time\nfor _ in range(3):\n    if os.fork() == 0: time.sleep(1000)"
    ) as pid:
        wait_until(lambda: len(live_descendants(pid)) == 3)
        pids = [pid, *live_descendants(pid)]
        assert sum(map(resident_bytes, pids)) > 4 * 64 * MIB
        wait_until(lambda: sum(map(proportional_bytes, pids)) < 2 * 64 * MIB)


def test_processor_time_counts_all_threads() -> None:
    source = "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()"
    with running(source) as pid:
        before = cpu_seconds(pid)
        wait_until(lambda: cpu_seconds(pid) > before + 0.1)


def test_a_process_that_is_gone_counts_as_nothing() -> None:
    with running("pass") as pid:
        pass
    assert (live_descendants(pid), resident_bytes(pid), proportional_bytes(pid), cpu_seconds(pid)) == ([], 0, 0, 0.0)
    assert resident_bytes_at_most(pid) == 0
