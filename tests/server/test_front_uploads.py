"""PUT at the front as aiohttp does it: the same bytes to two nodes, one of which has no front; and what is its own."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardmill.testing.node import RunningNode, running_node
from tests.server.test_front import Pair, comparable
from tests.server.wire import Answer, Peer, Wire, request

SIZES = (0, 1, 5000, 65_536, 65_537, 300_000)
LIMIT = 400_000  # bytes of an object


@contextlib.contextmanager
def node_of(base: Path, name: str, front: str) -> Iterator[RunningNode]:
    files = base / f"files-{name}"
    files.mkdir()
    buckets = [f"gs://files=dir:{files}", f"gs://writable=dir-rw:{files}", "ais://pool"]
    flags = [flag for bucket in buckets for flag in ("--bucket", bucket)]
    environ = {"SHARDMILL_SERVER_FRONT": front, "SHARDMILL_STORAGE_MAX_OBJECT": str(LIMIT)}
    with running_node(
        *flags, "--workers", "2", "--durability", "kill", "--host", "cache.example", data=base / name, environ=environ
    ) as node:
        yield node


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("pair")
    with node_of(base, "one", "on") as first, node_of(base, "two", "off") as second:
        yield Pair(Wire(first, ()), Wire(second, ()), "")


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


KEYS = [f"/o/ais/pool/{key}" for key in ("a", "b", "%61", "c%20d", "zw%C3%B6lf")]
PATHS = st.sampled_from(
    KEYS * 3
    + ["/o/gs/files/a", "/o/gs/writable/a", "/o/ais/nobucket/a", "/o/ais/pool/", "/o/ais/pool/%00", "/o/ais/pool/%ff"]
    + [
        "/o/ais/pool/" + "k" * 1100,
        "/o/aws/pool/a",
        "/o/ais/pool/a?x=1",
        "/o/ais/pool/a#x",
        "/o/ais/pool/a b",
        "/healthz",
    ]
    + ["http://localhost/o/ais/pool/a", "//o/ais/pool/a"]
)
HOSTS = st.sampled_from(["localhost"] * 12 + ["127.0.0.1:1", "cache.example", "evil.example", "a b", "localhost:99999"])
ETAGS = st.sampled_from(["*", '"x"', 'W/"x"', "THEIRS", "W/THEIRS", '"x", THEIRS', "x"])
DATES = st.sampled_from(["Tue, 14 Nov 2023 22:13:20 GMT", "Fri, 01 Jan 2100 00:00:00 GMT", "never"])
PLAIN = st.sampled_from(
    """Accept: */*|User-Agent: wds|Content-Type: image/jpeg|X-Odd: 1|Connection: keep-alive|Connection: close|TE: trailers
Expect: 100-continue|Expect: more|Origin: http://evil.example|Origin: http://localhost:3000|Origin: null
Content-MD5: AAAA|Content-Range: bytes 0-1/2|Content-Encoding: gzip|Authorization: Bearer x|Range: bytes=1-2
Shardmill-Meta-Of: cat|shardmill-meta-of: dog|Shardmill-Meta-: x|Shardmill-Meta-Latin: \xe4|Shardmill-Meta-Long: LONG
Shardmill-Checksum: RIGHT|Shardmill-Checksum: WRONG|Shardmill-Checksum: md5:00|Content-Length: 5|Host: localhost
 X-Space: 1|X-Colon : 1|Shardmill-Meta-Empty:""".replace("\n", "|")
    .replace("LONG", "a" * 2040)
    .split("|")
)


@st.composite
def uploads(draw: st.DrawFn) -> tuple[str, bytes, bytes, list[int]]:
    """A path, the head of a request for it, a body, and where what is sent is cut."""
    path, size = draw(PATHS), draw(st.sampled_from(SIZES))
    body = content(size)
    lines = []
    if draw(st.integers(0, 15)):
        lines.append(f"Host: {draw(HOSTS)}")
    length = draw(st.sampled_from(["plain"] * 10 + ["chunked", "none", "odd"]))
    if length == "plain":
        lines.append(f"Content-Length: {size}")
    elif length == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if size else b"0\r\n\r\n"
    elif length == "odd":
        lines.append(f"Content-Length: {draw(st.sampled_from(['+5', '5, 5', '-1', '0x5', '5.0', '05']))}")
        body = content(5)
    else:
        body = b""
    for name in ("If-None-Match", "If-Match"):
        if not draw(st.integers(0, 3)):
            lines.append(f"{name}: {draw(ETAGS)}")
    if not draw(st.integers(0, 5)):
        lines.append(f"If-Unmodified-Since: {draw(DATES)}")
    lines += draw(st.lists(PLAIN, max_size=3))
    head = "\r\n".join([f"PUT {path} HTTP/1.1", *draw(st.permutations(lines)), "", ""])
    right = f"xxh3:{xxhash.xxh3_128_hexdigest(content(size))}"
    head = head.replace("RIGHT", right).replace("WRONG", f"xxh3:{'0' * 32}")
    cuts = draw(st.lists(st.integers(0, len(head) + len(body)), max_size=2))
    return path, head.encode("latin-1"), body, sorted(cuts)


Told = list[tuple[int, list[tuple[str, str]], bytes] | str]


def tell(wire: Wire, data: bytes, cuts: list[int]) -> Told:
    """All answers to what is sent in pieces, and to a request behind it, until the connection ends."""
    found: Told = []
    with wire.connect() as peer:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
                peer.send(data[start:stop])
        try:
            found.append(final(peer))
            if found[-1] != "closed":
                peer.send(request("GET", "/healthz"))
                found.append(without_time(peer.read()))
        except (EOFError, ConnectionError):
            found.append("closed")
    return found


def final(peer: Peer) -> tuple[int, list[tuple[str, str]], bytes]:
    """The answer behind an invitation to send."""
    answer = peer.read()
    while answer.status < 200:
        answer = peer.read()
    return without_time(answer)


def without_time(answer: Answer) -> tuple[int, list[tuple[str, str]], bytes]:
    status, headers, body = comparable(answer)
    # The tag of a file in a directory is made of its time; the checksum of all is compared.
    return (
        status,
        [(name, value if name not in ("last-modified", "etag") else str(len(value))) for name, value in headers],
        body,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=uploads())
@example(
    drawn=(
        "/o/ais/pool/a",
        b"PUT /o/ais/pool/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n",
        content(1),
        [],
    )
)
@example(
    drawn=(
        "/o/ais/pool/a",
        b"PUT /o/ais/pool/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\nExpect: 100-continue\r\n\r\n",
        content(300_000),
        [200_000],
    )
)
def test_with_and_without_the_front_what_is_put_has_the_same_answer(
    pair: Pair, drawn: tuple[str, bytes, bytes, list[int]]
) -> None:
    path, head, body, cuts = drawn
    told = []
    for wire in pair.wires:
        etag = wire.get(path).headers.get("etag", '"none"') if b"THEIRS" in head else ""
        told.append(tell(wire, head.replace(b"THEIRS", etag.encode()) + body, cuts))
    assert told[0] == told[1], head
    if path in KEYS:
        stored = [wire.get(path) for wire in pair.wires]
        assert [without_time(answer) for answer in stored[:1]] == [without_time(answer) for answer in stored[1:]]


def put_of(path: str, body: bytes) -> bytes:
    return f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at", [0, 20, 5000, 70_000])
def test_what_follows_an_upload_at_once_is_answered_behind_it(pair: Pair, size: int, at: int) -> None:
    path, body = "/o/ais/pool/followed", content(size)
    data = put_of(path, body) + request("GET", path) + request("DELETE", path) + request("GET", path)
    with pair.front.connect() as peer:
        peer.send(data[:at])
        peer.send(data[at:])
        assert peer.read().status == 201
        assert peer.read().body == body
        assert [peer.read().status, peer.read().status] == [204, 404]


def test_uploads_of_one_key_at_once_leave_one_of_them(pair: Pair) -> None:
    path = "/o/ais/pool/contested"
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(pair.front.connect()) for _ in range(8)]
        for size, peer in enumerate(peers, 1):
            peer.send(put_of(path, content(size)))
        assert sorted(peer.read().status for peer in peers) == [200] * 7 + [201]
    assert pair.front.get(path).body in [content(size) for size in range(1, 9)]


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_peer_that_leaves_amid_its_upload_leaves_what_was_there(pair: Pair, size: int) -> None:
    path = "/o/ais/pool/left"
    pair.front.put(path, b"old")
    for how in ("ends", "resets"):
        with pair.front.connect() as peer:
            peer.send(put_of(path, content(size))[:-1])
            if how == "ends":
                peer.socket.shutdown(socket.SHUT_WR)
                peer.wait_closed()
            else:
                peer.reset()
    assert pair.front.get(path).body == b"old"
    assert pair.front.put(path, b"new").status == 200


def test_an_upload_whose_sender_has_ended_is_answered(pair: Pair) -> None:
    for size in SIZES:
        with pair.front.connect() as peer:
            peer.send(put_of("/o/ais/pool/ended", content(size)))
            peer.socket.shutdown(socket.SHUT_WR)
            assert peer.read().status in (200, 201)
            peer.wait_closed()
