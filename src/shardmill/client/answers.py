"""Answers of a node, their bodies still to be read: to their very end, or an exception."""

import io
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Protocol, Self

from shardmill.client.connection import Connection, Head, WireError
from shardmill.client.framing import Framing
from shardmill.client.uploads import BLOCK


class NodeUnreachable(ConnectionError):
    """Nothing answers at the endpoint, or nothing that is a node."""


class TruncatedBody(ConnectionError):
    """A body ended before its end, so what arrived is not the whole."""


class Pool(Protocol):
    """Where connections go that can be used again."""

    def give_back(self, connection: Connection) -> None: ...


class Answer:
    """The answer to one request, its body still to be read.

    Resources: whoever got it closes it; read to the end, its connection is used again.
    """

    __slots__ = ("_body", "_connection", "_is_closed", "_pool", "headers", "status")

    def __init__(self, connection: Connection, head: Head, body: Framing, pool: Pool | None) -> None:
        """Args:
        connection: Closed by this, or given back.
        head: Its own.
        body: What follows it.
        pool: None: the connection cannot be used again.
        """
        self.status = head.status
        self.headers: Mapping[str, str] = head.fields
        self._connection = connection
        self._body = body
        self._pool = pool
        self._is_closed = False
        if body.done:
            self.close()

    @property
    def request_id(self) -> str | None:
        return self.headers.get("shardmill-request-id")

    @property
    def size(self) -> int | None:
        """Bytes of the body, if the node said so."""
        length = self.headers.get("content-length")
        return int(length) if length is not None else None

    @property
    def left(self) -> int | None:
        """Bytes of the body that are still to be read; None: only its end will tell."""
        return self._body.left

    def read_some(self, limit: int = BLOCK) -> bytes:
        """What has arrived, at most `limit` bytes; empty at the end.

        Raises:
            TruncatedBody: The node stopped in mid-body.
        """
        if self._is_over() or limit <= 0:
            return b""
        try:
            data = self._body.read_some(limit)
        except (WireError, OSError) as error:
            raise self._cut(error) from error
        if self._body.done:
            self.close()
        return data

    def read_into(self, view: memoryview) -> int:
        """Put what has arrived at the front of the buffer; 0 at the end. Raises like `read_some`."""
        if self._is_over() or not view:
            return 0
        try:
            count = self._body.read_into(view)
        except (WireError, OSError) as error:
            raise self._cut(error) from error
        if self._body.done:
            self.close()
        return count

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes, however long that takes; fewer bytes only at the end.

        Raises:
            TruncatedBody: The node stopped in mid-body; what is in the buffer then is worth nothing.
        """
        filled = 0
        while filled < len(view) and (count := self.read_into(view[filled:])):
            filled += count
        return filled

    def read_all(self) -> bytes:
        """The rest of the body."""
        left = self._body.left
        if left is None:
            return b"".join(iter(self.read_some, b""))
        data = self.read_some(min(left, BLOCK))
        if len(data) == left:
            return data
        return gather(data, left, self.read_into)

    def read_lines(self) -> Iterator[bytes]:
        """Lines without their ends, as they arrive."""
        rest = b""
        while data := self.read_some():
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._body.done and self._pool is not None:
                self._pool.give_back(self._connection)
            else:
                self._connection.close()

    def interrupt(self) -> None:
        """Make whoever reads this body in another thread find it cut."""
        if not self._is_closed:
            self._connection.interrupt()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_over(self) -> bool:
        if self._is_closed and not self._body.done:
            raise ValueError("read of a closed answer")
        return self._body.done

    def _cut(self, error: Exception) -> TruncatedBody:
        self.close()
        missing = "" if self._body.left is None else f", {self._body.left} bytes before its end"
        if isinstance(error, TimeoutError):
            reason = "the node was silent for too long"
        elif isinstance(error, WireError) and str(error):
            reason = str(error)
        else:
            reason = "the connection was closed"
        return TruncatedBody(f"the body was cut{missing}: {reason}")


def gather(first: bytes, size: int, read_into: Callable[[memoryview], int]) -> bytes:
    """Bytes of a known number, of which some are here; received into the memory that is handed out.

    Returns:
        Fewer than `size` if what is read ends before.
    """
    # A bytearray would have to be copied to become bytes; this hands its own memory out.
    whole = io.BytesIO(first)
    whole.seek(size - 1)
    whole.write(b"\0")
    filled = len(first)
    with whole.getbuffer() as view:
        while filled < size and (count := read_into(view[filled : filled + BLOCK])):
            filled += count
    if filled < size:
        whole.truncate(filled)
    return whole.getvalue()
