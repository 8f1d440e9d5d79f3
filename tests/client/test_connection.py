"""Answers that arrive in any pieces and are read in any pieces give the same bytes, and the next answer behind them."""

import itertools
import socket
import threading
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.client.connection import MAX_HEAD, Connection, WireError
from shardmill.client.framing import framing_of


class Trickling(socket.socket):
    """Gives what has arrived in pieces of given sizes, over and over."""

    sizes: Iterator[int]

    def recv(self, limit: int, flags: int = 0, /) -> bytes:
        return super().recv(min(limit, next(self.sizes)), flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return super().recv_into(buffer, min(nbytes or len(buffer), next(self.sizes)), flags)


def pattern(size: int) -> bytes:
    """Bytes that look like framing wherever they are cut."""
    return (b"\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" * (size // 40 + 1))[:size]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    pieces, position = [], 0
    for size in itertools.cycle(sizes):
        piece = body[position : position + size]
        if not piece:
            break
        pieces.append(b"%X;x=y\r\n%b\r\n" % (len(piece), piece))
        position += size
    return b"".join(pieces) + b"000\r\nTrailer: x\r\nOther: y\r\n\r\n"


sizes = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 70_000), st.just(1 << 20)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.integers(0, 100), st.integers(0, 200_000)),
    chunks=st.none() | sizes,
    arriving=sizes,
    reading=sizes,
    into=st.booleans(),
    field=st.integers(0, 60_000),
)
def test_pieces_do_not_matter(
    size: int, chunks: list[int] | None, arriving: list[int], reading: list[int], into: bool, field: int
) -> None:
    body = pattern(size)
    if sum(arriving) < 40 * len(arriving) or (chunks and sum(chunks) < 40 * len(chunks)):
        body, field = body[:2000], field % 2000
    long = b"X: " + b"x" * field + b"\r\n"
    if chunks is None:
        first = b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (long, len(body), body)
    else:
        first = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n%b" % (long, chunked(body, chunks))
    second = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"
    here, there = socket.socketpair()
    sender = threading.Thread(target=there.sendall, args=(first + second,), daemon=True)
    sender.start()
    with here, there, Trickling(fileno=here.detach()) as trickling:
        trickling.sizes = itertools.cycle(arriving)
        connection = Connection(trickling, is_plain=True)
        head = connection.read_head()
        assert (head.status, head.fields["x"]) == (200, "x" * field)
        framing = framing_of(connection, head, "GET")
        assert framing is not None
        received = bytearray()
        for limit in itertools.cycle(reading):
            if into:
                buffer = bytearray(limit)
                data = bytes(buffer[: framing.read_into(memoryview(buffer))])
            else:
                data = framing.read_some(limit)
            assert len(data) <= limit
            if not data:
                break
            received += data
        assert received == body
        assert framing.done
        following = connection.read_head()
        rest = framing_of(connection, following, "GET")
        assert rest is not None
        assert (following.status, b"".join(iter(lambda: rest.read_some(9), b""))) == (404, b"gone")
        sender.join()


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]),
    rest=st.binary(max_size=200)
    | st.lists(st.sampled_from([b"\r\n", b"\n", b"a:", b" ", b"5", b"0", b"\0", b"x"])).map(b"".join),
)
def test_whatever_arrives_is_an_answer_or_an_error(start: bytes, rest: bytes) -> None:
    here, there = socket.socketpair()
    with here:
        there.sendall(start + rest)
        there.close()
        connection = Connection(here, is_plain=True)
        try:
            head = connection.read_head()
            framing = framing_of(connection, head, "GET")
            while framing is not None and (data := framing.read_some(MAX_HEAD)):
                assert data in rest
        except WireError:
            pass
