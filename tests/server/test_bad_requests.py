"""Requests that no good client sends, byte for byte: what each is answered, and that the node goes on as if nothing was.

The numbers are those of a list of bad inputs to object stores; a row that is no single request has a test of its own.
"""

import gzip
import time

import pytest

from tests.server.wire import HOST, Answer, Peer, Wire, in_chunks, request, wait_for

GET = b"GET /healthz HTTP/1.1\r\n" + HOST
PUT = b"PUT /o/ais/pool/never HTTP/1.1\r\n" + HOST
LARGE = b"g" * 100_000  # bytes of a body that is not held in memory until it is whole
HELLO = in_chunks(b"hello")

REFUSED: dict[str, bytes] = {
    "1 garbage": b"\x00\x01\x02 garbage\r\n\r\n",
    "1 words": b"hello world\r\n\r\n",
    "1 TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
    "1 HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "2 bare LF": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "2 bare LF in a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
    "2 bare CR in a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n",
    "2 folded header": GET + b"X: a\r\n b\r\n\r\n",
    "2 space before the colon": GET + b"X : a\r\n\r\n",
    "2 space before the first header": b"GET /healthz HTTP/1.1\r\n X: y\r\n" + HOST + b"\r\n",
    "2 NUL in a header": GET + b"X: a\0b\r\n\r\n",
    "2 header without a name": GET + b": y\r\n\r\n",
    "2 header without a colon": GET + b"nocolon\r\n\r\n",
    "2 tab in the request line": b"GET\t/healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    "3 length and chunks": PUT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + HELLO,
    "3 chunks and length": PUT + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + HELLO,
    "3 two lengths": PUT + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "3 one length twice": PUT + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "3 list of lengths": PUT + b"Content-Length: 5, 5\r\n\r\nhello",
    "3 length -5": PUT + b"Content-Length: -5\r\n\r\nhello",
    "3 length +5": PUT + b"Content-Length: +5\r\n\r\nhello",
    "3 length 0x5": PUT + b"Content-Length: 0x5\r\n\r\nhello",
    "3 length 5 6": PUT + b"Content-Length: 5 6\r\n\r\nhello",
    "3 empty length": PUT + b"Content-Length: \r\n\r\nhello",
    "3 length of 20 digits": PUT + b"Content-Length: 99999999999999999999\r\n\r\nhello",
    "4 xchunked": PUT + b"Transfer-Encoding: xchunked\r\n\r\n" + HELLO,
    "4 identity": PUT + b"Transfer-Encoding: identity\r\n\r\n" + HELLO,
    "4 gzip": PUT + b"Transfer-Encoding: gzip\r\n\r\n" + HELLO,
    "4 gzip, chunked": PUT + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + HELLO,
    "4 chunked, gzip": PUT + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + HELLO,
    "4 chunked twice": PUT + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + HELLO,
    "4 chunked in two headers": PUT + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + HELLO,
    "4 vertical tab before chunked": PUT + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + HELLO,
    "4 chunks in HTTP/1.0": PUT.replace(b"/1.1", b"/1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + HELLO,
    "4 chunk size zz": PUT + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "4 chunk size -5": PUT + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "4 chunk size 0x5": PUT + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "4 chunk size of 17 digits": PUT + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "4 chunk longer than its size": PUT + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    "4 chunks with bare LF": PUT + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n",
    "4 LF in a chunk extension": PUT + b"Transfer-Encoding: chunked\r\n\r\n5;a\nb\r\nhello\r\n0\r\n\r\n",
    "5 line of 9000 bytes": GET + b"X: " + b"a" * 9000 + b"\r\n\r\n",
    "5 line without an end": GET + b"X: " + b"a" * 100_000,
    "5 129 headers": GET + b"X: a\r\n" * 128 + b"\r\n",
    "5 target of 9000 bytes": b"GET /o/ais/pool/" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "6 no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "6 no Host in HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
    "6 two Hosts": GET + HOST + b"\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET /healthz HTTP/1.2\r\n" + HOST + b"\r\n",
    "target that is no path": b"GET healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    "target with raw UTF-8": "GET /o/ais/pool/é HTTP/1.1\r\n".encode() + HOST + b"\r\n",
    "target with a raw byte": b"GET /o/ais/pool/\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "target with a control character": b"GET /o/ais/pool/a\x01b HTTP/1.1\r\n" + HOST + b"\r\n",
    "method in lower case": b"get /healthz\r\n" + HOST + b"\r\n",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_http_is_400_and_the_connection_ends(wire: Wire, case: str) -> None:
    before = wire.metrics().get('shardmill_requests_total{route="other",status="400"}', 0)
    with wire.connect() as peer:
        peer.send(REFUSED[case])
        answer = peer.read()
        assert (answer.status, answer.code) == (400, "bad_request"), answer
        peer.wait_closed(drop=True)
    assert wire.get("/o/ais/pool/never").status == 404
    after = wire.metrics().get('shardmill_requests_total{route="other",status="400"}', 0)
    on_objects = wire.metrics().get('shardmill_requests_total{route="o",status="400"}', 0)
    assert after + on_objects > before
    assert wire.get("/healthz").status == 200


def test_a_refusal_does_not_repeat_what_was_sent(wire: Wire) -> None:
    """A header may hold a secret."""
    for data in (
        GET + b"Authorization: Bearer hunter2\0\r\n\r\n",
        GET + b"Authorization: Bearer hunter2 " + b"a" * 9000 + b"\r\n\r\n",
        GET + b"Authorization : Bearer hunter2\r\n\r\n",
        GET + b"Authorization: Bearer hunter2\nX: y\r\n\r\n",
        b"GET /o/ais/pool/a?sig=hunter2 HTTP/9.9\r\n\r\n",
        b"BREW /o/ais/pool/a?sig=hunter2 HTTP/1.1\r\n\r\n",
    ):
        assert b"hunter2" not in wire.tell(data).body
    assert "hunter2" not in wire.node.output


@pytest.mark.parametrize("tail", [b"zz\r\n", b"5\r\nhelloXX", b"-1\r\n", b"5;a\nb\r\n"])
def test_4_a_bad_chunk_behind_good_ones_is_400_at_once_and_stores_nothing(wire: Wire, tail: bytes) -> None:
    with wire.connect() as peer:
        peer.send(PUT + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks(LARGE, end=b""))
        wait_for(lambda: bool(wire.temporary_files()), "the upload has begun")
        peer.send(tail)
        answer = peer.read()
        assert (answer.status, answer.code) == (400, "bad_request")
        peer.wait_closed()
    wait_for(lambda: not wire.temporary_files(), "the temporary file is gone")
    assert wire.get("/o/ais/pool/never").status == 404


@pytest.mark.parametrize(
    "body",
    [in_chunks(LARGE, end=b""), in_chunks(LARGE, end=b"0\r\n"), in_chunks(LARGE, end=b"5\r\nhel")],
    ids=["no last chunk", "no end of the last chunk", "half a chunk"],
)
def test_4_chunks_without_an_end_store_nothing(wire: Wire, body: bytes) -> None:
    with wire.connect() as peer:
        peer.send(PUT + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        wait_for(lambda: bool(wire.temporary_files()), "the upload has begun")
    wait_for(lambda: not wire.temporary_files(), "the temporary file is gone")
    assert wire.get("/o/ais/pool/never").status == 404


def test_chunks_may_have_extensions_and_trailers_and_any_spelling(wire: Wire) -> None:
    for number, (coding, body) in enumerate(
        [
            ("chunked", b"5;a=b\r\nhello\r\n0\r\n\r\n"),
            ("chunked", b"5;a=" + b"b" * 20_000 + b"\r\nhello\r\n0\r\n\r\n"),
            ("Chunked", b"0005\r\nhello\r\n000\r\n\r\n"),
            ("CHUNKED", b"2\r\nhe\r\n3\r\nllo\r\n0\r\nX-Trailer: y\r\n\r\n"),
        ]
    ):
        path = f"/o/ais/pool/extended-{number}"
        head = f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: {coding}\r\n\r\n".encode()
        assert wire.tell(head + body).status == 201
        assert wire.get(path).body == b"hello"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("", 400),
        ("a b", 400),
        ("localhost/x", 400),
        ("localhost?x", 400),
        ("localhost#x", 400),
        ("someone@localhost", 400),
        ("localhost:99999", 400),
        ("localhost:port", 400),
        ("localhost:-1", 400),
        ("local\udcffhost", 400),
        ("[::1", 400),
        ("::1", 400),
        ("localhost,localhost", 400),
        ("localhost", 200),
        ("LOCALHOST:51080", 200),
        ("localhost.", 200),
        ("localhost:", 200),
        ("127.0.0.1:80", 200),
        ("127.8.9.10", 200),
        ("[::1]:51080", 200),
    ],
)
def test_6_a_malformed_host_is_400(wire: Wire, host: str, status: int) -> None:
    answer = wire.tell(b"GET /healthz HTTP/1.1\r\nHost: " + host.encode("utf-8", "surrogateescape") + b"\r\n\r\n")
    assert answer.status == status


@pytest.mark.parametrize("method", ["PATCH", "POST", "TRACE", "OPTIONS", "PROPFIND", "PURGE"])
def test_7_another_method_is_405_with_allow(wire: Wire, method: str) -> None:
    answer = wire.ask(method, "/o/ais/pool/a")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"
    for path, allowed in (
        ("/t/ais/pool/t~a", "GET, HEAD"),
        ("/api/transforms", "GET, HEAD, POST"),
        ("/api/buckets/ais/pool", "DELETE, PUT"),
        ("/healthz", "GET, HEAD"),
        ("/", "GET, HEAD"),
    ):
        if method not in allowed:
            answer = wire.ask(method, path)
            assert (answer.status, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("line", ["BREW /o/ais/pool/a", "get /healthz", "GETS /", "CONNECT localhost:80", "OPTIONS *"])
def test_7_a_method_that_nothing_here_has_is_405_with_allow(wire: Wire, line: str) -> None:
    answer = wire.tell(f"{line} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, POST, PUT"


def test_8_a_head_that_trickles_is_cut_and_holds_nobody_up(hasty: Wire) -> None:
    peers = [hasty.connect() for _ in range(500)]
    try:
        for peer in peers:
            peer.send(b"GET /healthz HTTP/1.1\r\nX: ")
        assert hasty.get("/healthz").status == 200
        wait_for(lambda: _all_ended(peers), "all that wait for heads are closed")
    finally:
        for peer in peers:
            peer.socket.close()
    assert hasty.get("/healthz").status == 200


def test_8_bytes_one_by_one_do_not_prolong_it(hasty: Wire) -> None:
    with hasty.connect() as peer:
        peer.socket.settimeout(0.05)
        sent = 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                peer.send(b"G"[:1] if not sent else b"ET"[sent - 1 : sent] or b" " if sent < 4 else b"/")
                sent += 1
                if not peer.socket.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert 3 < sent < 500, sent


def test_8_a_connection_that_says_nothing_is_cut(hasty: Wire) -> None:
    with hasty.connect() as peer:
        peer.wait_closed()


@pytest.mark.parametrize("framing", ["Content-Length: 200000", "Transfer-Encoding: chunked"])
def test_9_a_body_that_stops_is_408_and_leaves_no_file(hasty: Wire, framing: str) -> None:
    with hasty.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/slow", framing) + in_chunks(LARGE, end=b""))
        wait_for(lambda: bool(hasty.temporary_files()), "the upload has begun")
        answer = peer.read()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert answer.headers["connection"] == "close"
        peer.wait_closed(drop=True)
    assert not hasty.temporary_files()
    assert hasty.get("/o/ais/pool/slow").status == 404


@pytest.mark.parametrize("path", ["/o/ais/pool/slow", "/api/transforms"])
def test_9_a_body_that_trickles_is_408(hasty: Wire, path: str) -> None:
    """Each byte comes in time, but all of them never will."""
    with hasty.connect() as peer:
        method = "PUT" if path.startswith("/o") else "POST"
        peer.send(request(method, path, "Content-Length: 100000"))
        peer.socket.settimeout(0.1)
        answer: Answer | None = None
        for _ in range(300):
            peer.send(b"x")
            try:
                answer = peer.read()
                break
            except TimeoutError:
                continue
        assert answer is not None
        assert (answer.status, answer.code) == (408, "request_timeout")
    assert not hasty.temporary_files()


def test_11_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    body = b"of the first"
    with wire.connect() as peer:
        peer.send(
            request("PUT", "/o/ais/pool/pipelined", body=body)
            + request("GET", "/o/ais/pool/pipelined")
            + request("HEAD", "/o/ais/pool/pipelined")
            + request("GET", "/nothing/here")
            + request("GET", "/o/ais/pool/pipelined", "Range: bytes=3-5")
            + request("DELETE", "/o/ais/pool/pipelined")
            + request("GET", "/o/ais/pool/pipelined")
            + request("GET", "/healthz")
        )
        answers = [peer.read(head=number == 2) for number in range(8)]
    assert [answer.status for answer in answers] == [201, 200, 200, 404, 206, 204, 404, 200]
    assert [answers[1].body, answers[2].body, answers[4].body] == [body, b"", b"the"]
    assert len({answer.headers["shardmill-request-id"] for answer in answers}) == 8


def test_a_request_that_comes_byte_by_byte_is_answered(wire: Wire) -> None:
    with wire.connect() as peer:
        for byte in request("PUT", "/o/ais/pool/bytewise", body=b"abc"):
            peer.send(bytes([byte]))
        assert peer.read().status == 201
    assert wire.get("/o/ais/pool/bytewise").body == b"abc"


def test_the_connection_goes_on_after_an_error_that_is_no_framing(wire: Wire) -> None:
    with wire.connect() as peer:
        for path, status in (("/o/ais/pool/none", 404), ("/o/ais/none/a", 404), ("/o/x", 400), ("/healthz", 200)):
            peer.send(request("GET", path))
            assert peer.read().status == status
        peer.send(request("PUT", "/o/gs/sharded-imagenet/a", body=b"x" * 300_000))
        assert peer.read().status == 403
        peer.send(request("POST", "/api/transforms", body=b"{"))
        assert peer.read().status == 400
        peer.send(request("GET", "/healthz"))
        assert peer.read().status == 200


def test_a_body_of_get_or_delete_is_read_off_and_never_taken_for_a_request(wire: Wire) -> None:
    inner = request("PUT", "/o/ais/pool/smuggled", body=b"x")
    with wire.connect() as peer:
        peer.send(request("GET", "/healthz", body=inner))
        peer.send(request("HEAD", "/healthz", "Transfer-Encoding: chunked") + in_chunks(inner))
        peer.send(request("DELETE", "/o/ais/pool/none", body=inner))
        peer.send(request("GET", "/readyz"))
        assert peer.read().body == b"ok\n"
        assert peer.read(head=True).status == 200
        assert peer.read().status == 404
        assert peer.read().body == b"ready\n"
    assert wire.get("/o/ais/pool/smuggled").status == 404


def test_12_another_expectation_is_417(wire: Wire) -> None:
    answer = wire.ask("PUT", "/o/ais/pool/a", "Expect: 200-ok", body=b"abc")
    assert (answer.status, answer.code) == (417, "expectation_failed")


def test_12_a_refused_put_is_not_asked_for_its_body_and_ends_the_connection(wire: Wire) -> None:
    """What follows may be the body or the next request, and nobody can tell which."""
    for path, *headers in (
        ("/o/gs/sharded-imagenet/a",),
        ("/o/ais/none/a",),
        ("/o/ais/pool/a", 'If-Match: "x"'),
        ("/o/ais/pool/a", "Shardmill-Checksum: md5:1"),
        ("/o/ais/pool/a", "Content-Range: bytes 0-1/5"),
    ):
        with wire.connect() as peer:
            peer.send(request("PUT", path, "Expect: 100-continue", "Content-Length: 5", *headers))
            answer = peer.read()
            assert answer.status in (400, 403, 404, 412)
            assert answer.headers["connection"] == "close"
            peer.send(request("GET", "/healthz"))
            peer.wait_closed()


def test_12_an_accepted_put_is_asked_for_its_body_once(wire: Wire) -> None:
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/expected", "Expect: 100-Continue", "Content-Length: 5"))
        assert peer.read_head() == (100, {})
        peer.send(b"hello" + request("GET", "/o/ais/pool/expected"))
        assert peer.read().status == 201
        assert peer.read().body == b"hello"
    with wire.connect() as peer:
        peer.send(request("GET", "/healthz", "Expect: 100-continue"))
        assert peer.read().status == 200


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://evil.example/healthz", "localhost", 200),
        ("HTTPS://evil.example/healthz", "localhost", 200),
        ("http://localhost/healthz", "evil.example", 403),
        ("http://localhost", "localhost", 200),
        ("http://localhost?x=1/healthz", "localhost", 200),
        ("http://localhost/nothing", "localhost", 404),
        ("ftp://localhost/healthz", "localhost", 400),
        ("file:///healthz", "localhost", 400),
        ("//localhost/healthz", "localhost", 404),
    ],
)
def test_13_of_an_absolute_target_only_the_path_counts(wire: Wire, target: str, host: str, status: int) -> None:
    answer = wire.tell(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.status == status
    if status == 200:
        assert (answer.body == b"ok\n") == target.endswith("e/healthz")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/healthz",
        "/readyz",
        "/o/gs/sharded-imagenet/imagenet-train-000000.tar",
        "/o/gs/sharded-imagenet/none",
        "/o/none/none/none",
        "/api/buckets",
        "/api/objects?bucket=gs://sharded-imagenet",
        "/api/objects",
        "/api/transforms",
        "/api/transforms/none",
        "/api/transforms/errors",
        "/api/config",
        "/api/openapi.json",
        "/nothing/here",
    ],
)
def test_14_head_has_the_headers_of_get_and_no_body(wire: Wire, path: str) -> None:
    with wire.connect() as peer:
        peer.send(request("HEAD", path) + request("GET", path))
        head, whole = peer.read(head=True), peer.read()
    changing = {"date", "shardmill-request-id"}
    assert head.status == whole.status
    assert {name: head.headers[name] for name in head.headers if name not in changing} == {
        name: whole.headers[name] for name in whole.headers if name not in changing
    }
    assert int(head.headers["content-length"]) == len(whole.body) > 0
    assert whole.status == 200 or (
        whole.status in (400, 404) and ("none" in path or path in ("/api/objects", "/nothing/here"))
    )


