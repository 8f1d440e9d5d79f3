"""`/o` for writers: what is stored, what is refused, and what a client that fails midway leaves: nothing."""

import http.client
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from shardmill.testing.node import running_node
from tests.server.wire import Wire, in_chunks, request, wait_for

MIB = 1 << 20
BUCKETS = ("pool", "notes")

Files = Callable[[], set[str]]


@pytest.fixture
def notes_files(notes: Path) -> Files:
    """Names of all that lies in the directory behind `ais://notes`, uploads in the making included."""
    return lambda: {str(path.relative_to(notes)) for path in notes.rglob("*")}


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    """A node whose files end at 20 MiB, as on a disk that is full."""
    python = tmp_path_factory.mktemp("tight") / "python"
    python.write_text(f'#!/bin/sh\nulimit -f {20 * MIB // 512}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with running_node("--bucket", "ais://pool", python=python) as node:
        yield Wire(node, ())


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_put_is_201_when_new_and_200_when_it_replaces(wire: Wire, bucket: str) -> None:
    path = f"/o/ais/{bucket}/dir/new"
    assert [wire.put(path, data).status for data in (b"a", b"bb", b"")] == [201, 200, 200]
    assert wire.get(path).body == b""
    assert wire.delete(path).status == 204
    assert wire.put(path, b"c").status == 201
    assert wire.delete(path).status == 204


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_chunked_body_is_stored_without_its_chunks(wire: Wire, bucket: str) -> None:
    """As `wds.ShardWriter` sends them through curl."""
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate((1, 70_000, 3 * MIB, 5))]
    with wire.connect() as peer:
        peer.send(request("PUT", f"/o/ais/{bucket}/chunked", "Transfer-Encoding: chunked"))
        for piece in pieces:
            peer.send(in_chunks(piece, end=b""))
        peer.send(b"0\r\n\r\n")
        assert peer.read().status == 201
    assert wire.get(f"/o/ais/{bucket}/chunked").body == b"".join(pieces)
    wire.delete(f"/o/ais/{bucket}/chunked")


def test_http_client_sends_an_iterable(wire: Wire) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(wire.node.endpoint.rpartition(":")[2]))
    connection.request(
        "PUT",
        "/o/ais/pool/iterated",
        body=iter([b"one", b"two"]),
        encode_chunked=True,
        headers={"Transfer-Encoding": "chunked"},
    )
    assert connection.getresponse().status == 201
    connection.close()
    assert wire.get("/o/ais/pool/iterated").body == b"onetwo"


