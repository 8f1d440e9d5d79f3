"""A transformed shard by HTTP: shardmill beside what people run for it today, same function, shards and cores."""

import contextlib
import http.client
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import grouped, spoken
from benchmarks.table import Row, Samples, ratio_of, wait_quiet
from benchmarks.transforms import Bare, Setting, served

PEERS = Path(__file__).parent / "peers"
PROCESSES = 2  # of every server
START_SECONDS = 60.0
POLL_SECONDS = 0.1


@dataclass
class Server:
    """One that gives transformed shards, with what was measured of it."""

    name: str
    url: Callable[[str], str]
    """Of the transformed shard with that file name."""
    health: str | None = None
    """URL of its health check, if it has one."""
    one: Samples = field(default_factory=Samples)
    """Samples a second, one shard after the other."""
    two: Samples = field(default_factory=Samples)
    """The same, two shards at once."""
    first: Samples = field(default_factory=Samples)
    """Milliseconds to the first byte of the body."""
    checked: Samples = field(default_factory=Samples)
    """Milliseconds that the slowest health check took while two shards were made."""


def measure(setting: Setting, rounds: int) -> list[Row]:
    """Rates, first bytes and health checks, with what shardmill is held to."""
    servers, limit = _measured(setting, _peers(setting), rounds)
    return rows_of(servers, limit)


def measure_rates(setting: Setting, rounds: int) -> list[Row]:
    """Rates alone, of another function, and beside the servers that come closest."""
    servers, limit = _measured(setting, _warm_peers(setting), rounds)
    return rates_of(setting.name, servers, limit)


def _measured(
    setting: Setting, peers: Iterable[contextlib.AbstractContextManager[Server]], rounds: int
) -> tuple[list[Server], Samples]:
    """All servers in turn, in every round; shardmill is the first. And the rate of bare processes."""
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(contextlib.closing(Bare(setting, PROCESSES)))
        node = stack.enter_context(served(setting, PROCESSES))
        urls = dict(zip((path.name for path in setting.shards), node.urls, strict=True))
        ours = Server("shardmill", urls.__getitem__, f"{node.node.endpoint}/healthz")
        servers = [ours, *(stack.enter_context(peer) for peer in peers)]
        names, limit = list(urls), Samples()
        samples = bare.samples // PROCESSES // len(names)
        for server in servers:
            _read(server, names[:1])
        for number in range(rounds):
            limit.add(bare.rate())
            wait_quiet()
            for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                server.one.add(samples / _read(server, names[:1]))
                wait_quiet()
                with _health_checks(server):
                    server.two.add(2 * samples / _read(server, names[:2]))
                wait_quiet()
                server.first.add(first_byte(server.url(names[0])) * 1000)
                wait_quiet()
    return servers, limit


def _peers(setting: Setting) -> Iterator[contextlib.AbstractContextManager[Server]]:
    yield _script("one Python process per request", "per_request.py", setting)
    yield from _warm_peers(setting)
    yield _aistore("aistore[etl] FastAPI, transform", "buffered", setting)
    yield _aistore("aistore[etl] FastAPI, transform_stream", "streaming", setting)


def _warm_peers(setting: Setting) -> Iterator[contextlib.AbstractContextManager[Server]]:
    yield _script("warm workers, a whole shard each", "whole_shard.py", setting, str(PROCESSES))
    yield _script("ProcessPoolExecutor over samples", "pool.py", setting, str(PROCESSES))


@contextlib.contextmanager
def _script(name: str, script: str, setting: Setting, *arguments: str) -> Iterator[Server]:
    directory = setting.shards[0].parent
    command: list[str | os.PathLike[str]] = [setting.python, PEERS / script, setting.target, directory, *arguments]
    with spoken(command) as process:
        origin = f"http://127.0.0.1:{process.said[0]}"
        yield Server(name, lambda shard: f"{origin}/{shard}")


