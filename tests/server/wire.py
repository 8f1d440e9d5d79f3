"""HTTP as bytes: requests as a test spells them, answers as they came, and nothing of a client's good manners between."""

import json
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from shardmill.testing.node import RunningNode
from tests.etl.support import request_for

HOST = b"Host: localhost\r\n"
PATIENCE = 30.0  # seconds for an answer; far beyond what any takes


class Unfinished(AssertionError):
    """The connection ended inside an answer; `got` is the body so far."""

    def __init__(self, status: int, got: bytes) -> None:
        super().__init__(f"{status} was cut after {len(got)} bytes of body")
        self.status = status
        self.got = got


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; of doubled ones the values are joined."""
    body: bytes

    @property
    def code(self) -> str:
        """The `code` of an error."""
        return str(self.json()["code"])

    @property
    def message(self) -> str:
        return str(self.json()["message"])

    def json(self) -> dict[str, object]:
        document = json.loads(self.body)
        assert isinstance(document, dict)
        return document


class Peer:
    """One connection. Every error that it reads is checked to be one of ours, with nothing of the server's inside."""

    def __init__(self, node: RunningNode, hidden: Sequence[str], *, receive_buffer: int | None = None) -> None:
        self._hidden = hidden
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", int(node.endpoint.rpartition(":")[2])))
        self._pending = b""

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reset(self) -> None:
        """Leave as a crash does, without a FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read(self, *, head: bool = False) -> Answer:
        """The next answer; `head`: it is to a HEAD, so it has no body."""
        status, headers = self.read_head()
        body = b"" if head or status in (204, 304) or status < 200 else self.read_body(status, headers)
        answer = Answer(status, headers, body)
        if status >= 400 and not head:
            check_error(answer, self._hidden)
        return answer

    def read_head(self) -> tuple[int, dict[str, str]]:
        block = self._until(b"\r\n\r\n")
        first, *lines = block.decode("utf-8", "surrogateescape").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), first
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, line
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        return int(status), headers

    def read_some(self) -> bytes:
        """What there is of a body, framing included; b"" at the end."""
        data, self._pending = self._pending or self._receive(), b""
        return data

    def unread(self, data: bytes) -> None:
        """Put back what `read_some` gave."""
        self._pending = data + self._pending

    def wait_closed(self, *, drop: bool = False) -> None:
        """Return when the node has closed the connection; `drop`: whatever it still sends may be lost."""
        if drop:
            self._pending = b""
        assert self._pending == b"", self._pending[:200]
        while data := self._receive():
            assert drop, data[:200]

    def read_body(self, status: int, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            return self.read_chunks(status)
        assert "content-length" in headers, headers
        size = int(headers["content-length"])
        pieces, got = [self._pending], len(self._pending)
        while got < size:
            data = self._receive()
            if not data:
                raise Unfinished(status, b"".join(pieces))
            pieces.append(data)
            got += len(data)
        whole = b"".join(pieces)
        self._pending = whole[size:]
        return whole[:size]

    def read_chunks(self, status: int, sizes: list[int] | None = None) -> bytes:
        """The rest of a chunked body of an answer with this status; `sizes` takes those of its chunks."""
        body = bytearray()
        while True:
            try:
                size = int(self._until(b"\r\n"), 16)
                chunk = self._exactly(size, body)
                assert self._exactly(2, body) == b"\r\n"
            except EOFError:
                raise Unfinished(status, bytes(body)) from None
            if not size:
                return bytes(body)
            body += chunk
            if sizes is not None:
                sizes.append(size)

    def _exactly(self, size: int, before: bytearray) -> bytes:
        pieces, got = [self._pending], len(self._pending)
        while got < size:
            data = self._receive()
            if not data:
                before += b"".join(pieces)
                raise EOFError
            pieces.append(data)
            got += len(data)
        whole = b"".join(pieces)
        self._pending = whole[size:]
        return whole[:size]

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._pending:
            data = self._receive()
            if not data:
                raise EOFError(f"closed, after {self._pending[:200]!r}")
            self._pending += data
        found, _, self._pending = self._pending.partition(mark)
        return found

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 20)
        except ConnectionError:
            return b""


def check_error(answer: Answer, hidden: Sequence[str]) -> None:
    """It is JSON {code, message, request_id}, and shows no path and no trace of the server's own."""
    assert answer.headers["content-type"].startswith("application/json"), answer
    document = answer.json()
    assert set(document) - {"traceback"} == {"code", "message", "request_id"}, document
    assert all(isinstance(value, str) and value for value in document.values()), document
    assert document["request_id"] == answer.headers["shardmill-request-id"], answer
    assert document["code"] != "internal", "a defect; the node's output has its story"
    users = str(document.pop("traceback", ""))
    for text in ("/src/", "site-packages", "Traceback", "aiohttp", *hidden):
        assert text not in json.dumps(document), document
        assert text not in str(answer.headers), answer.headers
        assert text == "Traceback" or text not in users, users


class Wire:
    """A node, spoken to in bytes."""

    def __init__(self, node: RunningNode, hidden: Sequence[str]) -> None:
        self.node = node
        self.hidden = (str(node.data), *hidden)

    def connect(self, *, receive_buffer: int | None = None) -> Peer:
        return Peer(self.node, self.hidden, receive_buffer=receive_buffer)

    def tell(self, data: bytes) -> Answer:
        """One connection, these bytes, the first answer."""
        with self.connect() as peer:
            peer.send(data)
            return peer.read()

    def ask(self, method: str, path: str, *headers: str, body: bytes | None = None) -> Answer:
        """A request that is well-formed but for what the test makes of it."""
        with self.connect() as peer:
            peer.send(request(method, path, *headers, body=body))
            return peer.read(head=method == "HEAD")

    def get(self, path: str, *headers: str) -> Answer:
        return self.ask("GET", path, *headers)

    def put(self, path: str, body: bytes, *headers: str) -> Answer:
        return self.ask("PUT", path, *headers, body=body)

    def delete(self, path: str, *headers: str) -> Answer:
        return self.ask("DELETE", path, *headers)

    def post_json(self, path: str, document: object, *headers: str) -> Answer:
        return self.ask("POST", path, *headers, body=msgspec.json.encode(document))

    def register(self, source: str, name: str, *, decoder: str | None = None) -> str:
        """Register the function `transform` of some source code; gives its `name@digits`."""
        answer = self.post_json("/api/transforms", request_for(source, name=name, decoder=decoder))
        assert answer.status in (200, 201), answer
        return str(answer.json()["uuid"])

    def metrics(self) -> dict[str, float]:
        """Sample line → value."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def descriptors(self) -> dict[str, str]:
        """Descriptor → target, of the node."""
        return descriptors(self.node.pid)

    def connections(self) -> set[str]:
        """Descriptor targets of the node's TCP connections."""
        port = f":{int(self.node.endpoint.rpartition(':')[2]):04X}"
        rows = [line.split() for line in Path(f"/proc/{self.node.pid}/net/tcp").read_text().splitlines()[1:]]
        listening = "0A"
        known = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(port) and row[3] != listening}
        return known & set(self.descriptors().values())

    def temporary_files(self) -> list[Path]:
        """What uploads have in the making."""
        return [path for path in self.node.data.glob("pool/*/tmp/*") if path.is_file()]


def descriptors(pid: int) -> dict[str, str]:
    """Open descriptors of a process → what they are of."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[link.name] = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
    return found


def request(method: str, path: str, *headers: str, body: bytes | None = None) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + (body or b"")


def in_chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