def test_a_put_without_length_and_chunks_is_empty(wire: Wire) -> None:
    """RFC 9112 §6.3: such a request has no body."""
    assert wire.ask("PUT", "/o/ais/pool/nothing").status == 201
    assert wire.get("/o/ais/pool/nothing").body == b""


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("announced", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_vanishes_midway_leaves_the_old_object(
    wire: Wire, notes_files: Files, bucket: str, announced: str, reset: bool
) -> None:
    path = f"/o/ais/{bucket}/halfway"
    wire.put(path, b"old")
    before = notes_files()
    with wire.connect() as peer:
        peer.send(request("PUT", path, announced))
        data = bytes(3 * MIB)
        peer.send(data if "Length" in announced else in_chunks(data, end=b""))
        wait_for(lambda: bool(wire.temporary_files()) or notes_files() != before, "the upload has begun")
        if reset:
            peer.reset()
    wait_for(lambda: not wire.temporary_files() and notes_files() == before, "the temporary file is gone")
    assert wire.get(path).body == b"old"


def test_41_what_comes_behind_the_length_is_the_next_request(wire: Wire) -> None:
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/exact", body=b"12345") + request("GET", "/o/ais/pool/exact"))
        assert peer.read().status == 201
        assert peer.read().body == b"12345"


def checksum(data: bytes) -> str:
    return f"Shardmill-Checksum: xxh3:{xxhash.xxh3_128_hexdigest(data)}"


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_checksum_is_compared_before_anything_is_replaced(wire: Wire, bucket: str) -> None:
    path = f"/o/ais/{bucket}/checked"
    data = random.Random(1).randbytes(MIB + 1)
    stored = wire.put(path, data, checksum(data))
    assert stored.status == 201
    assert f"Shardmill-Checksum: {stored.headers['shardmill-checksum']}" == checksum(data)
    name, _, digits = checksum(data).rpartition(":")
    assert wire.put(path, data, f"{name}:{digits.upper()}").status == 200
    wrong = wire.put(path, b"other", checksum(data))
    assert (wrong.status, wrong.code) == (400, "bad_request")
    assert wire.get(path).body == data
    wire.delete(path)


@pytest.mark.parametrize(
    "value", ["", "xxh3:", "xxh3:12", f"md5:{'0' * 32}", f"xxh3:{'g' * 32}", "0" * 32, f"xxh3:{'0' * 33}"]
)
def test_a_malformed_checksum_is_400_before_the_body(wire: Wire, value: str) -> None:
    with wire.connect() as peer:
        peer.send(
            request(
                "PUT",
                "/o/ais/pool/never",
                f"Shardmill-Checksum: {value}",
                "Content-Length: 100",
                "Expect: 100-continue",
            )
        )
        answer = peer.read()
        assert (answer.status, answer.code) == (400, "bad_request")
        assert "xxh3-128" in answer.message


@pytest.mark.parametrize("bucket", BUCKETS)
def test_39_if_absent_keeps_what_is_there(wire: Wire, bucket: str) -> None:
    path = f"/o/ais/{bucket}/absent"
    assert wire.put(path, b"first", "If-None-Match: *").status == 201
    answer = wire.put(path, b"second", "If-None-Match: *")
    assert (answer.status, answer.code) == (412, "precondition_failed")
    assert wire.get(path).body == b"first"
    wire.delete(path)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_39_of_twenty_who_put_if_absent_exactly_one_does(wire: Wire, bucket: str) -> None:
    path = f"/o/ais/{bucket}/raced"
    bodies = [random.Random(number).randbytes(200_000) for number in range(20)]
    with ThreadPoolExecutor(20) as racers:
        statuses = list(racers.map(lambda body: wire.put(path, body, "If-None-Match: *").status, bodies))
    assert sorted(statuses) == [201] + [412] * 19
    assert wire.get(path).body == bodies[statuses.index(201)]
    wire.delete(path)


def test_twenty_who_put_the_same_key_leave_one_of_theirs_whole(wire: Wire) -> None:
    bodies = {random.Random(number).randbytes(300_000 + number) for number in range(20)}
    with ThreadPoolExecutor(24) as pool:
        puts = [pool.submit(wire.put, "/o/ais/pool/contended", body) for body in bodies]
        reads = [pool.submit(wire.get, "/o/ais/pool/contended") for _ in range(40)]
    assert sorted(answer.result().status for answer in puts) == [200] * 19 + [201]
    assert {read.result().body for read in reads if read.result().status == 200} <= bodies
    assert wire.get("/o/ais/pool/contended").body in bodies


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("If-Match: ETAG", 200),
        ("If-Match: *", 200),
        ('If-Match: "x"', 412),
        ("If-Match: W/ETAG", 412),
        ('If-None-Match: "x"', 200),
        ("If-None-Match: ETAG", 412),
        ("If-Unmodified-Since: Sun, 06 Nov 1994 08:49:37 GMT", 412),
        ("If-Unmodified-Since: never", 200),
        ("If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT", 200),
    ],
)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_conditions_of_a_write_are_judged_against_what_is_there(
    wire: Wire, bucket: str, condition: str, status: int
) -> None:
    path = f"/o/ais/{bucket}/guarded"
    etag = wire.put(path, b"old").headers["etag"]
    told = condition.replace("ETAG", etag)
    assert wire.put(path, b"new", told).status == status
    assert wire.get(path).body == (b"new" if status == 200 else b"old")
    etag = wire.put(path, b"old").headers["etag"]
    assert wire.delete(path, condition.replace("ETAG", etag)).status == (204 if status == 200 else 412)
    assert wire.get(path).status == (404 if status == 200 else 200)
    if status == 200 and condition.startswith("If-Match"):
        assert wire.put(path, b"new", condition.replace("ETAG", etag)).status == 412
        assert wire.get(path).status == 404
    wire.delete(path)


