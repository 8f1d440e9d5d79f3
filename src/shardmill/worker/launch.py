"""Starts another program that dies with the node and writes below given directories only. Standard library only."""

import os
import sys

from shardmill.worker import limits


def main() -> None:
    """`launch.main()` with the parent's pid, the number of directories, these, and the command as arguments."""
    parent, count, *rest = sys.argv[1:]
    limits.die_with_parent(int(parent))
    directories, command = rest[: int(count)], rest[int(count) :]
    limits.give_up_privileges()
    limits.enter_domain(limits.landlock_version(), *directories)
    os.execv(command[0], command)
