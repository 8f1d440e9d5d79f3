"""Plain reads of objects beside nginx: rates as ratios within a round, and the CPU and memory that they take.

Beside it with two workers, too, and beside any server that is given by its URL and takes the objects by PUT.
"""

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import nginx as nginxes
from benchmarks.processes import cpu_of, proportional
from benchmarks.table import Row, Samples, ratio_of
from shardmill import Client
from shardmill.testing.node import running_node

OBJECTS = 1000
SMALL = 4096  # bytes
MIDDLE = 100_000  # bytes
LARGE = 64 << 20  # bytes
RANGE = 64 << 10  # bytes
SECONDS = 1.0  # of one measurement
PEERS = 32  # connections that ask for small answers
READER = Path(__file__).parent / "reader.c"


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    what: str
    name: str
    """Of the object; `#` is a digit of those that there are."""
    connections: int = PEERS
    method: str = "GET"
    header: str = ""
    status: int = 200
    at_least: float = 0.9
    is_large: bool = False


KINDS = (
    Kind("64 MiB, one reader", "large", 1, at_least=1.2, is_large=True),
    Kind("64 MiB, four readers", "large", 4, at_least=1.9, is_large=True),
    Kind("4 KB, 32 readers", "small###"),
    Kind("100 KB, 32 readers", "middle###"),
    Kind("64 KiB of 64 MiB, 32 readers", "large", header="Range: bytes=#000000-#065535", status=206),
    Kind("HEAD of 4 KB, 32 readers", "small###", method="HEAD", at_least=0.8),
    Kind("304 of 4 KB, 32 readers", "small###", header="If-None-Match: *", status=304, at_least=0.8),
    Kind("404, 32 readers", "none###", status=404, at_least=0.8),
)
MIXED = Kind("4 KB, 4 readers", "small###", 4)
BESIDE = Kind("64 MiB, two readers", "large", 2)


@dataclass(frozen=True)
class Server:
    """Who is asked."""

    port: int
    pid: int | None
    """None: it runs elsewhere, or nobody knows where."""
    prefix: str
    address: str = "127.0.0.1"
    host: str = "localhost"
    """As requests name it."""

    @classmethod
    def at(cls, url: str) -> "Server":
        """One that is given by the URL below which its objects are."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SystemExit(f"--peer {url} is not of the form http://HOST:PORT/PATH/")
        prefix = parts.path if parts.path.endswith("/") else f"{parts.path}/"
        return cls(parts.port or 80, None, prefix, socket.gethostbyname(parts.hostname), parts.netloc)


@dataclass
class Measured:
    """What rounds gave of one kind of request from one server."""

    rate: Samples = field(default_factory=Samples)
    cpu: Samples = field(default_factory=Samples)
    """Microseconds of the server a request."""


OURS, ONE, TWO, PEER = "shardmill", "nginx", "nginx with two workers", "the server of --peer"


class Asker:
    """Runs the reader."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "reader"
        subprocess.run(["gcc", "-O2", "-o", self._program, READER], check=True)

    def ask(self, server: Server, kind: Kind, seconds: float = SECONDS) -> tuple[float, float]:
        """Requests a second, and microseconds of the server's CPU that each took."""
        request = _request(server, kind)
        size = _body_size(server, kind)
        before = _cpu(server)
        words = [server.address, server.port, kind.connections, seconds, size, kind.status, OBJECTS, request]
        told = subprocess.run([self._program, *map(str, words)], check=True, capture_output=True, text=True).stdout
        count, taken = (float(word) for word in told.split()[:2])
        return count / taken, (_cpu(server) - before) / count * 1e6


def measure(directory: Path, rounds: int, nginx: Path | None = None, peer: str | None = None) -> list[Row]:
    """Rows of every kind, of the node beside nginx.

    Args:
        directory: Scratch.
        rounds: Of the table.
        nginx: Its program; default: the one that is installed.
        peer: URL of another server, whose objects are put there.
    """
    program = nginx or nginxes.installed()
    if program is None:
        raise SystemExit("plain reads are measured beside nginx: install it, or name it with --nginx PROGRAM")
    files = directory / "files"
    _write(files)
    asker = Asker(directory)
    with contextlib.ExitStack() as stack:
        flags = ("--bucket", "ais://bench", "--durability", "kill", "--log-level", "warning")
        node = stack.enter_context(running_node(*flags, data=directory / "data"))
        with Client(node.endpoint) as client:
            for path in sorted(files.iterdir()):
                client.object(f"ais://bench/{path.name}").put(path)
        ours = Server(int(node.endpoint.rpartition(":")[2]), node.pid, "/o/ais/bench/")
        servers = {OURS: ours}
        for name, workers in ((ONE, 1), (TWO, 2)):
            beside = stack.enter_context(nginxes.running(program, directory, files, workers=workers))
            servers[name] = Server(beside.port, beside.master, "/")
        if peer is not None:
            servers[PEER] = Server.at(peer)
            _store(servers[PEER], files)
        theirs = servers[ONE]
        rows: list[Row] = []
        for kind in KINDS:
            rows += _compare(asker, kind, servers, rounds)
        rows += _by_wrk(servers, rounds)
        # What they hold after all this: files that are open, connections that were, buffers.
        rows += [
            Row(f"memory after all these: {name}", Samples([proportional(servers[name].pid or 0) / 1e6]), "MB")
            for name in (OURS, ONE)
        ]
        colds = {ours.port: _stored(directory / "data"), theirs.port: files / "large"}
        for temper, least in (("hot", 8.0), ("cold", 4.0)):
            rows += _mixed(asker, (ours, theirs), rounds, temper, least, colds)
        return rows


