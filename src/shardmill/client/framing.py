"""Where a body ends: after its length, or with its last chunk (RFC 9112 §6 and §7)."""

import re
from typing import Protocol

from shardmill.client.connection import MAX_HEAD, Connection, Head, WireError

_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class Framing(Protocol):
    """The rest of one body."""

    @property
    def left(self) -> int | None:
        """Bytes up to its end; None: only the end itself will tell."""
        ...

    @property
    def done(self) -> bool:
        """Whether all of it was read, so that what follows on the connection is another answer."""
        ...

    def read_some(self, limit: int) -> bytes:
        """Bytes that have arrived or arrive next; none at the end."""
        ...

    def read_into(self, view: memoryview) -> int:
        """Put them at the front of a buffer that is not empty; 0 at the end."""
        ...


class Sized:
    """A body whose length was said."""

    __slots__ = ("_connection", "done", "left")

    def __init__(self, connection: Connection, size: int) -> None:
        self._connection = connection
        self.left = size
        self.done = not size

    def read_some(self, limit: int) -> bytes:
        if self.done:
            return b""
        data = self._connection.read_some(min(limit, self.left))
        self._count(len(data))
        return data

    def read_into(self, view: memoryview) -> int:
        if self.done:
            return 0
        count = self._connection.read_into(view if len(view) <= self.left else view[: self.left])
        self._count(count)
        return count

    def _count(self, count: int) -> None:
        self.left -= count
        self.done = not self.left


class Chunked:
    """A body that comes in chunks. Extensions of chunks and trailers are passed over."""

    __slots__ = ("_connection", "_in_chunk", "_is_first", "done", "left")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._in_chunk = 0
        self._is_first = True
        self.left: int | None = None
        self.done = False

    def read_some(self, limit: int) -> bytes:
        if not self._is_inside():
            return b""
        data = self._connection.read_some(min(limit, self._in_chunk))
        self._in_chunk -= len(data)
        return data

    def read_into(self, view: memoryview) -> int:
        if not self._is_inside():
            return 0
        count = self._connection.read_into(view if len(view) <= self._in_chunk else view[: self._in_chunk])
        self._in_chunk -= count
        return count

    def _is_inside(self) -> bool:
        """Whether there are bytes of a chunk to be read, the next one's if need be."""
        if self._in_chunk:
            return True
        if self.done:
            return False
        if not self._is_first:
            self._connection.read_exactly(b"\r\n")
        self._is_first = False
        line = self._connection.read_line()
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise WireError(f"{line[:80]!r} is no size of a chunk")
        self._in_chunk = int(match[1], 16)
        if not self._in_chunk:
            self._pass_trailers()
            self.done = True
        return not self.done

    def _pass_trailers(self) -> None:
        size = 0
        while line := self._connection.read_line():
            size += len(line) + 2
            if size > MAX_HEAD:
                raise WireError(f"trailers of more than {MAX_HEAD} bytes")


def framing_of(connection: Connection, head: Head, method: str) -> Framing | None:
    """How the body behind a head ends; None: it does not say.

    Raises:
        WireError: It says so in two ways, or in one that is none.
    """
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if length is not None and not _LENGTH.fullmatch(length):
        raise WireError(f"content-length {length[:80]!r} is no length")
    if method == "HEAD" or head.status in (204, 304):
        return Sized(connection, 0)
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            wrong = "is not chunked" if length is None else "beside a content-length"
            raise WireError(f"transfer-encoding {coding[:80]!r} {wrong}")
        return Chunked(connection)
    return None if length is None else Sized(connection, int(length))
