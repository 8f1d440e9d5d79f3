"""`/o` for readers: whole objects and ranges, conditions, and the headers of each answer."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from shardmill.core.errors import CorruptObject
from tests.server.wire import Answer, Unfinished, Wire, request, wait_for

KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB - 1, MIB, MIB + 1, 70 * MIB)
TEN = b"0123456789"


def pattern(size: int) -> bytes:
    """Bytes of which no two blocks are alike."""
    return random.Random(size).randbytes(size)


@pytest.fixture(scope="session")
def ten(wire: Wire) -> str:
    """Path of an object of ten bytes."""
    assert wire.put("/o/ais/pool/ten", TEN).status in (200, 201)
    return "/o/ais/pool/ten"


@pytest.fixture(scope="session")
def large(wire: Wire) -> tuple[str, bytes]:
    """Path and bytes of an object of three and a half blocks."""
    data = pattern(3 * MIB + MIB // 2 + 7)
    assert wire.put("/o/ais/pool/large", data).status in (200, 201)
    return "/o/ais/pool/large", data


@pytest.mark.parametrize("bucket", ["pool", "notes"])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_put_comes_back_whole_and_in_parts(wire: Wire, bucket: str, size: int) -> None:
    path, data = f"/o/ais/{bucket}/of-{size}", pattern(size)
    stored = wire.put(path, data)
    assert stored.status == 201
    answer = wire.get(path)
    assert (answer.status, answer.headers["content-length"]) == (200, str(size))
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(data).digest()
    for name in ("etag", "last-modified"):
        assert answer.headers[name] == stored.headers[name]
    for start, stop in ((0, 1), (size // 3, size // 2 + 1), (size - 1, size), (max(0, size - 65537), size), (1, size)):
        if 0 <= start < stop <= size:
            part = wire.get(path, f"Range: bytes={start}-{stop - 1}")
            assert (part.status, part.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
            assert part.body == data[start:stop]
    again = wire.put(path, data[::-1])
    assert again.status == 200
    assert wire.get(path).body == data[::-1]
    assert wire.delete(path).status == 204
    assert wire.get(path).code == "object_not_found"
    assert wire.delete(path).code == "object_not_found"


def test_many_readers_of_ranges_each_get_their_own(wire: Wire, large: tuple[str, bytes]) -> None:
    path, data = large

    def read(number: int) -> None:
        choose = random.Random(number)
        with wire.connect() as peer:
            for _ in range(40):
                start = choose.randrange(len(data))
                stop = min(len(data), start + choose.choice((1, 100, 100 * KIB, 2 * MIB)))
                peer.send(request("GET", path, f"Range: bytes={start}-{stop - 1}"))
                answer = peer.read()
                assert (answer.status, answer.body == data[start:stop]) == (206, True)

    with ThreadPoolExecutor(24) as readers:
        list(readers.map(read, range(24)))


def test_readers_keep_the_version_that_they_opened(wire: Wire) -> None:
    old, new = pattern(8 * MIB), pattern(8 * MIB + 1)
    wire.put("/o/ais/pool/versions", old)
    with wire.connect(receive_buffer=16 * KIB) as slow:
        slow.send(request("GET", "/o/ais/pool/versions"))
        first = slow.read_some()
        assert wire.put("/o/ais/pool/versions", new).status == 200
        assert wire.get("/o/ais/pool/versions").body == new
        assert wire.delete("/o/ais/pool/versions").status == 204
        slow.unread(first)
        assert slow.read().body == old


def test_a_file_that_changes_under_its_reader_is_never_completed(wire: Wire, notes: Path) -> None:
    file = notes / "changing.tar"
    file.write_bytes(pattern(20 * MIB))
    with wire.connect(receive_buffer=16 * KIB) as peer:
        peer.send(request("GET", "/o/ais/notes/changing.tar"))
        first = peer.read_some()
        with open(file, "r+b") as stream:
            stream.seek(10 * MIB)
            stream.write(b"changed")
        peer.unread(first)
        with pytest.raises(Unfinished):
            peer.read()
    with wire.connect(receive_buffer=16 * KIB) as peer:
        peer.send(request("GET", "/o/ais/notes/changing.tar"))
        first = peer.read_some()
        os.truncate(file, MIB)
        peer.unread(first)
        with pytest.raises(Unfinished):
            peer.read()
    file.unlink()


RANGES = {
    # of ten bytes: status, and which bytes
    "bytes=0-0": (206, 0, 1),
    "bytes=0-4": (206, 0, 5),
    "bytes=3-": (206, 3, 10),
    "bytes=-3": (206, 7, 10),
    "bytes=9-9": (206, 9, 10),
    "bytes= 2-3": (206, 2, 4),
    "Bytes=2-3": (206, 2, 4),
    "bytes=0000000000000000000000000000000000000002-3": (206, 2, 4),
    "33 bytes=0-10": (206, 0, 10),
    "33 bytes=5-99999": (206, 5, 10),
    "33 bytes=5-9223372036854775808": (206, 5, 10),
    "34 bytes=-10": (206, 0, 10),
    "34 bytes=-11": (206, 0, 10),
    "34 bytes=-99999999999999999999": (206, 0, 10),
    "31 bytes=5-2": (200, 0, 10),
    "31 bytes=a-b": (200, 0, 10),
    "31 items=0-1": (200, 0, 10),
    "31 bytes=-": (200, 0, 10),
    "31 bytes=": (200, 0, 10),
    "31 bytes": (200, 0, 10),
    "31 bytes=--1": (200, 0, 10),
    "31 bytes=1--1": (200, 0, 10),
    "31 bytes=1-2-3": (200, 0, 10),
    "31 bytes=0x1-0x2": (200, 0, 10),
    "31 bytes=+1-2": (200, 0, 10),
    "31 bytes=1 - 2": (200, 0, 10),
    "31 bytes 1-2": (200, 0, 10),
    "31 1-2": (200, 0, 10),
    "35 bytes=0-1,3-4": (200, 0, 10),
    "35 bytes=0-1, 3-4": (200, 0, 10),
    "35 bytes=0-0,-1": (200, 0, 10),
    "35 bytes=0-1,99-100": (200, 0, 10),
    "35 bytes=" + ",".join(["0-"] * 1000): (200, 0, 10),
    "32 bytes=10-": (416, 0, 0),
    "32 bytes=10-10": (416, 0, 0),
    "32 bytes=99-100": (416, 0, 0),
    "32 bytes=-0": (416, 0, 0),
    "36 bytes=9223372036854775808-": (416, 0, 0),
    "36 bytes=9999999999999999999999999999999999999999-": (416, 0, 0),
}


@pytest.mark.parametrize("case", RANGES)
def test_31_to_36_each_form_of_range(wire: Wire, ten: str, case: str) -> None:
    """RFC 9110 §14; several ranges give the whole object."""
    status, start, stop = RANGES[case]
    number, _, rest = case.partition(" ")
    header = rest if number.isdigit() else case
    answer = wire.get(ten, f"Range: {header}")
    assert answer.status == status
    if status == 416:
        assert answer.code == "range_not_satisfiable"
        assert answer.headers["content-range"] == "bytes */10"
    else:
        assert answer.body == TEN[start:stop]
        assert answer.headers.get("content-range") == (f"bytes {start}-{stop - 1}/10" if status == 206 else None)
        assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0"])
def test_32_no_range_of_an_empty_object_can_be_satisfied(wire: Wire, header: str) -> None:
    wire.put("/o/ais/pool/empty", b"")
    assert wire.get("/o/ais/pool/empty").body == b""
    answer = wire.get("/o/ais/pool/empty", f"Range: {header}")
    assert (answer.status, answer.headers["content-range"]) == (416, "bytes */0")


def test_35_two_range_headers_are_several_ranges(wire: Wire, ten: str) -> None:
    assert wire.get(ten, "Range: bytes=0-1", "Range: bytes=3-4").body == TEN


def test_a_range_is_for_get_only(wire: Wire, ten: str) -> None:
    head = wire.ask("HEAD", ten, "Range: bytes=0-1")
    assert (head.status, head.headers["content-length"]) == (200, "10")
    assert wire.put("/o/ais/pool/ranged", b"whole", "Range: bytes=0-1").status == 201
    assert wire.get("/o/ais/pool/ranged").body == b"whole"
    part = wire.put("/o/ais/pool/ranged", b"part", "Content-Range: bytes 0-3/5")
    assert (part.status, part.code) == (400, "bad_request")


OLD, FUTURE = "Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"


def conditional(wire: Wire, path: str, method: str, *headers: str) -> Answer:
    """ETAG and MODIFIED in the headers are those of the object."""
    known = wire.ask("HEAD", path).headers
    told = [line.replace("ETAG", known["etag"]).replace("MODIFIED", known["last-modified"]) for line in headers]
    return wire.ask(method, path, *told)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["If-None-Match: ETAG"], 304),
        (["If-None-Match: W/ETAG"], 304),
        (['If-None-Match: "x", ETAG'], 304),
        (['If-None-Match: "x"', "If-None-Match: ETAG"], 304),
        (["If-None-Match: *"], 304),
        (['If-None-Match: "*"'], 200),
        (['If-None-Match: "x"'], 200),
        (['If-None-Match: "x'], 200),
        (["If-None-Match: "], 200),
        (["If-Match: ETAG"], 200),
        (['If-Match: "x", ETAG'], 200),
        (["If-Match: *"], 200),
        (["If-Match: W/ETAG"], 412),
        (['If-Match: "x"'], 412),
        (['If-Match: "*"'], 412),
        (["If-Match: nonsense"], 412),
        (["If-Modified-Since: MODIFIED"], 304),
        ([f"If-Modified-Since: {FUTURE}"], 304),
        ([f"If-Modified-Since: {OLD}"], 200),
        (["If-Modified-Since: Sunday, 06-Nov-94 08:49:37 GMT"], 200),
        (["If-Modified-Since: Sun Nov  6 08:49:37 1994"], 200),
        (["If-Unmodified-Since: MODIFIED"], 200),
        ([f"If-Unmodified-Since: {OLD}"], 412),
        (["If-Unmodified-Since: Sun Nov  6 08:49:37 1994"], 412),
        # An ETag goes before a date (RFC 9110 §13.2.2).
        (['If-None-Match: "x"', "If-Modified-Since: MODIFIED"], 200),
        (["If-None-Match: ETAG", f"If-Modified-Since: {OLD}"], 304),
        (["If-Match: ETAG", f"If-Unmodified-Since: {OLD}"], 200),
        (["If-Match: ETAG", "If-None-Match: ETAG"], 304),
        # 38: dates that are none are ignored.
        (["If-Modified-Since: yesterday"], 200),
        (["If-Modified-Since: 2100-01-01T00:00:00Z"], 200),
        (["If-Modified-Since: Sun, 99 Nov 1994 99:99:99 GMT"], 200),
        (["If-Modified-Since: 9999999999999999"], 200),
        (["If-Unmodified-Since: yesterday"], 200),
        ([f"If-Unmodified-Since: {OLD}", f"If-Unmodified-Since: {OLD}"], 200),
        # 37: and a range beside them.
        (["Range: bytes=0-3", "If-Match: ETAG"], 206),
        (["Range: bytes=0-3", 'If-Match: "x"'], 412),
        (["Range: bytes=0-3", "If-None-Match: ETAG"], 304),
        (["Range: bytes=0-3", "If-Range: ETAG"], 206),
        (["Range: bytes=0-3", "If-Range: MODIFIED"], 206),
        (["Range: bytes=0-3", "If-Range: W/ETAG"], 200),
        (["Range: bytes=0-3", 'If-Range: "x"'], 200),
        (["Range: bytes=0-3", "If-Range: *"], 200),
        (["Range: bytes=0-3", f"If-Range: {OLD}"], 200),
        (["Range: bytes=0-3", f"If-Range: {FUTURE}"], 200),
        (["Range: bytes=0-3", "If-Range: yesterday"], 200),
        (["Range: bytes=99-", 'If-Range: "x"'], 200),
        (["Range: bytes=99-", "If-Range: ETAG"], 416),
        (["Range: bytes=99-", 'If-Match: "x"'], 412),
        (["If-Range: ETAG"], 200),
    ],
)
@pytest.mark.parametrize("bucket", ["pool", "notes"])
def test_37_38_conditions_of_a_read(wire: Wire, bucket: str, headers: list[str], status: int) -> None:
    path = f"/o/ais/{bucket}/conditional"
    if wire.ask("HEAD", path).status == 404:
        wire.put(path, TEN)
    answer = conditional(wire, path, "GET", *headers)
    assert answer.status == status
    if status in (200, 206):
        assert answer.body == (TEN if status == 200 else TEN[:4])
    if status in (200, 206, 304):
        assert answer.headers["etag"] == wire.ask("HEAD", path).headers["etag"]
    if status == 304:
        assert "content-length" not in answer.headers
    if status == 412:
        assert answer.code == "precondition_failed"
    if "Range" not in headers[0]:
        assert conditional(wire, path, "HEAD", *headers).status == status


def test_the_etag_is_strong_and_follows_the_bytes(wire: Wire) -> None:
    path = "/o/ais/pool/tagged"
    tags = [wire.put(path, data).headers["etag"] for data in (b"a", b"b", b"a")]
    assert tags[0] == tags[2] != tags[1]
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)
    answer = wire.get(path)
    assert answer.headers["shardmill-checksum"] == f"xxh3:{tags[0][1:-1]}"
    modified = parsedate_to_datetime(answer.headers["last-modified"])
    assert abs(parsedate_to_datetime(answer.headers["date"]) - modified).total_seconds() < 120


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a.tar", "application/x-tar"),
        ("a.TAR", "application/x-tar"),
        ("a.jpg", "image/jpeg"),
        ("a.json", "application/json"),
        ("page.html", "text/html"),
        ("none", "application/octet-stream"),
        ("dir.tar/none", "application/octet-stream"),
        ("a.unknown", "application/octet-stream"),
    ],
)
def test_what_is_stored_is_never_run_by_a_browser(wire: Wire, key: str, kind: str) -> None:
    wire.put(f"/o/ais/pool/types/{key}", b"<script>alert(1)</script>")
    for answer in (
        wire.get(f"/o/ais/pool/types/{key}"),
        wire.ask("HEAD", f"/o/ais/pool/types/{key}"),
        wire.get(f"/o/ais/pool/types/{key}", "Range: bytes=0-3"),
        wire.get(f"/o/ais/pool/types/{key}", "If-None-Match: *"),
    ):
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "sandbox"


def test_a_name_stays_an_absence_and_a_failure_a_failure(wire: Wire) -> None:
    """An object whose file cannot be read is 5xx: told 404, a reader would skip data that is there."""
    wire.put("/o/ais/pool/corrupt", pattern(100_000))
    (file,) = [path for path in wire.node.data.glob("pool/*/*/*") if _holds(path, "corrupt")]
    with open(file, "r+b") as stream:
        stream.seek(50_000)
        stream.write(b"\xff\x00" * 8)
    # Verified blocks are remembered by version, and this one has not been read since it was put.
    answer = wire.get("/o/ais/pool/corrupt")
    assert (answer.status, answer.code) == (500, CorruptObject.code)
    os.truncate(file, 60_000)
    assert wire.get("/o/ais/pool/corrupt").status == 500
    assert wire.put("/o/ais/pool/corrupt", b"mended").status in (200, 201)
    assert wire.get("/o/ais/pool/corrupt").body == b"mended"


def _holds(path: Path, key: str) -> bool:
    return path.is_file() and key.encode() in path.read_bytes()[-4096:]


def test_a_reader_that_leaves_frees_everything_within_a_second(wire: Wire, large: tuple[str, bytes]) -> None:
    path, _ = large
    wire.get("/healthz")
    before = set(wire.descriptors().values())
    peers = [wire.connect(receive_buffer=16 * KIB) for _ in range(30)]
    for peer in peers:
        peer.send(request("GET", path) * 3)
        peer.read_head()
    assert len(set(wire.descriptors().values()) - before) >= 30
    for number, peer in enumerate(peers):
        peer.reset() if number % 2 else peer.socket.close()
    wait_for(lambda: set(wire.descriptors().values()) <= before, "descriptors are closed", 5)


def test_one_stalled_reader_does_not_slow_the_others(wire: Wire, large: tuple[str, bytes]) -> None:
    path, data = large
    with wire.connect(receive_buffer=16 * KIB) as stalled:
        stalled.send(request("GET", path) * 50)
        stalled.read_head()
        for _ in range(20):
            assert wire.get(path).body == data
