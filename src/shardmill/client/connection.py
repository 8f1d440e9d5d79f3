"""One connection to a node: requests go out, heads and bodies come in, by a strict reading of HTTP/1.1 (RFC 9112).

Whatever a node does not send is refused rather than interpreted. A body's end is told by its length or its last chunk,
never by the end of the connection.
"""

import os
import re
import select
import socket
import ssl
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_HEAD = 64 << 10  # bytes of a head, of a chunk's line, of all trailers; a node's are below 4 KiB
DIRECT = 16 << 10  # bytes wanted from which on they are received where they are wanted; below, through the buffer

_MAX_INTERIM = 8  # 1xx answers before the one that counts

_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*+))?\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+)"
)
_STATUS = len("HTTP/1.1 200")
_GOES_ON = re.compile(rb"HTTP/1\.[01] [123]|.{0,11}\Z", re.DOTALL)
_SINGLE = ("content-length", "transfer-encoding", "content-range")


class WireError(Exception):
    """What arrived is no answer by HTTP/1.1, or one that could be read in two ways."""


class ConnectionEnded(WireError):
    """The node closed the connection before the end."""


class Unsent(WireError):
    """Nothing of a request was sent, so that no node has seen it."""


class InheritedConnection(WireError):
    """The connection is the parent process's; this one is a fork of it."""


