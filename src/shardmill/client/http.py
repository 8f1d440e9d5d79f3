"""HTTP to one node: kept-alive connections, streamed bodies, errors raised by their code.

A body that ends early always raises. Only GET and HEAD are sent again, and only before their first byte.
"""

import contextlib
import http.client
import math
import random
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode, urlsplit

import msgspec

from shardmill import __version__
from shardmill.client.answers import Answer, NodeUnreachable, TruncatedBody
from shardmill.client.connection import Connection, ConnectionEnded, Unsent, WireError
from shardmill.client.framing import Sized, framing_of
from shardmill.client.leash import Leash
from shardmill.client.uploads import BytesUpload, Stopped, Upload, UploadFailed
from shardmill.core.api import ErrorBody
from shardmill.core.errors import BadRequest, ShardmillError, error_from_wire, error_types

DEFAULT_ENDPOINT = "http://localhost:51080"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 300.0  # without a byte; a sample may take 60 s, a cold environment as long again
MAX_IDLE = 16  # connections kept
MAX_ERROR_BODY = 4 << 20  # bytes; a traceback is far smaller
REFUSED_WAITS = (0.1, 0.3)  # seconds before the second and the third try
BUSY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, where Retry-After says nothing
MAX_RETRY_AFTER = 30.0  # seconds; who is told to wait longer is told so

_CODE_OF_STATUS = {error.status: error.code for error in error_types().values()}
_REPEATABLE = ("GET", "HEAD")
_TARGET = re.compile(r"/[!-~]*")
_FIELDS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")


class Transport:
    """Connections to one endpoint, shared by threads; a forked child uses none of its parent's."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        # Its ends are safe between threads without a lock, which a fork could leave held.
        self._idle: deque[Connection] = deque()
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
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        host = f"[{self._host}]" if ":" in self._host else _ascii(self._host)
        fields = f"Host: {host}{'' if port is None else f':{port}'}\r\nUser-Agent: shardmill/{__version__}\r\n"
        self._fields = fields + (f"Authorization: Bearer {token}\r\n" if token else "")
        if not _FIELDS.fullmatch(self._fields):
            raise BadRequest("the access token, or the endpoint's host, has characters that no header may have")

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | Upload | None = None,
        leash: Leash | None = None,
    ) -> Answer:
        """Send one request and return its answer, whose status is below 300.

        *Recovery:* GET and HEAD are sent again when the node is busy, was just started, or closed the connection.

        Args:
            method: Of HTTP.
            path: Percent-encoded, from the root of the endpoint.
            query: Encoded here.
            headers: Beside those that every request has.
            body: Of a PUT or POST.
            leash: Another thread may end the waiting by it, but for that of a connection to be made.

        Raises:
            NodeUnreachable: Nobody answers.
            ShardmillError: What the node answered.
            TruncatedBody: The leash was pulled.
        """
        target = self._base + path + (f"?{urlencode(query)}" if query else "")
        upload = BytesUpload(body) if isinstance(body, bytes) else body
        request = self._request_of(method, target, headers or {}, upload)
        refused, busy = iter(REFUSED_WAITS), iter(BUSY_WAITS)
        while True:
            try:
                answer = self._send(method, request, upload, leash)
            except NodeUnreachable as error:
                wait = next(refused, None) if _may_repeat(method, error) else None
                if wait is None:
                    raise
                _pause(wait, leash)
                continue
            if answer.status < 300:
                return answer
            refusal = _error_of(answer, method, path)
            wait, told = None, refusal.retry_after
            if method in _REPEATABLE and refusal.status == 503:
                wait = next(busy, None)
            if wait is None or (told is not None and told > MAX_RETRY_AFTER):
                raise refusal
            # Whoever was sent away together does not come back together.
            _pause((wait if told is None else told) * random.uniform(1.0, 1.2), leash)

    def tell(self, path: str, body: bytes, *, seconds: float) -> None:
        """POST what the node may as well never hear: no retry, no error, and no longer than `seconds` a step."""
        upload = BytesUpload(body)
        request = self._request_of("POST", self._base + path, {"Content-Type": "application/json"}, upload)
        try:
            connection = self._connect(seconds, seconds)
            with contextlib.closing(connection):
                self._exchange(connection, "POST", request, upload, None).read_all()
        except (NodeUnreachable, TruncatedBody):
            pass

    def take(self) -> Connection:
        """A connection for requests of the caller's own; it is closed, or given back when nothing more comes over it.

        Raises:
            NodeUnreachable: Nobody answers.
        """
        return self._idle_connection() or self._connect(CONNECT_SECONDS, SILENCE_SECONDS)

    def request_of(self, method: str, path: str) -> bytes:
        """A request without a body, as it is sent."""
        return self._request_of(method, self._base + path, {}, None)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose last answer was read to the end."""
        if connection.is_ours() and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close idle connections; those in use are closed by their answers."""
        while (connection := self._pop()) is not None:
            connection.close()

    def __del__(self) -> None:
        self.close()

    def _request_of(self, method: str, target: str, headers: Mapping[str, str], body: Upload | None) -> bytes:
        """The request's head, with as much of its body as goes along."""
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        if body is not None:
            fields += "Transfer-Encoding: chunked\r\n" if body.size is None else f"Content-Length: {body.size}\r\n"
        if not _TARGET.fullmatch(target) or not _FIELDS.fullmatch(fields):
            raise BadRequest(f"{method} {target!r} has characters in its path or headers that HTTP cannot carry")
        head = f"{method} {target} HTTP/1.1\r\n{self._fields}{fields}\r\n".encode("latin-1")
        return head if body is None else head + body.inline

    def _send(self, method: str, request: bytes, body: Upload | None, leash: Leash | None) -> Answer:
        connection = self._idle_connection()
        if connection is not None:
            try:
                return self._exchange(connection, method, request, body, leash)
            except NodeUnreachable as error:
                # The node may have closed it just now; only a fresh connection tells.
                if not isinstance(error.__cause__, Unsent) and not _may_repeat(method, error):
                    raise
        return self._exchange(self._connect(CONNECT_SECONDS, SILENCE_SECONDS), method, request, body, leash)

    def _exchange(
        self, connection: Connection, method: str, request: bytes, body: Upload | None, leash: Leash | None
    ) -> Answer:
        try:
            if leash is not None:
                leash.hold(connection)
            connection.send_first(request)
            is_sent = body is None or _send_body(connection, body)
            head = connection.read_head()
            framing = framing_of(connection, head, method)
            if not is_sent and head.status < 400:
                raise ConnectionEnded("answered before the body was sent")
        except UploadFailed as failed:
            # Closed without its end, the upload leaves nothing behind on the node.
            connection.close()
            raise failed.reason from None
        except (WireError, OSError) as error:
            connection.close()
            raise NodeUnreachable(self._unanswered(error)) from error
        except BaseException:
            connection.close()
            raise
        finally:
            if leash is not None:
                leash.hold(None)
        if framing is None and head.status < 400:
            connection.close()
            raise TruncatedBody("the answer has neither a length nor chunks, so its end could not be told from a cut")
        # What an error without a length has to say more cannot be told from what was cut of it.
        stays = head.stays and is_sent and framing is not None
        return Answer(connection, head, framing or Sized(connection, 0), self if stays else None)

    def _idle_connection(self) -> Connection | None:
        while (connection := self._pop()) is not None:
            if connection.is_ours() and not connection.has_input():
                return connection
            connection.close()
        return None

    def _pop(self) -> Connection | None:
        try:
            # The last one used is the least likely to have been closed meanwhile.
            return self._idle.pop()
        except IndexError:
            return None

    def _connect(self, seconds: float, silence: float) -> Connection:
        try:
            sock = socket.create_connection((self._host, self._port), seconds)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_hostname=self._host)
                sock.settimeout(silence)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise NodeUnreachable(self._unanswered(error)) from error
        return Connection(sock, is_plain=self._tls is None)

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
        if isinstance(error, WireError) and str(error):
            return f"what answers at {self.endpoint} is no node: {error}"
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return f"the node at {self.endpoint} closed the connection without an answer ({what})"


