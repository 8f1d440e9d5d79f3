"""HTTP to one node: kept-alive connections, streamed bodies, errors raised by their code.

A body that ends early always raises. Only GET and HEAD are sent again, and only before their first byte.
"""

import http.client
import os
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlencode, urlsplit

import msgspec

from shardmill import __version__
from shardmill.core.api import ErrorBody
from shardmill.core.errors import BadRequest, Busy, ShardmillError, error_from_wire, error_types

DEFAULT_ENDPOINT = "http://localhost:51080"
BLOCK = 1 << 20  # bytes asked for at once; smaller pieces cost up to five times the CPU
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 300.0  # without a byte; a sample may take 60 s, a cold environment as long again
MAX_IDLE = 16  # connections kept
MAX_ERROR_BODY = 4 << 20  # bytes; a traceback is far smaller
REFUSED_WAITS = (0.1, 0.3)  # seconds before the second and the third try
BUSY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, where Retry-After says nothing
MAX_RETRY_AFTER = 30.0  # seconds

_CODE_OF_STATUS = {error.status: error.code for error in error_types().values()}


class NodeUnreachable(ConnectionError):
    """Nothing answers at the endpoint."""


class TruncatedBody(ConnectionError):
    """A body ended before its end, so what arrived is not the whole."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is sent piece by piece."""

    pieces: Iterable[bytes | bytearray | memoryview]
    size: int | None
    """Bytes in all; None: unknown, sent chunked."""