@contextlib.contextmanager
def _aistore(name: str, app: str, setting: Setting) -> Iterator[Server]:
    """As its documentation starts it, `--workers` being the processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command: list[str | os.PathLike[str]] = [
        setting.python,
        "-m",
        "uvicorn",
        f"aistore_etl:{app}",
        "--app-dir",
        PEERS,
        "--host",
        "127.0.0.1",
    ]
    options = ["--port", str(port), "--workers", str(PROCESSES), "--log-level", "critical"]
    # Its constructor wants the address of a target; objects come by path, so it is never spoken to.
    environ = {"AIS_TARGET_URL": "http://127.0.0.1:9", "BENCH_FUNCTION": setting.target}
    origin, directory = f"http://127.0.0.1:{port}", urllib.parse.quote(str(setting.shards[0].parent))
    with grouped([*command, *options], environ):
        _wait_for(f"{origin}/health")
        yield Server(name, lambda shard: f"{origin}/{shard}?etl_fqn={directory}/{shard}", f"{origin}/health")


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=START_SECONDS).close()
            return
        except urllib.error.URLError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(POLL_SECONDS)


def _read(server: Server, names: list[str]) -> float:
    """Seconds until a curl for each has its shard."""
    start = time.perf_counter()
    curls = [subprocess.Popen(["curl", "-sSf", "-o", "/dev/null", server.url(name)]) for name in names]
    assert [curl.wait() for curl in curls] == [0] * len(names)
    return time.perf_counter() - start


def first_byte(url: str) -> float:
    """Seconds from the request to the first byte of the body."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        start = time.perf_counter()
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        response = connection.getresponse()
        assert response.status == 200
        assert response.read(1)
        taken = time.perf_counter() - start
        # Read to the end: not every server notices a reader who leaves, and goes on working.
        response.read()
        return taken
    finally:
        connection.close()


@contextlib.contextmanager
def _health_checks(server: Server) -> Iterator[None]:
    """Asks again and again until the context is left, and keeps the slowest answer."""
    if server.health is None:
        yield
        return
    url, over, taken = server.health, threading.Event(), [0.0]

    def ask() -> None:
        while not over.wait(POLL_SECONDS):
            start = time.perf_counter()
            urllib.request.urlopen(url, timeout=60).close()
            taken.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    server.checked.add(max(taken) * 1000)


HELD_TO = {
    "one Python process per request": (8.0, None),
    "warm workers, a whole shard each": (1.6, 1.2),
    "ProcessPoolExecutor over samples": (1.15, None),
    "aistore[etl] FastAPI, transform": (1.8, None),
    "aistore[etl] FastAPI, transform_stream": (1.8, None),
}
"""Server → shardmill's rate for one shard, and for two at once, as a multiple of its."""


def rates_of(name: str, servers: list[Server], limit: Samples) -> list[Row]:
    """With shardmill's as multiples, held to nothing."""
    ours, *peers = servers
    rows = [Row(f"{name}: bare processes ({PROCESSES}), the limit", limit, "/s")]
    for server in servers:
        rows.append(Row(f"{name}: {server.name}: one shard", server.one, "/s"))
        rows.append(Row(f"{name}: {server.name}: two shards at once", server.two, "/s"))
    for peer in peers:
        what = f"{name}: shardmill, of {peer.name}"
        rows.append(Row(f"{what}: one shard", ratio_of(ours.one, peer.one), "", contest="rate"))
        rows.append(Row(f"{what}: two at once", ratio_of(ours.two, peer.two), "", contest="rate"))
    rows += _most_of(peers, limit, f"{name}: ")
    return rows


def rows_of(servers: list[Server], limit: Samples) -> list[Row]:
    """With what shardmill is held to."""
    ours, *peers = servers
    rows = [Row(f"bare processes ({PROCESSES}), the limit", limit, "/s", bar="bare processes: the limit")]
    for server in (ours, *peers):
        rows.append(Row(f"{server.name}: one shard", server.one, "/s", bar=server.name))
        rows.append(Row(f"{server.name}: two shards at once", server.two, "/s"))
    for peer in peers:
        one, two = HELD_TO[peer.name]
        what = f"shardmill, of {peer.name}"
        rows.append(Row(f"{what}: one shard", ratio_of(ours.one, peer.one), "", at_least=one, contest="rate"))
        rows.append(Row(f"{what}: two at once", ratio_of(ours.two, peer.two), "", at_least=two, contest="rate"))
    rows += _most_of(peers, limit)
    rows += [Row(f"{server.name}: first byte", server.first, "ms") for server in (ours, *peers)]
    for peer in peers:
        if peer.name.startswith("aistore"):
            held = 1 / 20 if peer.name.endswith("transform") else None
            rows.append(
                Row(
                    f"shardmill's first byte, of that of {peer.name}",
                    ratio_of(ours.first, peer.first),
                    "",
                    at_most=held,
                )
            )
    for server in (ours, *peers):
        if server.health is not None:
            rows.append(Row(f"{server.name}: slowest health check meanwhile", server.checked, "ms"))
    return rows


def _most_of(peers: list[Server], limit: Samples, name: str = "") -> Iterator[Row]:
    """What bare processes reach, of a server's rate: nothing that also sends could have a larger multiple."""
    for peer in peers:
        what = f"{name}the most that could be had, of {peer.name}"
        yield Row(f"{what}: one shard", ratio_of(limit, peer.one), "")
        yield Row(f"{what}: two at once", ratio_of(limit, peer.two), "")