def _write(files: Path) -> None:
    files.mkdir()
    for number in range(OBJECTS):
        (files / f"small{number:03d}").write_bytes(os.urandom(SMALL))
        (files / f"middle{number:03d}").write_bytes(os.urandom(MIDDLE))
    (files / "large").write_bytes(os.urandom(LARGE))


def _stored(data: Path) -> Path:
    """The file that a large object of the pool is in."""
    return max((path for path in (data / "pool").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _store(server: Server, files: Path) -> None:
    """Put the objects where they are read."""
    connection = http.client.HTTPConnection(server.address, server.port, timeout=60)
    with contextlib.closing(connection):
        for path in sorted(files.iterdir()):
            connection.request("PUT", server.prefix + path.name, path.read_bytes(), {"Host": server.host})
            answer = connection.getresponse()
            answer.read()
            if answer.status not in (200, 201, 204):
                raise SystemExit(f"the server of --peer answers PUT of {path.name} with {answer.status}")


def _compare(asker: Asker, kind: Kind, servers: dict[str, Server], rounds: int) -> list[Row]:
    measured = {name: Measured() for name in servers}
    for number in range(rounds + 1):
        for name in list(servers) if number % 2 else reversed(list(servers)):
            rate, cpu = asker.ask(servers[name], kind)
            # The first round brings what is read into memory, and verifies it.
            if number:
                measured[name].rate.add(rate)
                measured[name].cpu.add(cpu)
    scale, unit = (LARGE / 1e9, "GB/s") if kind.is_large else (1.0, "/s")
    base = measured[ONE]
    rows = []
    for name in (OURS, ONE):
        rates = Samples([value * scale for value in measured[name].rate.values])
        rows.append(Row(f"{kind.what}: {name}", rates, unit))
    ratio = ratio_of(measured[OURS].rate, base.rate)
    rows.append(Row(f"{kind.what}: rate, of nginx's", ratio, "", at_least=kind.at_least, contest="rate"))
    for name in servers:
        if name not in (OURS, ONE):
            ratio = ratio_of(measured[name].rate, base.rate)
            rows.append(Row(f"{kind.what}: rate of {name}, of nginx's with one", ratio, ""))
    rows.append(Row(f"{kind.what}: shardmill's CPU a request", measured[OURS].cpu, "µs"))
    rows.append(Row(f"{kind.what}: nginx's CPU a request", base.cpu, "µs"))
    return rows


def _by_wrk(servers: dict[str, Server], rounds: int) -> list[Row]:
    """Somebody else's reader, of one small object; no rows where it is not installed."""
    program = shutil.which("wrk")
    if program is None:
        return []
    rates = {name: Samples() for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            url = f"http://{server.address}:{server.port}{server.prefix}small000"
            command = [program, "-t1", f"-c{PEERS}", "-d1s", "-H", f"Host: {server.host}", url]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = re.search(r"Requests/sec:\s+([0-9.]+)", said)
            if found is None or "Non-2xx" in said:
                raise RuntimeError(said)
            if number:
                rates[name].add(float(found[1]))
    what = f"one object of 4 KB, {PEERS} readers, by wrk"
    return [
        *(Row(f"{what}: {name}", samples, "/s") for name, samples in rates.items()),
        Row(f"{what}: rate, of nginx's", ratio_of(rates[OURS], rates[ONE]), "", at_least=0.9, contest="rate"),
    ]


def _mixed(
    asker: Asker, servers: tuple[Server, Server], rounds: int, temper: str, least: float, colds: dict[int, Path]
) -> list[Row]:
    """Small answers while large ones go out."""
    rates = [Samples(), Samples()]
    for number in range(rounds + 1):
        for server, samples in zip(servers, rates, strict=True):
            if temper == "cold":
                _drop(colds[server.port])
            with ThreadPoolExecutor(1) as threads:
                beside = threads.submit(asker.ask, server, BESIDE)
                rate, _ = asker.ask(server, MIXED)
                beside.result()
            if number:
                samples.add(rate)
    what = f"4 KB, 4 readers, while two read a {temper} file of 64 MiB"
    return [
        Row(f"{what}: shardmill", rates[0], "/s"),
        Row(f"{what}: nginx", rates[1], "/s"),
        Row(f"{what}: rate, of nginx's", ratio_of(*rates), "", at_least=least, contest="rate"),
    ]


def _drop(path: Path) -> None:
    """Drop a file from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _request(server: Server, kind: Kind) -> str:
    lines = [f"{kind.method} {server.prefix}{kind.name} HTTP/1.1", f"Host: {server.host}", kind.header]
    return "\r\n".join([*filter(None, lines), "", ""])


def _body_size(server: Server, kind: Kind) -> int:
    """Bytes behind the head of such an answer."""
    name, _, value = kind.header.replace("#", "0").partition(": ")
    headers = {"Host": server.host, **({name: value} if name else {})}
    with contextlib.closing(http.client.HTTPConnection(server.address, server.port)) as connection:
        connection.request(kind.method, server.prefix + kind.name.replace("#", "0"), headers=headers)
        return len(connection.getresponse().read())


def _cpu(server: Server) -> float:
    return 0.0 if server.pid is None else cpu_of(server.pid)
