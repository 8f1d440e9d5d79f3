"""Starts another program that dies with the node, with all that it starts, and writes below given directories only.

Standard library only. This process stays beside the program: what it leaves behind comes to it, and is ended with it.
"""

import os
import signal
import sys
from types import FrameType

from shardmill.worker import limits
from shardmill.worker.orphans import end_children


def main() -> None:
    """`launch.main()` with the parent's pid, the number of directories, these, and the command as arguments.

    Ends as the command does; SIGTERM, which is also what it is sent when the node dies, ends both.
    """
    parent, count, *rest = sys.argv[1:]
    directories, command = rest[: int(count)], rest[int(count) :]
    signal.signal(signal.SIGTERM, _end)
    limits.die_with_parent(int(parent), signal.SIGTERM)
    limits.adopt_orphans()
    limits.give_up_privileges()
    limits.enter_domain(limits.landlock_version(), *directories)
    own_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(command, own_pid)
    while (found := os.waitpid(-1, 0))[0] != pid:
        pass
    end_children()
    code = os.waitstatus_to_exitcode(found[1])
    os._exit(code if code >= 0 else 128 - code)


def _become(command: list[str], parent: int) -> None:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        limits.die_with_parent(parent)
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{os.path.basename(command[0])} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _end(_number: int, _frame: FrameType | None) -> None:
    end_children()
    os._exit(128 + signal.SIGTERM)
