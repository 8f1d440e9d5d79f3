"""Answers that are cut, malformed, endless or of another version: the bytes, or an exception, never fewer bytes."""

import time
from collections.abc import Callable

import pytest

from shardmill.client import Client, NodeUnreachable, TruncatedBody, http
from shardmill.client.connection import MAX_HEAD
from shardmill.core.errors import Busy, Conflict, ServerError
from tests.client.scripted import OK, Build, ObjectNode, answer, chunked

URI = "ais://bkt/a"
BODY = bytes(range(40))

Serving = Callable[..., tuple[ObjectNode, Client]]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REFUSED_WAITS", (0.0, 0.0))
    monkeypatch.setattr(http, "BUSY_WAITS", (0.0, 0.0, 0.0))


def cut_next(node: ObjectNode, position: int, instead: bytes | None = None) -> None:
    """The next answer ends at a byte."""
    following = len(node.requests)

    def spoil(number: int, right: bytes) -> bytes:
        return (instead or right)[:position] if number == following else right

    node.spoil = spoil


@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_answer_cut_at_any_byte_still_gives_every_byte(serving: Serving, is_chunked: bool) -> None:
    node, client = serving(BODY, is_chunked=is_chunked)
    whole = len(node._answer(b"GET / HTTP/1.1\r\n\r\n"))
    # What a chunked answer lacks behind its last byte cannot be asked for.
    for position in range(whole - (len(b"\r\n0\r\nT: x\r\n\r\n") if is_chunked else 0)):
        cut_next(node, position)
        assert client.object(URI).read() == BODY
        with client.object(URI).get() as reader:
            assert reader.read(3) + reader.read() == BODY
    assert any(b"If-Range" in request for request in node.requests)


def test_an_answer_without_an_etag_cut_at_any_byte_raises_or_is_asked_for_again(serving: Serving) -> None:
    node, client = serving(BODY)
    right = answer("200 OK", BODY)
    body = len(right) - len(BODY)
    for position in range(len(right)):
        cut_next(node, position, right)
        if position < body:
            assert client.object(URI).read() == BODY
            continue
        with pytest.raises(TruncatedBody, match=f"{len(right) - position} bytes before its end"):
            client.object(URI).read()


def test_every_answer_that_is_cut_brings_bytes_and_a_node_that_sends_none_is_given_up(serving: Serving) -> None:
    node, client = serving(BODY)
    head = len(node._answer(b"GET / HTTP/1.1\r\nRange: bytes=20-\r\n\r\n")) - 20
    node.spoil = lambda _, right: right[: head + 5]
    assert client.object(URI).read() == BODY
    node.spoil = lambda number, right: right[: right.index(b"\r\n\r\n") + 4]
    with pytest.raises(TruncatedBody, match="40 bytes before its end"):
        client.object(URI).read()


@pytest.mark.parametrize(
    "lines",
    [
        b"zz\r\n", b"-5\r\nhello\r\n", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b" 5\r\nhello\r\n", b"5 5\r\nhello\r\n",
        b"\r\nhello\r\n", b"5\nhello\n", b"5\r\nhelloworld\r\n", b"5\r\nhello0\r\n\r\n", b"1" * 16 + b"\r\n",
        b"5;a\x00\r\nhello\r\n", b"5_0\r\nhello\r\n", b"5" + b" " * MAX_HEAD, b"5\r\nhello\r\n0\r\n" + b"t: x\r\n" * 20000,
    ],
)  # fmt: skip
def test_chunks_that_are_none_are_refused(scripted: Build, lines: bytes) -> None:
    _, client = scripted(b"!" + chunked(end=lines + b"0\r\n\r\n"), OK)
    with client.object(URI).get() as reader, pytest.raises(TruncatedBody):
        reader.read()


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/2.0 200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK", "HTTP/1.1  200 OK", "ICY 200 OK", "HTTP/1.1 200\tOK",
        "HTTP/1.1 200 OK\r\nA : x", "HTTP/1.1 200 OK\r\n folded: x", "HTTP/1.1 200 OK\r\nA: x\r\n folded",
        "HTTP/1.1 200 OK\r\nno colon", "HTTP/1.1 200 OK\r\nA: x\0y", "HTTP/1.1 200 OK\r\nA: x\ny: z", "HTTP/1.1 200 OK\r\n: x",
        "HTTP/1.1 200 OK\r\nContent-Length: 5", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked", "HTTP/1.1 101 Switching Protocols",
    ],
)  # fmt: skip
def test_heads_that_are_none_are_refused(scripted: Build, head: str) -> None:
    spoilt = b"!" + head.encode("latin-1") + b"\r\nContent-Length: 5\r\n\r\nhello"
    node, client = scripted(spoilt, OK)
    with pytest.raises(NodeUnreachable, match="is no node: "):
        client.object(URI).read()
    assert len(node.requests) == 1


