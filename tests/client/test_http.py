"""The client against nodes that misbehave: scripted sockets that answer byte by byte what a test wants."""

import os
import socket
from collections.abc import Iterator

import pytest

from shardmill.client import Client, NodeUnreachable, TruncatedBody
from shardmill.core.errors import Busy, Conflict, ObjectNotFound, ServerError, TransformFailed
from tests.client.scripted import OK, Build, answer, chunked

UUID = "broken@0123456789ab"


def test_two_reads_share_one_connection(scripted: Build) -> None:
    node, client = scripted(OK, OK)
    assert client.object("ais://bkt/a").read() == b"hello"
    assert client.object("ais://bkt/a").read() == b"hello"
    assert node.connections == 1


def test_a_connection_that_the_node_closed_in_between_is_replaced(scripted: Build) -> None:
    node, client = scripted(b"!" + OK, OK)
    assert client.object("ais://bkt/a").read() == b"hello"
    assert client.object("ais://bkt/a").read() == b"hello"
    assert node.connections == 2


def test_an_abandoned_body_does_not_come_back_in_the_next_answer(scripted: Build) -> None:
    node, client = scripted(answer("200 OK", b"x" * 3_000_000), OK)
    with client.object("ais://bkt/a").get() as reader:
        assert reader.read(10) == b"x" * 10
    assert client.object("ais://bkt/a").read() == b"hello"
    assert node.connections == 2


def test_a_short_body_without_an_etag_raises(scripted: Build) -> None:
    _, client = scripted(b"!HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello")
    with pytest.raises(TruncatedBody, match="45 bytes before its end"):
        client.object("ais://bkt/a").read()


def test_a_body_without_length_or_chunks_is_refused(scripted: Build) -> None:
    _, client = scripted(b"!HTTP/1.1 200 OK\r\n\r\nhello")
    with pytest.raises(TruncatedBody, match="neither"):
        client.object("ais://bkt/a").read()


def test_a_plain_object_that_is_cut_is_continued_by_range_of_the_same_etag(scripted: Build) -> None:
    node, client = scripted(
        b'!HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: "v1"\r\n\r\n0123',
        answer("206 Partial Content", b"456789", "Content-Range: bytes 4-9/10", 'ETag: "v1"'),
    )
    assert client.object("ais://bkt/a").read() == b"0123456789"
    assert b"Range: bytes=4-\r\n" in node.requests[1]
    assert b'If-Range: "v1"\r\n' in node.requests[1]


def test_an_object_that_changed_while_it_was_cut_is_not_glued_together(scripted: Build) -> None:
    _, client = scripted(
        b'!HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: "v1"\r\n\r\n0123',
        answer("200 OK", b"other bytes", 'ETag: "v2"'),
    )
    with pytest.raises(Conflict, match="changed while it was being read"):
        client.object("ais://bkt/a").read()


def test_a_transform_cut_in_mid_stream_raises_with_sample_and_traceback(scripted: Build) -> None:
    failure = (
        b'{"failures":[{"time":1,"request":"r1","transform":"broken@0123456789ab","bucket":"ais://bkt","object":"a.tar",'
        b'"version":"v","sample":"0007","ordinal":7,"message":"ValueError: bad","traceback":"Traceback: line 3"}],"total":1}'
    )
    node, client = scripted(b"!" + chunked(b"some", end=b""), answer("200 OK", failure))
    with client.object("ais://bkt/a.tar").get(UUID) as reader:
        assert reader.read1() == b"some"
        with pytest.raises(TransformFailed, match="sample '0007'") as caught:
            reader.read()
    assert caught.value.traceback == "Traceback: line 3"
    assert caught.value.request_id == "r1"
    assert node.requests[1].startswith(b"GET /api/transforms/errors?request=r1 ")


def test_a_transform_cut_by_a_dead_node_is_never_a_clean_end(scripted: Build) -> None:
    node, client = scripted(b"!" + chunked(b"some", end=b"5\r\nha"))
    with client.object("ais://bkt/a.tar").get(UUID) as reader:
        assert reader.read1() == b"some"
        node.close()
        with pytest.raises(TruncatedBody, match="stopped while it was sending"):
            while reader.read1():
                pass


def test_chunks_arrive_as_they_are_sent_and_end_cleanly(scripted: Build) -> None:
    _, client = scripted(chunked(b"one", b"two"), OK)
    with client.object("ais://bkt/a.tar").get(UUID) as reader:
        assert b"".join(reader) == b"onetwo"
        assert reader.meta.size == -1
    assert client.object("ais://bkt/a").read() == b"hello"


def test_a_busy_node_is_asked_again_and_then_obeyed(scripted: Build) -> None:
    busy = answer("503 Service Unavailable", b'{"code":"busy","message":"later","request_id":"r"}', "Retry-After: 0")
    node, client = scripted(busy, OK)
    assert client.object("ais://bkt/a").read() == b"hello"
    assert len(node.requests) == 2


def test_a_put_is_never_sent_twice(scripted: Build) -> None:
    busy = answer("503 Service Unavailable", b'{"code":"busy","message":"later","request_id":"r"}')
    node, client = scripted(busy, OK)
    with pytest.raises(Busy, match="later"):
        client.object("ais://bkt/a").put(b"data")
    assert len(node.requests) == 1


def test_errors_are_raised_by_their_code_with_the_request(scripted: Build) -> None:
    body = b'{"code":"object_not_found","message":"no such object","request_id":"r9"}'
    _, client = scripted(answer("404 Not Found", body), answer("500 Internal Server Error", b"<html>"))
    with pytest.raises(ObjectNotFound, match="no such object") as caught:
        client.object("ais://bkt/a").read()
    assert caught.value.request_id == "r9"
    with pytest.raises(ServerError, match="500 Internal Server Error"):
        client.object("ais://bkt/a").read()


def test_an_answer_before_the_end_of_an_upload_is_the_reason(scripted: Build) -> None:
    body = b'{"code":"bucket_read_only","message":"read-only","request_id":"r"}'
    _, client = scripted(b"!" + answer("403 Forbidden", body))
    with pytest.raises((PermissionError, NodeUnreachable)):
        client.object("ais://bkt/a").put(b"x" * 50_000_000)


def test_an_upload_whose_source_fails_raises_that_and_is_not_completed(scripted: Build) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"abc"
        raise RuntimeError("the disk is gone")

    node, client = scripted(OK, OK)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        client.object("ais://bkt/a").put(pieces())
    assert all(b"0\r\n\r\n" not in request for request in node.requests)


def test_nobody_listening_says_how_to_start_a_node() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    with pytest.raises(NodeUnreachable, match=f"no node at http://127.0.0.1:{port}; start one with: shardmill serve"):
        client.buckets()


def test_a_forked_child_uses_connections_of_its_own(scripted: Build) -> None:
    node, client = scripted(OK, OK, OK)
    assert client.object("ais://bkt/a").read() == b"hello"
    child = os.fork()
    if child == 0:
        os._exit(0 if not client._transport._idle_connection() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.object("ais://bkt/a").read() == b"hello"
    assert node.connections == 1
