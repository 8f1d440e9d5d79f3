"""A node that has nothing to do: how soon it is ready, the memory that it takes, and what idle connections add."""

import contextlib
import sys
import time
from pathlib import Path

from benchmarks import nginx as nginxes
from benchmarks.processes import proportional, resident, spoken
from benchmarks.table import Row, Samples, wait_quiet
from shardmill import Client
from shardmill.testing.node import running_node

CONNECTIONS = 10_000
SCRIPT = Path(__file__).parent / "peers" / "crowd.py"


def measure(directory: Path, rounds: int, nginx: Path | None = None) -> list[Row]:
    """All rows.

    Args:
        directory: Scratch.
        rounds: Each with a node of its own.
        nginx: Its program; default: the one that is installed. Its row is left out where there is none.
    """
    started, alone, whole, ours, theirs = (Samples() for _ in range(5))
    environ = {"SHARDMILL_SERVER_MAX_CONNECTIONS": str(CONNECTIONS + 16)}
    files = directory / "files"
    files.mkdir()
    (files / "small").write_bytes(b"x" * 100)
    program = nginx or nginxes.installed()
    for number in range(rounds):
        with contextlib.ExitStack() as stack:
            began = time.perf_counter()
            node = stack.enter_context(
                running_node("--bucket", "ais://bench", data=directory / str(number), environ=environ)
            )
            started.add(time.perf_counter() - began)
            with Client(node.endpoint) as client:
                client.object("ais://bench/small").put(files / "small")
            wait_quiet()
            alone.add(resident(node.pid) / 1e6)
            whole.add(proportional(node.pid) / 1e6)
            ours.add(_added(node.pid, int(node.endpoint.rpartition(":")[2]), "/o/ais/bench/small"))
            if program is not None:
                served = nginxes.running(program, directory, files, connections=CONNECTIONS + 16)
                beside = stack.enter_context(served)
                theirs.add(_added(beside.worker, beside.port, "/small"))
    rows = [
        Row("from the start to the first answer", started, "s", at_most=2),
        Row("memory of the node", alone, "MB", at_most=150),
        Row("memory of it and all below it, what they share counted once", whole, "MB"),
        Row(f"memory that each of {CONNECTIONS} idle connections adds", ours, "KB", at_most=20),
    ]
    return [*rows, Row("the same of nginx", theirs, "KB")] if theirs.values else rows


def _added(pid: int, port: int, path: str) -> float:
    """KB a connection."""
    before = resident(pid)
    with spoken([sys.executable, SCRIPT, str(port), str(CONNECTIONS), path]):
        wait_quiet()
        return (resident(pid) - before) / CONNECTIONS / 1000