@pytest.mark.parametrize("length", ["-5", "+5", "5, 5", "5.0", "0x5", "", "٥", "5" * 30])
def test_lengths_that_are_none_are_refused(scripted: Build, length: str) -> None:
    _, client = scripted(b"!HTTP/1.1 200 OK\r\nContent-Length: " + length.encode() + b"\r\n\r\nhello", OK)
    with pytest.raises(NodeUnreachable, match="is no length"):
        client.object(URI).read()


def test_a_head_has_a_limit_and_a_large_one_below_it_is_read(scripted: Build) -> None:
    long = "A: " + "x" * (MAX_HEAD - 200)
    _, client = scripted(answer("200 OK", b"hello", long), b"!HTTP/1.1 200 OK\r\n" + b"A: x\r\n" * MAX_HEAD, OK)
    assert client.object(URI).read() == b"hello"
    with pytest.raises(NodeUnreachable, match="a head of more than 65536 bytes"):
        client.object(URI).read()


def test_more_bytes_than_were_announced_are_not_taken_for_the_next_answer(scripted: Build) -> None:
    node, client = scripted(OK + answer("200 OK", b"smuggled"), OK, OK)
    for _ in range(3):
        assert client.object(URI).read() == b"hello"
    assert node.connections == 2


def test_interim_answers_are_passed_over_but_not_without_end(scripted: Build) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    _, client = scripted(early + OK, b"!" + early * 50, OK)
    assert client.object(URI).read() == b"hello"
    with pytest.raises(NodeUnreachable, match="only interim answers"):
        client.object(URI).read()


def test_what_is_no_success_is_never_taken_for_one(scripted: Build) -> None:
    _, client = scripted(
        answer("302 Found", b"", "Location: http://elsewhere/login"),
        b"!HTTP/1.1 502 Bad Gateway\r\n\r\n<html>",
        answer("304 Not Modified"),
    )
    with pytest.raises(ServerError, match="302 Found; it is at http://elsewhere/login"):
        client.object(URI).put(b"data")
    with pytest.raises(ConnectionError, match="502 Bad Gateway"):
        client.object(URI).read()
    with pytest.raises(ServerError, match="304"):
        client.object(URI).read()


def resumed(*lines: str, status: str = "206 Partial Content", body: bytes = BODY[10:]) -> Callable[[int, bytes], bytes]:
    """Cuts the first answer after ten bytes of the body, and gives this to whoever wants the rest."""

    def spoil(number: int, right: bytes) -> bytes:
        if number == 0:
            return right[: right.index(b"\r\n\r\n") + 14]
        return answer(status, body, *lines).ljust(len(right))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (resumed('ETag: "v2"', "Content-Range: bytes 10-39/40"), Conflict),
        (resumed("Content-Range: bytes 10-39/40"), Conflict),
        (resumed('ETag: W/"v1"', "Content-Range: bytes 10-39/40"), Conflict),
        (resumed('ETag: "v2"', status="200 OK", body=BODY), Conflict),
        (resumed('ETag: "v1"', status="200 OK", body=BODY), TruncatedBody),
        (resumed('ETag: "v1"', "Content-Range: bytes 11-39/40"), TruncatedBody),
        (resumed('ETag: "v1"', "Content-Range: bytes 10-38/40", body=BODY[10:39]), TruncatedBody),
        (resumed('ETag: "v1"', "Content-Range: bytes 10-39/40", body=BODY[10:39]), TruncatedBody),
        (resumed('ETag: "v1"'), TruncatedBody),
    ],
)
def test_a_rest_that_is_not_the_rest_of_this_version_is_not_glued_on(
    serving: Serving, spoil: Callable[[int, bytes], bytes], error: type[Exception]
) -> None:
    node, client = serving(BODY)
    node.spoil = spoil
    with pytest.raises(error):
        client.object(URI).read()


