"""A million objects of the pool: pages from everywhere among them, all of them, and how soon that is so after an end.

Takes about ten minutes and, for a file each, 4 GB of disk; the rounds are those of the listings, all else is done once.
"""

import contextlib
import http.client
import shutil
import socket
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.processes import resident
from benchmarks.table import Row, Samples
from shardmill import Client
from shardmill.testing.node import RunningNode, running_node

KEYS = 1_000_000
FOLDER = 1000  # keys
PAGE = 1000  # keys
PAGES = 20  # of each kind, a round
WRITERS = 32
PIPELINED = 50  # requests sent together
BUCKET = "ais://bench"
FLAGS = ("--bucket", BUCKET, "--durability", "kill", "--log-level", "warning")
MEGABYTES = 300

Kinds = Sequence[tuple[str, dict[str, str]]]


def measure(directory: Path, rounds: int) -> list[Row]:
    """All rows.

    Args:
        directory: Scratch, on the disk that counts.
        rounds: Of listings.
    """
    data = directory / "data"
    with running_node(*FLAGS, data=data) as node:
        start = time.perf_counter()
        assert _put(node, "keys", range(KEYS)) == KEYS
        rate = KEYS / (time.perf_counter() - start)
        rows = [Row(f"{KEYS} empty objects stored, {WRITERS} writers, not flushed", Samples([rate]), "/s")]
        pages = {what: _pages(node, query, rounds) for what, query in _kinds()}
        rows += [Row(f"page of {PAGE} of them: {what}", found, "ms", at_most=10) for what, found in pages.items()]
        everything = Samples()
        with Client(node.endpoint) as client:
            for _ in range(min(rounds, 3)):
                start = time.perf_counter()
                assert sum(1 for _ in client.bucket(BUCKET).list()) == KEYS
                everything.add(time.perf_counter() - start)
        rows += [
            Row("all of them by the client", everything, "s", at_most=5),
            Row("memory of the node after that", Samples([resident(node.pid) / 1e6]), "MB", at_most=MEGABYTES),
        ]
        with ThreadPoolExecutor(1) as threads:
            writing = threads.submit(_put, node, "more", range(KEYS))
            while not _listed(node, "more/"):
                time.sleep(0.05)
            node.kill()
            more = writing.result()
    start = time.perf_counter()
    with running_node(*FLAGS, data=data) as node:
        ready = time.perf_counter() - start
        while len(_listed(node, "")) == 0 or _count(node, "more/") < more:
            time.sleep(0.05)
        complete = time.perf_counter() - start
        assert node.terminate() == 0
    for index in data.glob("index*"):
        shutil.rmtree(index)
    start = time.perf_counter()
    with running_node(*FLAGS, data=data) as node:
        served = time.perf_counter() - start
        while not _listed(node, ""):
            time.sleep(0.1)
        rebuilt = time.perf_counter() - start
    return [
        *rows,
        Row("from the start after kill -9 amid writes to the first answer", Samples([ready]), "s", at_most=2),
        Row(f"from the start to a listing with the {more} last acknowledged", Samples([complete]), "s", at_most=5),
        Row("from the start with a lost index to the first answer", Samples([served]), "s"),
        Row("from the start to a listing, the index made from the files", Samples([rebuilt]), "s", at_most=30),
    ]


def _kinds() -> Kinds:
    folder = f"keys/{KEYS // FOLDER // 2:04d}/"
    return (
        ("the first", {}),
        ("behind the middle key", {"after": _key("keys", KEYS // 2 + 1)}),
        ("behind the last but a thousand", {"after": _key("keys", KEYS - PAGE - 1)}),
        ("of a prefix in the middle", {"prefix": folder}),
        ("folders, rolled up by the delimiter", {"prefix": "keys/", "delimiter": "/"}),
    )


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number // FOLDER:04d}/{number:08d}"


def _put(node: RunningNode, folder: str, numbers: range) -> int:
    """Store empty objects with several writers; returns how many were acknowledged before the node was gone."""
    port = int(node.endpoint.rpartition(":")[2])

    def put(part: range) -> int:
        acknowledged = 0
        with socket.create_connection(("127.0.0.1", port), timeout=60) as peer, contextlib.suppress(OSError):
            for first in range(0, len(part), PIPELINED):
                keys = [_key(folder, number) for number in part[first : first + PIPELINED]]
                peer.sendall(b"".join(_request(key) for key in keys))
                heads = b""
                while heads.count(b"\r\n\r\n") < len(keys):
                    data = peer.recv(65536)
                    heads += data
                    if not data:
                        break
                # Answers to a PUT have no body.
                acknowledged += sum(head.startswith(b"HTTP/1.1 20") for head in heads.split(b"\r\n\r\n"))
                if heads.count(b"\r\n\r\n") < len(keys):
                    break
        return acknowledged

    with ThreadPoolExecutor(WRITERS) as writers:
        return sum(writers.map(put, [numbers[first::WRITERS] for first in range(WRITERS)]))


def _request(key: str) -> bytes:
    return f"PUT /o/ais/bench/{key} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()


def _pages(node: RunningNode, query: dict[str, str], rounds: int) -> Samples:
    """Milliseconds of each, to its last byte."""
    samples = Samples()
    asked = urllib.parse.urlencode({"bucket": BUCKET, "limit": str(PAGE), **query})
    with contextlib.closing(http.client.HTTPConnection(urllib.parse.urlsplit(node.endpoint).netloc)) as connection:
        for number in range(rounds * PAGES + 1):
            start = time.perf_counter()
            connection.request("GET", f"/api/objects?{asked}")
            answer = connection.getresponse()
            body = answer.read()
            taken = time.perf_counter() - start
            if answer.status != 200 or b"keys/" not in body:
                raise RuntimeError(body[:500])
            if number:
                samples.add(taken * 1000)
    return samples


def _listed(node: RunningNode, prefix: str) -> bytes:
    """One key, where the listing is there and has one."""
    asked = urllib.parse.urlencode({"bucket": BUCKET, "limit": "1", "prefix": prefix})
    with contextlib.closing(http.client.HTTPConnection(urllib.parse.urlsplit(node.endpoint).netloc)) as connection:
        connection.request("GET", f"/api/objects?{asked}")
        answer = connection.getresponse()
        body = answer.read()
        return body if answer.status == 200 and b'"key"' in body else b""


def _count(node: RunningNode, prefix: str) -> int:
    with Client(node.endpoint) as client:
        return sum(1 for _ in client.bucket(BUCKET).list(prefix))
