"""Readers of one URL as a test needs them: plain HTTP over sockets, at their own speed, leaving when told to."""

import hashlib
import http.client
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from shardmill import Client

SECONDS = 60.0  # for anything to come about

_METRIC = re.compile(r"(\w+)(?:\{(.*)\})? ([0-9.eE+-]+)")


@dataclass
class Answer:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def etag(self) -> str:
        return self.headers["ETag"]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


class Reader:
    """One connection with one GET on it. Resources: leave the context, or call `leave`."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)
        self._connection.sock = socket.socket()
        # Little room on this side, so that not reading soon stops the sender.
        self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self._connection.sock.settimeout(SECONDS)
        self._connection.sock.connect((parts.hostname, parts.port))
        self._connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers or {})
        self._response: http.client.HTTPResponse | None = None
        self._read = bytearray()

    def begin(self, size: int = 1) -> "Reader":
        """Wait for the head and read that many bytes."""
        self._read += self.response.read(size)
        return self

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    @property
    def received(self) -> bytes:
        return bytes(self._read)

    def finish(self) -> Answer:
        """Read the rest and leave."""
        try:
            while piece := self.response.read(1 << 20):
                self._read += piece
            # The library raises for chunks only.
            if self.response.length:
                raise http.client.IncompleteRead(bytes(self._read), self.response.length)
            return Answer(self.response.status, dict(self.response.headers), bytes(self._read))
        finally:
            self.leave()

    def leave(self) -> None:
        """Hang up, wherever the answer is."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def get(url: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> Answer:
    """One request on a connection of its own."""
    with Reader(url, headers, method=method) as reader:
        return reader.finish()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Return once it holds; fails with `what` when it does not come about."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def metric(client: Client, name: str, **labels: str) -> float:
    """The sum of a metric over all of its series that have these labels."""
    total = 0.0
    text = client.metrics()
    # Its kept connection would count as left behind by the test.
    client.close()
    for line in text.splitlines():
        match = _METRIC.fullmatch(line)
        if match and match[1] == name and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            total += float(match[3])
    return total


def processes_of(pid: int) -> list[int]:
    """All processes below one, its own not among them; those that have ended do not count."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *processes_of(child)]
    return found


def open_files(pid: int) -> list[str]:
    """What its descriptors lead to, sockets left out: those of kept connections come and go."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue
        if not target.startswith("socket:"):
            found.append(target)
    return sorted(found)