@pytest.mark.parametrize("size", [0, 1000])
def test_15_clients_that_leave_at_any_point_leave_nothing(wire: Wire, size: int) -> None:
    wire.get("/healthz")
    before = len(wire.descriptors())
    put = request("PUT", "/o/ais/pool/left", "Content-Length: 3000000")
    get = request("GET", "/o/gs/sharded-imagenet/imagenet-train-000000.tar")
    for data in (b"", b"GE", get[:-2], put, put + b"x" * size, put + b"x" * 2_000_000, get, get * 5):
        for leave_at_once in (False, True):
            peer = wire.connect()
            peer.send(data)
            if not leave_at_once and data.startswith(get):
                peer.read_some()
            peer.reset() if leave_at_once else peer.socket.close()
    wait_for(lambda: len(wire.descriptors()) <= before and not wire.temporary_files(), "all is released", 5)
    assert wire.get("/o/ais/pool/left").status == 404


def test_16_the_longest_idle_of_too_many_connections_is_closed(hasty: Wire) -> None:
    """Idle ones give way to new ones, oldest first; none at work does."""
    peers = []
    try:
        with hasty.connect() as busy:
            busy.send(request("GET", "/o/gs/sharded-imagenet/imagenet-train-000000.tar"))
            assert busy.read_head()[0] == 200
            for number in range(700):
                peer = hasty.connect()
                peers.append(peer)
                peer.send(request("GET", "/healthz"))
                assert peer.read().status == 200, number
            assert len(hasty.descriptors()) < 700
            peers[0].wait_closed()
            peers[-1].send(request("GET", "/healthz"))
            assert peers[-1].read().status == 200
            assert busy.read_some()
    finally:
        for peer in peers:
            peer.socket.close()


