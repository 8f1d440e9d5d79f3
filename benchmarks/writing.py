"""Stored objects beside nginx, which writes them by WebDAV without a checksum, without a listing and without a flush.

Both are sent the same requests by the same blocking client, in turns, each object under a name of its own. nginx is the
one that is installed, or the one that is named; it needs its DAV module. Without one its rows are left out.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import nginx as servers
from benchmarks.table import Row, Samples, ratio_of
from shardmill.testing.node import running_node

LARGE = 64 << 20  # bytes
SMALL = 4096
CLIENTS = 16
SMALL_OBJECTS = 4000  # a round

DAV = "dav_methods PUT; create_full_put_path on; client_max_body_size 1g; client_body_buffer_size 64k;"


def measure(directory: Path, rounds: int, nginx: Path | None = None) -> list[Row]:
    """Rows of both sizes, for both promises.

    Args:
        directory: Scratch, on the disk that counts.
        rounds: In which all take their turns.
        nginx: Its program; default: the one that is installed.
    """
    program = nginx or servers.installed()
    with contextlib.ExitStack() as stack:
        targets: dict[str, Callable[[str], bytes]] = {}
        ports: dict[str, int] = {}
        for promise in ("kill", "power"):
            flags = ("--bucket", "ais://bench")
            environ = {"SHARDMILL_STORAGE_DURABILITY": promise}
            node = stack.enter_context(running_node(*flags, data=directory / promise, environ=environ))
            ports[promise] = int(node.endpoint.rpartition(":")[2])
            targets[promise] = lambda name: f"/o/ais/bench/{name}".encode()
        if program is not None and has_dav(program):
            (directory / "nginx").mkdir()
            ports["nginx"] = stack.enter_context(
                servers.running(program, directory, directory / "nginx", more=DAV)
            ).port
            targets["nginx"] = lambda name: f"/{name}".encode()
        large, small = _measure(ports, targets, rounds)
    return [
        *_rows("64 MiB, one client", large, "GB/s", 1.0, 0.6),
        *_rows(f"4 KiB, {CLIENTS} clients", small, "/s", 0.7, 0.6),
    ]


def has_dav(program: str | Path) -> bool:
    """Whether this nginx takes PUT."""
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True)
    return "http_dav_module" in built.stderr


def _measure(
    ports: dict[str, int], targets: dict[str, Callable[[str], bytes]], rounds: int
) -> tuple[dict[str, Samples], dict[str, Samples]]:
    large, small = {name: Samples() for name in ports}, {name: Samples() for name in ports}
    names = list(ports)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = put_large(ports[name], targets[name](f"large-{number % 2}"))
            rate = put_small(ports[name], targets[name], f"{number:02d}")
            if number:  # the first is not counted
                large[name].add(LARGE / seconds / 1e9)
                small[name].add(rate)
    return large, small


def put_large(port: int, path: bytes) -> float:
    """Seconds until it is answered."""
    body = memoryview(bytes(range(256)) * (LARGE // 256))
    with connected(port) as connection:
        start = time.perf_counter()
        connection.sendall(_head(path, LARGE))
        connection.sendall(body)
        _read_answer(connection)
        return time.perf_counter() - start


def put_small(port: int, path: Callable[[str], bytes], name: str) -> float:
    """Objects a second, all clients together."""
    body = b"x" * SMALL

    def client(first: int) -> None:
        with connected(port) as connection:
            for number in range(first, SMALL_OBJECTS, CLIENTS):
                connection.sendall(_head(path(f"{name}-{number:06d}"), SMALL) + body)
                _read_answer(connection)

    with ThreadPoolExecutor(CLIENTS) as clients:
        start = time.perf_counter()
        list(clients.map(client, range(CLIENTS)))
        return SMALL_OBJECTS / (time.perf_counter() - start)


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def _head(path: bytes, size: int) -> bytes:
    return b"PUT %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path, size)


def _read_answer(connection: socket.socket) -> None:
    answer = connection.recv(65536)
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    if answer.split(b" ", 2)[1] not in (b"200", b"201", b"204"):
        raise RuntimeError(answer.decode(errors="replace"))


def _rows(what: str, rates: dict[str, Samples], unit: str, least_kill: float, least_power: float) -> list[Row]:
    told = {"kill": "shardmill, not flushed", "power": "shardmill, survives a power cut", "nginx": "nginx, not flushed"}
    rows = [Row(f"PUT of {what}: {told[name]}", samples, unit) for name, samples in rates.items()]
    if "nginx" in rates:
        for name, least in (("kill", least_kill), ("power", least_power)):
            ratio = ratio_of(rates[name], rates["nginx"])
            rows.append(Row(f"PUT of {what}: {told[name]}, of nginx", ratio, "", at_least=least, contest="rate"))
    return rows