class Fields(dict[str, str]):
    """Fields of a head, whose names are in lower case and are found however they are written."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


@dataclass(frozen=True, slots=True)
class Head:
    """Status and fields of an answer."""

    status: int
    reason: str
    fields: Fields
    """What came several times is joined by commas."""
    stays: bool
    """Whether the connection can be used again behind the body."""


class Connection:
    """A socket with what has arrived of it. Resources: whoever holds it closes it, or gives it back to its pool."""

    __slots__ = ("_buffer", "_poll", "_process", "_socket", "_start", "_stop", "_view", "is_fresh", "is_plain")

    def __init__(self, sock: socket.socket, *, is_plain: bool) -> None:
        self._socket = sock
        self._process = os.getpid()
        self._buffer = bytearray(MAX_HEAD)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0
        self.is_plain = is_plain
        """Without TLS: the socket is the node's own, and files go out by the kernel."""
        self.is_fresh = True
        """No answer has come over it yet."""
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(sock, select.POLLIN)

    def close(self) -> None:
        self._socket.close()

    def interrupt(self) -> None:
        """Make whoever waits for this connection in another thread find it ended."""
        try:
            # Not the method of a socket with TLS: it ends that, and what is left is then read as it came, encrypted.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            pass  # it ended by itself

    def has_input(self) -> bool:
        """Whether something has arrived; of an idle connection that can only be its end."""
        if self._start != self._stop or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        if self._poll is None:
            return bool(select.select([self._socket], [], [], 0)[0])
        return bool(self._poll.poll(0))

    def is_refused(self) -> bool:
        """Whether a request is refused already that is still being sent. Under TLS never: what has arrived may be of
        the protocol itself."""
        if not self.is_plain or not self.has_input():
            return False
        try:
            if self._stop - self._start < _STATUS:
                self._more()
        except (WireError, OSError):
            return True
        return _GOES_ON.match(self._buffer, self._start, self._stop) is None

    def is_ours(self) -> bool:
        """Whether this process made it, not one that it is a fork of."""
        return self._process == os.getpid()

    def send_first(self, data: bytes) -> None:
        """Send the start of a request.

        Raises:
            Unsent: The connection was closed before.
            OSError: It broke.
        """
        self._check_ours()
        try:
            sent = self._socket.send(data)
        except ConnectionError as error:
            raise Unsent(error.strerror or "") from error
        if sent < len(data):
            self._socket.sendall(memoryview(data)[sent:])

    def send(self, data: bytes | bytearray | memoryview) -> None:
        self._check_ours()
        self._socket.sendall(data)

    def send_file(self, file: BinaryIO, offset: int, count: int) -> int:
        """Send bytes of a file without reading them here; returns how many there were. Only where `is_plain`."""
        self._check_ours()
        return self._socket.sendfile(file, offset, count)

    def read_head(self) -> Head:
        """The next answer's head, interim ones left out.

        Raises:
            WireError: It is none.
            OSError: The connection broke, or was silent for too long.
        """
        for _ in range(_MAX_INTERIM):
            head = self._parse_head(self._find_head())
            if head.status >= 200:
                self.is_fresh = False
                return head
            if head.status == 101:
                break
        raise WireError("only interim answers came")

    def read_some(self, limit: int) -> bytes:
        """What has arrived, or arrives next, at most `limit` bytes; never empty."""
        have = self._stop - self._start
        if not have:
            self._check_ours()
            data = self._socket.recv(limit)
            if not data:
                raise ConnectionEnded
            return data
        start = self._start
        self._start = stop = start + min(have, limit)
        return self._view[start:stop].tobytes()

    def read_into(self, view: memoryview) -> int:
        """Put what has arrived, or arrives next, at the front of a buffer that is not empty; returns how much."""
        size, have = len(view), self._stop - self._start
        if not have:
            if size >= DIRECT:
                self._check_ours()
                count = self._socket.recv_into(view)
                if not count:
                    raise ConnectionEnded
                return count
            self._start = self._stop = 0
            have = self._receive()
        start = self._start
        count = min(have, size)
        self._start = stop = start + count
        view[:count] = self._view[start:stop]
        return count

    def read_line(self) -> bytes:
        """The next line, without its end, which is CR LF and nothing else."""
        searched = self._start
        while (end := self._buffer.find(b"\n", searched, self._stop)) < 0:
            searched = self._more()
        line = bytes(self._view[self._start : end])
        self._start = end + 1
        if not line.endswith(b"\r") or b"\r" in line[:-1]:
            raise WireError(f"the line {line[:80]!r} does not end with CR LF")
        return line[:-1]

    def read_exactly(self, expected: bytes) -> None:
        """Pass over bytes that must come next."""
        while self._stop - self._start < len(expected):
            self._more()
        found = bytes(self._view[self._start : self._start + len(expected)])
        if found != expected:
            raise WireError(f"{found!r} where {expected!r} belongs")
        self._start += len(expected)

    def _find_head(self) -> int:
        """Where the next head's empty line begins."""
        searched = self._start
        while (end := self._buffer.find(b"\r\n\r\n", searched, self._stop)) < 0:
            searched = max(self._more() - 3, self._start)
        return end

    def _parse_head(self, end: int) -> Head:
        match = _HEAD.fullmatch(self._buffer, self._start, end + 2)
        if match is None:
            raise WireError(f"no HTTP/1.1 answer: {bytes(self._view[self._start : min(end, self._start + 80)])!r}")
        minor, status, reason, lines = match.groups()
        fields: dict[str, str] = {}
        for line in lines.decode("latin-1").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if name in fields:
                if name in _SINGLE:
                    raise WireError(f"{name} was said twice")
                value = f"{fields[name]}, {value}"
            fields[name] = value
        self._start = end + 4
        connection = fields.get("connection", "").lower()
        stays = "close" not in connection and (minor == b"1" or "keep-alive" in connection)
        return Head(int(status), (reason or b"").decode("latin-1"), Fields(fields), stays)

    def _more(self) -> int:
        """Receive behind what is in the buffer; returns where that begins."""
        if self._stop == len(self._buffer):
            if not self._start:
                raise WireError(f"a head of more than {MAX_HEAD} bytes")
            have = self._stop - self._start
            self._view[:have] = bytes(self._view[self._start : self._stop])
            self._start, self._stop = 0, have
        elif self._start == self._stop:
            self._start = self._stop = 0
        before = self._stop
        self._receive()
        return before

    def _receive(self) -> int:
        self._check_ours()
        count = self._socket.recv_into(self._view[self._stop :])
        if not count:
            raise ConnectionEnded
        self._stop += count
        return count

    def _check_ours(self) -> None:
        if self._process != os.getpid():
            raise InheritedConnection("the connection belongs to the process that this one was forked from")