def _pause(seconds: float, leash: Leash | None) -> None:
    if leash is None:
        time.sleep(seconds)
    else:
        leash.wait(seconds)


def _send_body(connection: Connection, body: Upload) -> bool:
    """False: the node stopped listening in between."""
    try:
        body.send(connection)
    except Stopped:
        return False
    return True


def _may_repeat(method: str, error: NodeUnreachable) -> bool:
    """Whether a request can be sent again that got no answer."""
    return method in _REPEATABLE and isinstance(error.__cause__, ConnectionError | ConnectionEnded)


def _ascii(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise BadRequest(f"{host!r} is no host name") from None


def _error_of(answer: Answer, method: str, path: str) -> ShardmillError:
    """The error that an answer carries; a HEAD has only its status."""
    with answer:
        buffer = bytearray(min(answer.size or MAX_ERROR_BODY, MAX_ERROR_BODY))
        body = bytes(buffer[: answer.fill(memoryview(buffer))])
    seconds = _seconds_of(answer.headers.get("retry-after"))
    try:
        error = msgspec.json.decode(body, type=ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = f"{answer.status} {http.client.responses.get(answer.status, '')}".rstrip()
        return error_from_wire(
            _CODE_OF_STATUS.get(answer.status, ""),
            f"{method} {path}: {said}{_moved(answer)}",
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


def _seconds_of(retry_after: str | None) -> int | None:
    """Seconds to wait, said as such or as a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return int(retry_after[:9])
    try:
        return max(0, math.ceil(parsedate_to_datetime(retry_after).timestamp() - time.time()))
    except (ValueError, OverflowError):
        return None


def _moved(answer: Answer) -> str:
    location = answer.headers.get("location") if answer.status < 400 else None
    return f"; it is at {location}" if location else ""