class _UploadFailed(Exception):
    """The pieces of an upload could not be made."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class Answer:
    """The answer to one request, its body still to be read.

    Resources: whoever got it closes it; read to the end, its connection is used again.
    """

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, pool: "Transport"):
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers  # type: ignore[assignment]  # a Message is one, untyped
        self._connection = connection
        self._response = response
        self._pool = pool
        self._remaining = response.length
        self._is_chunked = bool(response.chunked)
        self._done = False
        self._closed = False
        if self._remaining == 0 or response.isclosed():
            self._finish()
        elif self._remaining is None and not self._is_chunked:
            self.close()
            raise TruncatedBody("the answer has neither a length nor chunks, so its end could not be told from a cut")

    @property
    def request_id(self) -> str | None:
        return self.headers.get("Shardmill-Request-Id")

    @property
    def size(self) -> int | None:
        """Bytes of the body, if the node said so."""
        length = self.headers.get("Content-Length")
        return int(length) if length is not None else None

    def read_some(self, limit: int = BLOCK) -> bytes:
        """What has arrived, at most `limit` bytes; empty at the end.

        Raises:
            TruncatedBody: The node stopped in mid-body.
        """
        if self._done or limit <= 0:
            return b""
        try:
            data = self._response.read1(limit)
        except (http.client.HTTPException, OSError) as error:
            raise self._cut(error) from error
        self._count(len(data))
        return data

    def read_into(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes; 0 at the end. Cheapest for bodies of a known length."""
        if self._done or not view:
            return 0
        if self._is_chunked:
            data = self.read_some(len(view))
            view[: len(data)] = data
            return len(data)
        try:
            count = self._response.readinto(view)
        except (http.client.HTTPException, OSError) as error:
            raise self._cut(error) from error
        self._count(count)
        return count

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes, however long that takes; fewer bytes only at the end.

        Raises:
            TruncatedBody: The node stopped in mid-body; what is in the buffer then is worth nothing.
        """
        if not self._is_chunked:
            filled = 0
            while filled < len(view) and (count := self.read_into(view[filled:])):
                filled += count
            return filled
        if self._done or not view:
            return 0
        try:
            count = self._response.readinto(view)
        except (http.client.HTTPException, OSError) as error:
            raise self._cut(error) from error
        self._count(count)
        if count < len(view):
            self._finish()
        return count

    def read_all(self) -> bytes:
        """The rest of the body."""
        if self._remaining is None:
            return b"".join(iter(self.read_some, b""))
        body = bytearray(self._remaining)
        view, position = memoryview(body), 0
        while count := self.read_into(view[position : position + BLOCK]):
            position += count
        return bytes(body)

    def read_line(self) -> bytes:
        """The next line with its end; empty at the end of the body."""
        if self._done:
            return b""
        try:
            line = self._response.readline()
        except (http.client.HTTPException, OSError) as error:
            raise self._cut(error) from error
        self._count(len(line))
        return line

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._response.close()
            if self._done and not self._response.will_close:
                self._pool.give_back(self._connection)
            else:
                self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, count: int) -> None:
        if self._remaining is not None:
            self._remaining -= count
            if not count and self._remaining:
                raise self._cut(None)
            if not self._remaining:
                self._finish()
        elif not count:
            self._finish()

    def _finish(self) -> None:
        self._done = True
        self.close()

    def _cut(self, error: BaseException | None) -> TruncatedBody:
        self.close()
        missing = "" if self._remaining is None else f", {self._remaining} bytes before its end"
        reason = "the node was silent for too long" if isinstance(error, TimeoutError) else "the connection was closed"
        return TruncatedBody(f"the body was cut{missing}: {reason}")


class Transport:
    """Connections to one endpoint, shared by threads; a forked child starts with none."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._idle: list[http.client.HTTPConnection] = []
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        wrong = BadRequest(f"endpoint {endpoint!r} is not of the form http://HOST:PORT")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise wrong
        try:
            port = parts.port
        except ValueError:
            raise wrong from None
        self.endpoint = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._base = parts.path.rstrip("/")
        self._host, self._port = parts.hostname, port
        self._token = token
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | Upload | None = None,
    ) -> Answer:
        """Send one request and return its answer, whose status is below 400.

        Args:
            method: GET and HEAD are sent again when the node is busy or was just started.
            path: Percent-encoded, from the root of the endpoint.
            query: Encoded here.
            headers: Beside those that every request has.
            body: Of a PUT or POST.

        Raises:
            NodeUnreachable: Nobody answers.
            ShardmillError: What the node answered.
        """
        target = self._base + path + (f"?{urlencode(query)}" if query else "")
        refused, busy = iter(REFUSED_WAITS), iter(BUSY_WAITS)
        may_repeat = method in ("GET", "HEAD")
        while True:
            try:
                answer = self._send(method, target, headers or {}, body)
                if answer.status < 400:
                    return answer
                raise _error_of(answer, method, path)
            except Busy as error:
                wait = next(busy, None) if may_repeat else None
                if wait is None:
                    raise
                time.sleep(min(error.retry_after or wait, MAX_RETRY_AFTER) * random.uniform(0.8, 1.2))
            except NodeUnreachable as error:
                wait = next(refused, None) if may_repeat else None
                if wait is None or not isinstance(error.__cause__, ConnectionRefusedError):
                    raise
                time.sleep(wait)

    def tell(self, path: str, body: bytes, *, seconds: float) -> None:
        """POST what the node may as well never hear: no retry, no error, and no longer than `seconds` a step."""
        connection = self._build(seconds)
        headers = {"Content-Type": "application/json", "User-Agent": f"shardmill/{__version__}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request("POST", self._base + path, body, headers)
            connection.getresponse().read()
        except (http.client.HTTPException, OSError):
            pass
        finally:
            connection.close()

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to the end."""
        with self._lock:
            if self._process == os.getpid() and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close idle connections; those in use are closed by their answers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __del__(self) -> None:
        for connection in self._idle:
            connection.close()

    def _send(self, method: str, target: str, headers: Mapping[str, str], body: bytes | Upload | None) -> Answer:
        connection = self._idle_connection()
        if connection is not None:
            try:
                return self._exchange(connection, method, target, headers, body)
            except NodeUnreachable:
                # The node may have closed it just now; only a fresh connection tells.
                if method not in ("GET", "HEAD"):
                    raise
        return self._exchange(self._connect(), method, target, headers, body)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Upload | None,
    ) -> Answer:
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            connection.putheader("User-Agent", f"shardmill/{__version__}")
            if self._token:
                connection.putheader("Authorization", f"Bearer {self._token}")
            for name, value in headers.items():
                connection.putheader(name, value)
            is_sent = self._send_body(connection, body)
            response = connection.getresponse()
            if not is_sent and response.status < 400:
                raise ConnectionResetError("answered before the body was sent")
        except _UploadFailed as failed:
            # Closed without its end, the upload leaves nothing behind on the node.
            connection.close()
            raise failed.reason from None
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            raise NodeUnreachable(self._unanswered(error)) from error
        except BaseException:
            connection.close()
            raise
        return Answer(connection, response, self)

    def _send_body(self, connection: http.client.HTTPConnection, body: bytes | Upload | None) -> bool:
        """False: the node stopped listening in between."""
        if body is None:
            connection.endheaders()
            return True
        upload = body if isinstance(body, Upload) else Upload((body,), len(body))
        if upload.size is None:
            connection.putheader("Transfer-Encoding", "chunked")
        else:
            connection.putheader("Content-Length", str(upload.size))
        connection.endheaders()
        for piece in _pieces(upload):
            try:
                _send_piece(connection, memoryview(piece).cast("B"), is_chunked=upload.size is None)
            except (BrokenPipeError, ConnectionResetError):
                # A node that refuses an upload answers before it has read it all: that answer is the reason.
                return False
        if upload.size is None:
            connection.send(b"0\r\n\r\n")
        return True

    def _idle_connection(self) -> http.client.HTTPConnection | None:
        with self._lock:
            if self._process != os.getpid():
                # Forked: the parent's connections are not ours to speak on.
                self._process = os.getpid()
                self._idle.clear()
            while self._idle:
                connection = self._idle.pop()
                if connection.sock is not None and not _is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def _connect(self) -> http.client.HTTPConnection:
        connection = self._build(CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise NodeUnreachable(self._unanswered(error)) from error
        connection.sock.settimeout(SILENCE_SECONDS)
        return connection

    def _build(self, seconds: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        return http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=self._tls)

    def _unanswered(self, error: BaseException) -> str:
        if isinstance(error, ConnectionRefusedError):
            return f"no node at {self.endpoint}; start one with: shardmill serve DIR"
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or "TLS failed"
            return f"no TLS with {self.endpoint}: {reason}; name its certificate in SSL_CERT_FILE, or use http://"
        if isinstance(error, socket.gaierror):
            return f"no node at {self.endpoint}: its host name is not known"
        if isinstance(error, TimeoutError):
            return f"the node at {self.endpoint} does not answer"
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return f"the node at {self.endpoint} closed the connection without an answer ({what})"


def _pieces(upload: Upload) -> Iterator[bytes | bytearray | memoryview]:
    sent = 0
    try:
        for piece in upload.pieces:
            sent += memoryview(piece).nbytes
            yield piece
    except Exception as error:
        raise _UploadFailed(error) from error
    if upload.size is not None and sent != upload.size:
        raise _UploadFailed(ValueError(f"the body has {sent} bytes, {upload.size} were announced"))


def _send_piece(connection: http.client.HTTPConnection, piece: memoryview, *, is_chunked: bool) -> None:
    if not len(piece):
        return  # an empty chunk would end the body
    if is_chunked:
        connection.send(b"%x\r\n" % len(piece))
    for start in range(0, len(piece), BLOCK):
        connection.send(piece[start : start + BLOCK])
    if is_chunked:
        connection.send(b"\r\n")


def _is_readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to say, which can only be its end."""
    poller = select.poll() if hasattr(select, "poll") else None
    if poller is None:
        return bool(select.select([sock], [], [], 0)[0])
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def _error_of(answer: Answer, method: str, path: str) -> ShardmillError:
    """The error that an answer carries; a HEAD has only its status."""
    with answer:
        size = answer.size
        body = b"" if size is not None and size > MAX_ERROR_BODY else answer.read_all()
    retry_after = answer.headers.get("Retry-After", "")
    seconds = int(retry_after) if retry_after.isdigit() else None
    try:
        error = msgspec.json.decode(body, type=ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return error_from_wire(
            _CODE_OF_STATUS.get(answer.status, ""),
            f"{method} {path}: {answer.status} {http.client.responses.get(answer.status, '')}".rstrip(),
            status=answer.status,
            request_id=answer.request_id,
            retry_after=seconds,
        )
    return error_from_wire(
        error.code,
        error.message,
        status=answer.status,
        traceback=error.traceback,
        request_id=error.request_id,
        retry_after=seconds,
    )