@pytest.mark.parametrize(
    "headers",
    [
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"),
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    ],
)
def test_17_an_upgrade_is_ignored(wire: Wire, headers: tuple[str, ...]) -> None:
    with wire.connect() as peer:
        for _ in range(2):
            peer.send(request("GET", "/healthz", *headers))
            answer = peer.read()
            assert (answer.status, answer.body) == (200, b"ok\n")


def test_18_a_compressed_body_is_stored_as_it_is_and_json_refuses_it(wire: Wire) -> None:
    bomb = gzip.compress(bytes(50_000_000), 9)
    assert wire.put("/o/ais/pool/bomb", bomb, "Content-Encoding: gzip").status == 201
    answer = wire.get("/o/ais/pool/bomb", "Accept-Encoding: gzip")
    assert answer.body == bomb
    assert "content-encoding" not in answer.headers
    refused = wire.ask("POST", "/api/transforms", "Content-Encoding: gzip", body=bomb)
    assert (refused.status, refused.code) == (415, "unsupported_media_type")


BUCKETS = [
    "..", "%2e%2e", "%2E%2e", "..%2fpool", "%252e%252e", "a%5cb", "%2fetc", "c:", "C%3A", "UPPER", "po", "a" * 64, "-pool",
    "pool-", "192.168.0.1", "xn--pool", "a..b", "po%00l", "po%0al", "p%C3%B6ol", "pool%20", "", "po~l",
]  # fmt: skip


