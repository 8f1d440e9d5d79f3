"""One client of a node, by the library that is named: CPU of small calls and of large reads, for each line of input.

Usage: http_clients.py LIBRARY BASE SMALL LARGE CALLS, the last three being paths of two objects and a number.
"""

import http.client
import importlib
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

BLOCK = 1 << 20
BODY = bytes(4096)
READS = 8  # of the large object, one after the other


class Calls(Protocol):
    """What is measured."""

    def head(self) -> object: ...
    def get(self) -> bytes: ...
    def put(self) -> object: ...
    def large(self) -> int: ...


class Shardmill:
    def __init__(self, base: str, small: str, large: str) -> None:
        from shardmill import Client
        from shardmill.core.paths import parse_object_path

        client = Client(base)
        self._small = client.object(str(parse_object_path(small)))
        self._large = client.object(str(parse_object_path(large)))
        self._buffer = bytearray(BLOCK)
        self.head: Callable[[], object] = self._small.head
        self.get: Callable[[], bytes] = self._small.read

    def put(self) -> object:
        return self._small.put(BODY)

    def large(self) -> int:
        size = 0
        with self._large.get() as reader:
            while count := reader.readinto(self._buffer):
                size += count
        return size


class Requests:
    def __init__(self, base: str, small: str, large: str) -> None:
        self._session: Any = importlib.import_module("requests").Session()
        self._small, self._large = base + small, base + large

    def head(self) -> object:
        return self._session.head(self._small).raise_for_status()

    def get(self) -> bytes:
        return bytes(self._session.get(self._small).content)

    def put(self) -> object:
        return self._session.put(self._small, data=BODY).raise_for_status()

    def large(self) -> int:
        with self._session.get(self._large, stream=True) as answer:
            return sum(len(chunk) for chunk in answer.iter_content(BLOCK))


class Httpx:
    def __init__(self, base: str, small: str, large: str) -> None:
        self._client: Any = importlib.import_module("httpx").Client()
        self._small, self._large = base + small, base + large

    def head(self) -> object:
        return self._client.head(self._small).raise_for_status()

    def get(self) -> bytes:
        return bytes(self._client.get(self._small).content)

    def put(self) -> object:
        return self._client.put(self._small, content=BODY).raise_for_status()

    def large(self) -> int:
        with self._client.stream("GET", self._large) as answer:
            return sum(len(chunk) for chunk in answer.iter_raw())


class Urllib3:
    def __init__(self, base: str, small: str, large: str) -> None:
        self._pool: Any = importlib.import_module("urllib3").PoolManager()
        self._small, self._large = base + small, base + large

    def head(self) -> object:
        return self._pool.request("HEAD", self._small).status

    def get(self) -> bytes:
        return bytes(self._pool.request("GET", self._small).data)

    def put(self) -> object:
        return self._pool.request("PUT", self._small, body=BODY).status

    def large(self) -> int:
        answer = self._pool.request("GET", self._large, preload_content=False)
        size = sum(len(chunk) for chunk in answer.stream(BLOCK))
        answer.release_conn()
        return size


class HttpClient:
    def __init__(self, base: str, small: str, large: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(base).netloc)
        self._small, self._large = small, large
        self._buffer = bytearray(BLOCK)

    def head(self) -> object:
        return self._ask("HEAD").read()

    def get(self) -> bytes:
        return self._ask("GET").read()

    def put(self) -> object:
        return self._ask("PUT", BODY).read()

    def large(self) -> int:
        self._connection.request("GET", self._large)
        answer, size = self._connection.getresponse(), 0
        while count := answer.readinto(self._buffer):
            size += count
        return size

    def _ask(self, method: str, body: bytes | None = None) -> http.client.HTTPResponse:
        self._connection.request(method, self._small, body)
        return self._connection.getresponse()


class Bare:
    """The limit."""

    def __init__(self, base: str, small: str, large: str) -> None:
        parts = urlsplit(base)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 80))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(BLOCK)
        self._view = memoryview(self._buffer)
        self._requests = {
            method: f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{fields}\r\n".encode()
            for method, path, fields in (
                ("HEAD", small, ""),
                ("GET", small, ""),
                ("PUT", small, f"Content-Length: {len(BODY)}\r\n"),
            )
        }
        self._of_large = self._requests["GET"].replace(small.encode(), large.encode())

    def head(self) -> object:
        return self._ask(self._requests["HEAD"], has_body=False)

    def get(self) -> bytes:
        start, stop = self._ask(self._requests["GET"])
        return bytes(self._view[start:stop])

    def put(self) -> object:
        return self._ask(self._requests["PUT"] + BODY)

    def large(self) -> int:
        start, stop = self._ask(self._of_large, is_whole=False)
        size, left = stop - start, self._left
        while left:
            count = self._socket.recv_into(self._view, min(left, BLOCK))
            left, size = left - count, size + count
        return size

    def _ask(self, request: bytes, *, has_body: bool = True, is_whole: bool = True) -> tuple[int, int]:
        """Where in the buffer the body lies, as far as it is there."""
        self._socket.sendall(request)
        have = self._socket.recv_into(self._view)
        while (end := self._buffer.find(b"\r\n\r\n", 0, have)) < 0:
            have += self._socket.recv_into(self._view[have:])
        place = self._buffer.find(b"Content-Length: ", 0, end)
        size = int(self._buffer[place + 16 : self._buffer.find(b"\r\n", place)]) if place >= 0 and has_body else 0
        start = end + 4
        while is_whole and have < start + size:
            have += self._socket.recv_into(self._view[have:])
        self._left = start + size - have
        return start, have


LIBRARIES: dict[str, Callable[[str, str, str], Calls]] = {
    "shardmill": Shardmill,
    "requests": Requests,
    "httpx": Httpx,
    "urllib3": Urllib3,
    "http.client": HttpClient,
    "bare": Bare,
}


def main() -> None:
    """Microseconds of CPU: of a HEAD, a GET and a PUT of 4 KiB, and a read of the large object."""
    library, base, small, large = sys.argv[1:5]
    calls = int(sys.argv[5])
    client = LIBRARIES[library](base, small, large)
    client.put()
    size = client.large()
    assert client.get() == BODY
    print(f"ready {size}", flush=True)
    for _ in sys.stdin:
        took = [_cpu(work, calls) / calls * 1e6 for work in (client.head, client.get, client.put)]
        print(*took, _cpu(client.large, READS) / READS * 1e6, flush=True)


def _cpu(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
