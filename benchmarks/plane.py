"""Plain reads of objects beside nginx: rates as ratios within a round, and the CPU that one of them takes."""

import contextlib
import http.client
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nginx as nginxes
from benchmarks.processes import cpu_of
from benchmarks.table import Row, Samples, ratio_of
from shardmill import Client
from shardmill.testing.node import running_node

OBJECTS = 1000
SMALL = 4096  # bytes
MIDDLE = 100_000  # bytes
LARGE = 64 << 20  # bytes
RANGE = 64 << 10  # bytes
SECONDS = 1.5  # of one measurement
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
    pid: int
    prefix: str


@dataclass
class Measured:
    """What rounds gave of one kind of request from one server."""

    rate: Samples
    cpu: Samples
    """Microseconds of the server a request."""


class Asker:
    """Runs the reader."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "reader"
        subprocess.run(["gcc", "-O2", "-o", self._program, READER], check=True)

    def ask(self, server: Server, kind: Kind, seconds: float = SECONDS) -> tuple[float, float]:
        """Requests a second, and microseconds of the server's CPU that each took."""
        request = _request(server, kind)
        size = _body_size(server, kind)
        before = cpu_of(server.pid)
        words = [server.port, kind.connections, seconds, size, kind.status, OBJECTS, request]
        told = subprocess.run([self._program, *map(str, words)], check=True, capture_output=True, text=True).stdout
        count, taken = (float(word) for word in told.split()[:2])
        return count / taken, (cpu_of(server.pid) - before) / count * 1e6


def measure(directory: Path, rounds: int, nginx: Path | None = None) -> list[Row]:
    """Rows of every kind, of the node beside nginx.

    Args:
        directory: Scratch.
        rounds: Of the table.
        nginx: Its program; default: the one that is installed.
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
        beside = stack.enter_context(nginxes.running(program, directory, files))
        ours = Server(int(node.endpoint.rpartition(":")[2]), node.pid, "/o/ais/bench/")
        theirs = Server(beside.port, beside.worker, "/")
        rows: list[Row] = []
        for kind in KINDS:
            rows += _compare(asker, kind, ours, theirs, rounds)
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


def _compare(asker: Asker, kind: Kind, ours: Server, theirs: Server, rounds: int) -> list[Row]:
    measured = [Measured(Samples(), Samples()) for _ in range(2)]
    for number in range(rounds + 1):
        turns = list(zip((ours, theirs), measured, strict=True))
        for server, samples in turns if number % 2 else reversed(turns):
            rate, cpu = asker.ask(server, kind)
            # The first round brings what is read into memory, and verifies it.
            if number:
                samples.rate.add(rate)
                samples.cpu.add(cpu)
    mine, other = measured
    scale, unit = (LARGE / 1e9, "GB/s") if kind.is_large else (1.0, "/s")
    rates = [Samples([value * scale for value in samples.rate.values]) for samples in measured]
    return [
        Row(f"{kind.what}: shardmill", rates[0], unit),
        Row(f"{kind.what}: nginx", rates[1], unit),
        Row(f"{kind.what}: rate, of nginx's", ratio_of(*rates), "", at_least=kind.at_least, contest="rate"),
        Row(f"{kind.what}: shardmill's CPU a request", mine.cpu, "µs"),
        Row(f"{kind.what}: nginx's CPU a request", other.cpu, "µs"),
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
    lines = [f"{kind.method} {server.prefix}{kind.name} HTTP/1.1", "Host: localhost", kind.header]
    return "\r\n".join([*filter(None, lines), "", ""])


def _body_size(server: Server, kind: Kind) -> int:
    """Bytes behind the head of such an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    try:
        name, _, value = kind.header.replace("#", "0").partition(": ")
        connection.request(
            kind.method, server.prefix + kind.name.replace("#", "0"), headers={name: value} if name else {}
        )
        answer = connection.getresponse()
        return len(answer.read())
    finally:
        connection.close()
