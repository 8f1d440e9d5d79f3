"""Children of this process, those that were adopted from others included. Standard library only."""

import contextlib
import os
import signal


def children() -> list[int]:
    """Their pids, zombies included."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def kill(pid: int) -> None:
    """Kill a child, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def end_children() -> None:
    """Kill all of them, and what they leave behind, until there are none."""
    while True:
        for pid in children():
            kill(pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