def test_a_condition_that_fails_while_the_body_comes_keeps_what_is_there(wire: Wire) -> None:
    with wire.connect() as peer:
        # Large enough not to be held until it is whole.
        peer.send(request("PUT", "/o/ais/pool/late", "If-None-Match: *", "Content-Length: 100003") + bytes(100_000))
        wait_for(lambda: bool(wire.temporary_files()), "the upload has begun")
        assert wire.put("/o/ais/pool/late", b"other").status == 201
        peer.send(b"two")
        assert peer.read().status == 412
    assert wire.get("/o/ais/pool/late").body == b"other"
    wire.delete("/o/ais/pool/late")


@pytest.mark.parametrize("bucket", BUCKETS)
def test_user_metadata_comes_back_in_headers_and_listings(wire: Wire, bucket: str) -> None:
    path = f"/o/ais/{bucket}/described"
    headers = ["Shardmill-Meta-Who: me", "shardmill-meta-where: Zürich, 東京", "Shardmill-Meta-empty: ", "X-Other: no"]
    assert wire.put(path, b"x", *headers).status == 201
    for answer in (wire.get(path), wire.ask("HEAD", path), wire.get(path, "If-None-Match: *")):
        found = {name: value for name, value in answer.headers.items() if name.startswith("shardmill-meta-")}
        assert found == {"shardmill-meta-who": "me", "shardmill-meta-where": "Zürich, 東京", "shardmill-meta-empty": ""}
    page = wire.get(f"/api/objects?bucket=ais://{bucket}&prefix=described").json()
    assert isinstance(page["objects"], list)
    # A page of a directory opens none of its files.
    described = {"who": "me", "where": "Zürich, 東京", "empty": ""}
    assert page["objects"][0].get("user") == (described if bucket == "pool" else None)
    assert wire.put(path, b"y").status == 200
    assert "shardmill-meta-who" not in wire.get(path).headers
    wire.delete(path)


@pytest.mark.parametrize(
    "headers",
    [
        ("Shardmill-Meta-a: 1", "shardmill-meta-A: 2"),
        ("Shardmill-Meta-: x",),
        (f"Shardmill-Meta-a: {'x' * 2048}",),
        *[tuple(f"Shardmill-Meta-k{number}: {'x' * 90}" for number in range(25))],
        ("Shardmill-Meta-a: \udcff",),
    ],
)
def test_metadata_that_cannot_be_kept_is_400(wire: Wire, headers: tuple[str, ...]) -> None:
    answer = wire.put("/o/ais/pool/never", b"x", *headers)
    assert (answer.status, answer.code) == (400, "bad_request")
    assert wire.get("/o/ais/pool/never").status == 404


def test_a_read_only_bucket_is_403_and_names_the_way_out(wire: Wire) -> None:
    for answer in (
        wire.put("/o/gs/sharded-imagenet/new", b"x"),
        wire.delete("/o/gs/sharded-imagenet/imagenet-val-000000.tar"),
    ):
        assert (answer.status, answer.code) == (403, "bucket_read_only")
        assert "dir-rw:PATH" in answer.message
    assert wire.ask("HEAD", "/o/gs/sharded-imagenet/imagenet-val-000000.tar").status == 200


def test_an_upload_over_a_full_disk_is_507_and_keeps_the_old_object(tight: Wire) -> None:
    """What is announced is taken at once; what is not runs full on its way."""
    tight.put("/o/ais/pool/kept", b"old")
    answer = tight.ask("PUT", "/o/ais/pool/kept", f"Content-Length: {40 * MIB}")
    assert (answer.status, answer.code) == (507, "insufficient_storage")
    with tight.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/kept", "Transfer-Encoding: chunked"))
        try:
            for _ in range(30):
                peer.send(in_chunks(bytes(MIB), end=b""))
        except ConnectionError:
            pass
        assert peer.read().status == 507
    assert not tight.temporary_files()
    assert tight.get("/o/ais/pool/kept").body == b"old"
    assert tight.put("/o/ais/pool/kept", b"new").status == 200


def test_the_sent_metadata_is_what_a_stored_object_says_of_itself(wire: Wire) -> None:
    """An answer to PUT and one to HEAD describe the object alike."""
    stored = wire.put("/o/ais/pool/alike", b"alike", "Shardmill-Meta-a: b").headers
    known = wire.ask("HEAD", "/o/ais/pool/alike").headers
    for name in ("etag", "last-modified", "shardmill-checksum", "shardmill-meta-a"):
        assert stored[name] == known[name]