@pytest.mark.parametrize(
    "told", [answer("200 OK", BODY), answer("206 Partial Content", BODY[3:8], "Content-Range: bytes 3-7/40"), OK]
)
def test_a_range_that_is_answered_with_other_bytes_raises(scripted: Build, told: bytes) -> None:
    _, client = scripted(told)
    with pytest.raises(TruncatedBody, match="the node answered bytes=2-6"):
        client.object(URI).get_range(2, 7)


def test_a_range_that_is_cut_goes_on_within_its_end(serving: Serving) -> None:
    node, client = serving(BODY)
    node.spoil = lambda number, right: right[:-3] if number == 0 else right
    assert client.object(URI).get_range(2, 20) == BODY[2:20]
    assert b"Range: bytes=17-19\r\n" in node.requests[1]
    assert client.object(URI).get_range(30, 90) == BODY[30:]


BUSY = b'{"code":"busy","message":"later","request_id":"r"}'


def test_a_busy_node_is_asked_a_bounded_number_of_times(scripted: Build) -> None:
    busy = answer("503 Service Unavailable", BUSY, "Retry-After: 0")
    node, client = scripted(*[busy] * 10)
    with pytest.raises(Busy, match="later"):
        client.object(URI).read()
    assert len(node.requests) == 4


def test_retry_after_is_kept_to(scripted: Build) -> None:
    node, client = scripted(
        answer("503 Service Unavailable", BUSY, "Retry-After: 1"),
        answer("503 Service Unavailable", b"<html>", "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT"),
        answer("503 Service Unavailable", BUSY, "Retry-After: soon"),
        OK,
        answer("503 Service Unavailable", BUSY, "Retry-After: 3600"),
    )
    began = time.monotonic()
    assert client.object(URI).read() == b"hello"
    assert time.monotonic() - began >= 1
    with pytest.raises(Busy) as caught:
        client.object(URI).read()
    assert caught.value.retry_after == 3600
    assert len(node.requests) == 5


def test_what_is_not_idempotent_is_sent_once_even_over_a_connection_that_was_just_closed(scripted: Build) -> None:
    node, client = scripted(OK, None, OK)
    assert client.object(URI).read() == b"hello"
    with pytest.raises(NodeUnreachable):
        client.object(URI).put(b"data")
    assert len(node.requests) == 2


def test_a_read_over_a_connection_that_is_closed_on_it_is_sent_again(scripted: Build) -> None:
    node, client = scripted(OK, None, None, OK)
    assert client.object(URI).read() == b"hello"
    assert client.object(URI).read() == b"hello"
    assert len(node.requests) == 4


def test_a_node_that_is_silent_in_mid_body_is_left_and_asked_for_the_rest(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.2)
    node, client = serving(BODY + bytes(100_000))
    right = answer("200 OK", node.body, 'ETag: "v1"')

    def stall(number: int, answered: bytes) -> bytes:
        # As long as the right one is, so that the connection stays open.
        return answered if number else right.replace(b"Content-Length: 100040", b"Content-Length: 100140")

    node.spoil = stall
    with client.object(URI).get() as reader:
        assert reader.read(50) == node.body[:50]
        node.body += bytes(100)
        assert reader.read() == node.body[50:]


def test_a_node_that_never_answers_is_unreachable(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.2)
    node, client = serving(BODY)
    node.spoil = lambda *_: None
    with pytest.raises(NodeUnreachable, match="does not answer"):
        client.object(URI).read()
    assert len(node.requests) == 1


@pytest.mark.parametrize("name", ["a\r\nHost: x", "a b", "a:b", "ä"])
def test_names_that_would_break_a_head_out_of_its_line_are_refused(scripted: Build, name: str) -> None:
    node, client = scripted(OK)
    with pytest.raises(ValueError, match="cannot carry"):
        client.object(URI).put(b"data", meta={name: "x"})
    with pytest.raises(ValueError, match="cannot carry"):
        client.object(URI).put(b"data", meta={"fine": f"x\n{name}"})
    assert node.requests == []