@pytest.mark.parametrize("name", BUCKETS)
def test_19_26_a_name_that_is_no_bucket_is_400_everywhere(wire: Wire, name: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = wire.ask(method, f"/o/ais/{name}/key")
        assert (answer.status, answer.code) == (400, "bad_request")
    assert wire.get(f"/t/ais/{name}/t~key").status == 400
    assert wire.ask("PUT", f"/api/buckets/ais/{name}").status == 400
    assert wire.get(f"/api/objects?bucket=ais://{name}").status == 400


KEYS = {
    "two dots": "..",
    "a way up": "../../../../etc/passwd",
    "dots within": "a/../b",
    "one dot": "a/./b",
    "backslashes": "..\\..\\windows",
    "absolute": "/etc/passwd",
    "drive": "C:/boot.ini",
    "double slash": "a//b",
    "slash at the end": "a/",
    "slashes only": "///",
    "percent": "100%",
    "percent-encoded twice": "%2e%2e%2f",
    "plus": "a+b",
    "space": "a b",
    "space at both ends": " a ",
    "hash": "a#b",
    "question": "a?b=c&d",
    "colons": "a::b:c",
    "braces": "{000000..000005}",
    "tilde": "~a~b~",
    "NFC": "caf\u00e9",
    "NFD": "cafe\u0301",
    "emoji": "🙂/🙂",
    "quotes": "\"'`<>",
    "long segment": "s" * 1000,
    "1024 bytes": "k" * 1024,
    "1024 bytes of two-byte signs": "é" * 512,
    "line separators": "a\u2028b\u0085c",
    "tmp": "tmp/x",
}


def test_20_24_25_any_key_keeps_its_spelling_and_is_no_path_on_disk(wire: Wire) -> None:
    from shardmill.core.refs import quote_key

    assert wire.ask("PUT", "/api/buckets/ais/spellings").status == 201
    for name, key in KEYS.items():
        answer = wire.put(f"/o/ais/spellings/{quote_key(key)}", name.encode())
        assert answer.status == 201, (name, answer)
    for name, key in KEYS.items():
        assert wire.get(f"/o/ais/spellings/{quote_key(key)}").body == name.encode(), name
    page = wire.get("/api/objects?bucket=ais://spellings").json()
    assert isinstance(page["objects"], list)
    assert [item["key"] for item in page["objects"]] == sorted(KEYS.values(), key=str.encode)
    files = {path.name for path in wire.node.data.rglob("*")}
    assert not files & {"passwd", "windows", "..\\..\\windows", "boot.ini"}
    for key in KEYS.values():
        assert wire.delete(f"/o/ais/spellings/{quote_key(key)}").status == 204
    assert wire.delete("/api/buckets/ais/spellings").status == 204


@pytest.mark.parametrize(
    "key",
    ["..", "../passwd", "a/../b", "a/./b", ".", "a//b", "/a", "a/", "%00", "s" * 256, "x/" + "s" * 300],
)
def test_20_24_a_directory_refuses_a_key_that_it_cannot_carry(wire: Wire, key: str) -> None:
    answer = wire.put(f"/o/ais/notes/{key}", b"x")
    assert (answer.status, answer.code) == (400, "bad_request"), answer
    assert wire.get(f"/o/ais/notes/{key}").status in (400, 404)


@pytest.mark.parametrize(
    "key",
    [
        "a%00b", "a%0ab", "a%0Db", "a%1fb", "a%7Fb", "%ff", "%c3", "a%ed%a0%80b", "%c0%ae%c0%ae", "%f4%90%80%80",
        "%zz", "%", "a%2", "%u002e", "k" * 1025, "%C3%A9" * 513,
    ],
)  # fmt: skip
def test_21_22_23_a_key_that_is_none_is_400(wire: Wire, key: str) -> None:
    for path in (f"/o/ais/pool/{key}", f"/o/ais/pool/dir/{key}", f"/o/ais/notes/{key}", f"/t/ais/pool/t~{key}"):
        answer = wire.get(path)
        assert (answer.status, answer.code) == (400, "bad_request")
    assert wire.put(f"/o/ais/pool/{key}", b"x").status == 400


def test_25_a_plus_is_a_plus_and_a_hash_is_a_hash(wire: Wire) -> None:
    for number, key in enumerate(("r+s", "r%20s", "r%23s", "r%2Bs")):
        wire.put(f"/o/ais/pool/{key}", b"%d" % number)
    assert wire.get("/o/ais/pool/r+s").body == wire.get("/o/ais/pool/r%2bs").body == b"3"
    assert wire.get("/o/ais/pool/r%20s").body == b"1"
    assert wire.get("/o/ais/pool/r%23s").body == b"2"


def test_25_an_encoded_slash_is_a_slash(wire: Wire) -> None:
    """A key is bytes; how its URL spells a slash changes nothing."""
    assert wire.put("/o/ais/pool/x%2Fy", b"1").status == 201
    assert wire.get("/o/ais/pool/x/y").body == b"1"


@pytest.mark.parametrize("provider", ["gcs", "gcp", "aws", "azure", "ht", "AIS", "file", "ais%3A", "", ".."])
def test_27_another_provider_is_400_and_an_alias_names_the_right_one(wire: Wire, provider: str) -> None:
    answer = wire.get(f"/o/{provider}/pool/a")
    assert (answer.status, answer.code) == (400, "bad_request")
    canonical = {"gcs": "gs", "gcp": "gs", "aws": "s3", "azure": "az", "ht": "http"}.get(provider)
    if canonical:
        assert f"'{canonical}'" in answer.message


@pytest.mark.parametrize("bucket", ["ais/none", "gs/none", "s3/none", "az/none", "http/none"])
def test_27_a_bucket_that_is_not_there_is_404(wire: Wire, bucket: str) -> None:
    for answer in (wire.get(f"/o/{bucket}/a"), wire.put(f"/o/{bucket}/a", b""), wire.delete(f"/o/{bucket}/a")):
        assert (answer.status, answer.code) == (404, "bucket_not_found")
    assert wire.get(f"/api/objects?bucket={bucket.replace('/', '://')}").code == "bucket_not_found"


@pytest.mark.parametrize(
    ("limit", "found"),
    [("-1", None), ("abc", None), ("1.5", None), ("+1", None), ("", None), ("%EF%BC%91", None), ("9" * 30, None),
     ("0", 0), ("2", 2), ("1000000000", 10)],
)  # fmt: skip
def test_28_a_limit_is_a_number_and_cut_to_a_page(wire: Wire, limit: str, found: int | None) -> None:
    answer = wire.get(f"/api/objects?bucket=gs://sharded-imagenet&prefix=imagenet-&limit={limit}")
    if found is None:
        assert (answer.status, answer.code) == (400, "bad_request")
    else:
        objects = answer.json()["objects"]
        assert isinstance(objects, list)
        assert len(objects) == found


def test_29_a_page_goes_on_behind_any_key_that_is_given(wire: Wire) -> None:
    """The token is a key, so there is nothing in it that could be forged."""
    listing = wire.get("/api/objects?bucket=gs://sharded-imagenet&prefix=imagenet-val&after=imagenet-val-000003.tar")
    assert [item["key"] for item in listing.json()["objects"]] == [  # type: ignore[attr-defined]
        "imagenet-val-000004.tar",
        "imagenet-val-000005.tar",
    ]
    for after in ("%ff", "%00", "zzz", "..%2f", "x" * 3000):
        answer = wire.get(f"/api/objects?bucket=ais://pool&after={after}")
        assert answer.status in (200, 400)


@pytest.mark.parametrize(
    "path",
    [
        "/o/ais/pool/a?x=1",
        "/o/ais/pool/a?versionId=1",
        "/o/ais/pool/a?",
        "/t/ais/pool/t~a?seed=1",
        "/api/buckets?x",
        "/api/objects?bucket=ais://pool&max-keys=1",
        "/api/objects?bucket=ais://pool&bucket=ais://pool",
        "/api/objects?bucket=ais://pool&prefix=%ff",
        "/api/transforms?name=x",
        "/api/transforms/errors?name=x",
        "/api/config?secrets=true",
        "/api/openapi.json?v=3",
    ],
)
def test_30_an_unknown_parameter_is_400(wire: Wire, path: str) -> None:
    answer = wire.get(path)
    if path.endswith("?"):
        assert answer.status == 404  # an empty query is none
    else:
        assert (answer.status, answer.code) == (400, "bad_request")


@pytest.mark.parametrize("have", [0, 1, 4999, 1_500_000])
def test_41_a_body_shorter_than_announced_stores_nothing(wire: Wire, have: int) -> None:
    wire.put("/o/ais/pool/short", b"old")
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/short", "Content-Length: 2000000") + b"x" * have)
        wait_for(lambda: bool(wire.temporary_files()), "the upload has begun")
    wait_for(lambda: not wire.temporary_files(), "the temporary file is gone")
    assert wire.get("/o/ais/pool/short").body == b"old"


def test_49_an_object_over_the_limit_is_413_before_it_is_read(wire: Wire) -> None:
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/huge", "Content-Length: 100000001"))
        answer = peer.read()
        assert (answer.status, answer.code) == (413, "too_large")
        assert answer.headers["connection"] == "close"
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/huge", "Transfer-Encoding: chunked"))
        piece = in_chunks(bytes(1 << 20), end=b"")
        try:
            for _ in range(110):
                peer.send(piece)
        except ConnectionError:
            pass
        else:
            assert peer.read().status == 413
    wait_for(lambda: not wire.temporary_files(), "the temporary file is gone")
    assert wire.get("/o/ais/pool/huge").status == 404


def _all_ended(peers: list[Peer]) -> bool:
    for peer in peers:
        if peer.socket.fileno() >= 0:
            peer.wait_closed(drop=True)
            peer.socket.close()
    return True
