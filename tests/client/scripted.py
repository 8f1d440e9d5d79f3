"""A node of a few lines that answers byte by byte what a test wants."""

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from shardmill.client import Client

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

Script = list[bytes | None]
"""One answer a request; None closes the connection without one. A leading `!` closes it behind the answer."""


class ScriptedNode:
    """Gives the scripted answers in order, over as many connections as the client opens."""

    def __init__(self, script: Script) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already by the test
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(5)
                with contextlib.suppress(OSError):
                    while self._script and self._answer(connection):
                        pass

    def _answer(self, connection: socket.socket) -> bool:
        head = read_request(connection)
        if not head:
            return False
        self.requests.append(head)
        answer = self._script.pop(0)
        if answer is None:
            return False
        connection.sendall(answer.removeprefix(b"!"))
        return not answer.startswith(b"!")


Build = Callable[..., tuple[ScriptedNode, Client]]


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nShardmill-Request-Id: r1\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


class ThreadedServer(ABC):
    """Serves every connection in a thread of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        """All that there have been."""
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Answer nothing more; whoever is being served finds the connection ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Answer what comes over a connection, which the caller closes."""

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.serve(connection)


def read_request(connection: socket.socket) -> bytes:
    """The next head; empty when there is none."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    return data


class ObjectNode(ThreadedServer):
    """Serves one object with ranges and an ETag to many connections at once, and misbehaves as it is told."""

    def __init__(self, body: bytes, *, is_chunked: bool = False) -> None:
        self.body = body
        self.etag = "v1"
        self.is_chunked = is_chunked
        self.requests: list[bytes] = []
        self.spoil: Callable[[int, bytes], bytes | None] = lambda _, answer: answer
        """Number of a request, from 0, and its answer → what is sent instead; None: nothing ever. Shorter: and closed."""
        self.before: Callable[[int], None] = lambda _: None
        """Called with the number of a request before it is answered."""
        self._lock = threading.Lock()
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        while head := read_request(connection):
            with self._lock:
                number = len(self.requests)
                self.requests.append(head)
                self.before(number)
                right = self._answer(head)
            sent = self.spoil(number, right)
            if sent is None:
                connection.recv(1)
                return
            connection.sendall(sent)
            if len(sent) < len(right):
                return

    def _answer(self, head: bytes) -> bytes:
        lines = head.decode().split("\r\n")
        asked = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        etag = f'"{self.etag}"'
        if asked.get("if-match", etag) != etag:
            return answer("412 Precondition Failed", b'{"code":"precondition_failed","message":"m","request_id":"r"}')
        if "range" not in asked or asked.get("if-range", etag) != etag:
            return self._framed("200 OK", self.body, f"ETag: {etag}")
        first, last = asked["range"].removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(self.body)) + 1, len(self.body))
        told = f"Content-Range: bytes {start}-{stop - 1}/{len(self.body)}"
        return self._framed("206 Partial Content", self.body[start:stop], f"ETag: {etag}", told)

    def _framed(self, status: str, body: bytes, *headers: str) -> bytes:
        if not self.is_chunked:
            return answer(status, body, *headers)
        head = "\r\n".join([f"HTTP/1.1 {status}", "Transfer-Encoding: chunked", *headers]).encode() + b"\r\n\r\n"
        pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
        return head + b"".join(b"%x;note=x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nT: x\r\n\r\n"
