"""What the Python client costs whoever uses it: CPU of small calls, large reads and listings; parts side by side."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import Spoken, spoken
from benchmarks.table import Row, Samples, ratio_of
from shardmill import Client
from shardmill.testing.node import running_node

CALLS = 1000  # of each kind, a round
LARGE = 64 << 20  # bytes
KEYS = 100_000
PAGE = 1000
HELD_TO = 200  # microseconds
SCRIPT = Path(__file__).parent / "peers" / "http_clients.py"
KINDS = ("a HEAD", "a GET of 4 KiB", "a PUT of 4 KiB", "64 MiB received")
OTHERS = ("requests", "httpx", "urllib3", "http.client")


def measure(directory: Path, rounds: int, peers: Path | None) -> list[Row]:
    """All rows.

    Args:
        directory: Scratch.
        rounds: Of the table.
        peers: The interpreter that has the other libraries; None: only what the standard library has.
    """
    files = directory / "files"
    files.mkdir()
    (files / "large.bin").write_bytes(os.urandom(LARGE))
    for number in range(KEYS):
        path = files / "keys" / f"{number // PAGE:04d}" / f"{number:08d}"
        if number % PAGE == 0:
            path.parent.mkdir(parents=True)
        path.touch()
    buckets = ("--bucket", "ais://bench", "--bucket", f"gs://files=dir:{files}")
    with running_node(*buckets, data=directory / "data") as node:
        rows = _calls(node.endpoint, rounds, peers)
        with Client(node.endpoint) as client:
            return [*rows, *_large(client, rounds), *_listing(client, rounds)]


def _calls(endpoint: str, rounds: int, peers: Path | None) -> list[Row]:
    names = ["shardmill", "bare", *(OTHERS if peers is not None else ("http.client",))]
    taken = {name: [Samples() for _ in KINDS] for name in names}
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(_client(name, endpoint, peers)) for name in names}
        for number in range(rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                figures = [float(figure) for figure in clients[name].ask()]
                # The first round is for caches of all kinds.
                for samples, figure in zip(taken[name], figures, strict=True):
                    if number:
                        samples.add(figure)
    ours = taken["shardmill"]
    rows = [Row(f"CPU of {kind}", ours[place], "µs", at_most=HELD_TO) for place, kind in enumerate(KINDS[:-1])]
    for place, kind in enumerate(KINDS):
        # Of a HEAD the limit is enough: what others make of a head is in all their figures.
        for name in names[1:] if place else names[1:2]:
            ratio, is_limit = ratio_of(ours[place], taken[name][place]), name == "bare"
            whose = "a bare socket" if is_limit else name
            rows.append(Row(f"CPU of {kind}, of that by {whose}", ratio, "", contest="" if is_limit else "cost"))
    return rows


def _client(name: str, endpoint: str, peers: Path | None) -> "contextlib.AbstractContextManager[Spoken]":
    own = name in ("shardmill", "bare", "http.client") or peers is None
    python = sys.executable if own else peers
    assert python is not None
    return spoken([python, SCRIPT, name, endpoint, "/o/ais/bench/small", "/o/gs/files/large.bin", str(CALLS)])


def _large(client: Client, rounds: int) -> list[Row]:
    """One connection and several, into memory that is there."""
    handle, buffer = client.object("gs://files/large.bin"), bytearray(LARGE)
    one, four = Samples(), Samples()
    for number in range(rounds + 1):
        alone = _seconds(lambda: handle.read_into(buffer, connections=1))
        together = _seconds(lambda: handle.read_into(buffer, connections=4))
        if number:
            one.add(1 / alone)
            four.add(1 / together)
    return [Row("64 MiB into memory by four connections, of the rate by one", ratio_of(four, one), "")]


def _listing(client: Client, rounds: int) -> list[Row]:
    keys = Samples()
    for number in range(rounds + 1):
        began = time.process_time()
        count = sum(1 for _ in client.bucket("gs://files").list("keys/"))
        assert count == KEYS
        if number:
            keys.add((time.process_time() - began) / count * 1e6)
    return [Row(f"CPU of a key in a listing of {KEYS}", keys, "µs")]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
