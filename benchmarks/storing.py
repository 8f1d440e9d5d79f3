"""Small objects: storing many, killing the node, reading all back; listing a hundred thousand page by page."""

import contextlib
import http.client
import random
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from benchmarks.table import Row, Samples
from shardmill import Client
from shardmill.testing.node import running_node

OBJECTS = 10_000
SIZE = 4096  # bytes
KEYS = 100_000
PAGE = 1000
CLIENTS = 4


def measure(directory: Path, rounds: int) -> list[Row]:
    """Rows of both."""
    return [*_survive(directory / "survive", rounds), *_list(directory / "list", rounds)]


def _survive(directory: Path, rounds: int) -> list[Row]:
    """PUT, kill -9 amid further ones, start again, GET with every checksum verified."""
    rates, lost, starts, reads = Samples(), Samples(), Samples(), Samples()
    for number in range(min(rounds, 3)):
        data = directory / str(number)
        with running_node("--bucket", "ais://bench", data=data) as node:
            start = time.perf_counter()
            acknowledged = _put_all(node.endpoint, "small", range(OBJECTS), SIZE)
            rates.add(OBJECTS / (time.perf_counter() - start))
            with ThreadPoolExecutor(1) as more:
                writing = more.submit(_put_all, node.endpoint, "more", range(OBJECTS), SIZE)
                node.kill()
                acknowledged |= writing.result()
        start = time.perf_counter()
        with running_node("--bucket", "ais://bench", data=data) as node:
            starts.add(time.perf_counter() - start)
            start = time.perf_counter()
            lost.add(_missing(node.endpoint, acknowledged))
            reads.add(len(acknowledged) / (time.perf_counter() - start))
    return [
        Row(f"PUT of 4 KiB that survives a power cut, {CLIENTS} clients", rates, "/s"),
        Row(f"of {OBJECTS} acknowledged ones, lost or wrong after kill -9", lost, "objects", at_most=0),
        Row("from the start after it to the first answer", starts, "s"),
        Row("GET of 4 KiB, checksum verified, one client", reads, "/s"),
    ]


def _put_all(endpoint: str, folder: str, numbers: range, size: int) -> dict[str, str]:
    """Store objects with several clients; path → checksum of those that were acknowledged before the node was gone."""
    acknowledged: dict[str, str] = {}

    def put(part: range) -> None:
        with _connected(endpoint) as connection, contextlib.suppress(OSError, http.client.HTTPException):
            for number in part:
                path, body = f"/o/ais/bench/{folder}/{number:08d}", random.Random(number).randbytes(size)
                connection.request("PUT", path, body)
                response = connection.getresponse()
                response.read()
                if response.status in (200, 201):
                    acknowledged[path] = xxhash.xxh3_128_hexdigest(body)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(put, [numbers[first::CLIENTS] for first in range(CLIENTS)]))
    return acknowledged


def _missing(endpoint: str, acknowledged: dict[str, str]) -> int:
    """How many do not read back as they were stored."""
    wrong = 0
    with _connected(endpoint) as connection:
        for path, checksum in acknowledged.items():
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            told = response.headers.get("Shardmill-Checksum")
            is_right = xxhash.xxh3_128_hexdigest(body) == checksum and told == f"xxh3:{checksum}"
            wrong += not (response.status == 200 and is_right)
    return wrong


@contextlib.contextmanager
def _connected(endpoint: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(endpoint).netloc, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def _list(directory: Path, rounds: int) -> list[Row]:
    """Pages in key order by the client's clock, of a pool bucket and of a directory with the same keys."""
    files = directory / "files"
    for number in range(KEYS):
        path = files / "keys" / f"{number // PAGE:04d}" / f"{number:08d}"
        if number % PAGE == 0:
            path.parent.mkdir(parents=True)
        path.touch()
    buckets = ("--bucket", "ais://bench", "--bucket", f"gs://files=dir:{files}")
    with running_node(*buckets, data=directory / "data") as node, Client(node.endpoint) as client:
        assert len(_put_all(node.endpoint, "keys", range(KEYS), 0)) == KEYS
        return [
            Row(
                f"page of {PAGE} of {KEYS} keys from {what}, by the client",
                _pages(client, uri, rounds),
                "ms",
                at_most=5,
            )
            for what, uri in (("the pool", "ais://bench"), ("a directory", "gs://files"))
        ]


def _pages(client: Client, uri: str, rounds: int) -> Samples:
    pages = Samples()
    for _ in range(rounds):
        last, count = "", 0
        start = time.perf_counter()
        for page in client.bucket(uri).pages(limit=PAGE):
            pages.add((time.perf_counter() - start) * 1000)
            keys = [info.key for info in page.objects]
            assert [last, *keys] == sorted([last, *keys])
            last, count = keys[-1], count + len(keys)
            start = time.perf_counter()
        assert count == KEYS
    return pages
