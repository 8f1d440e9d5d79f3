"""Objects into files and buffers, by one connection and by several: one version, whole, or not there."""

import contextlib
import fcntl
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shardmill.client import BucketHandle, Client, TruncatedBody, downloading, http
from shardmill.core.errors import BadRequest, Conflict, CorruptObject, ShardmillError
from tests.client.scripted import ObjectNode

URI = "ais://bkt/a"
PART = 1 << 16
BODY = os.urandom(20 * PART + 17)

Serving = Callable[..., tuple[ObjectNode, Client]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PART", PART)
    monkeypatch.setattr(http, "REFUSED_WAITS", (0.0, 0.0))


@pytest.fixture
def bucket(client: Client) -> Iterator[BucketHandle]:
    handle = client.bucket("ais://downloads")
    handle.create()
    yield handle
    handle.remove(force=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART - 1, 2 * PART, 33 * PART + 5])
@pytest.mark.parametrize("connections", [1, 2, 7])
def test_objects_of_every_size_arrive_whole(bucket: BucketHandle, tmp_path: Path, size: int, connections: int) -> None:
    body = os.urandom(size)
    stored = bucket.object("a").put(body)
    told: list[int] = []
    meta = bucket.object("a").download(tmp_path / "new" / "file", connections=connections, progress=told.append)
    assert sha256(tmp_path / "new" / "file") == hashlib.sha256(body).hexdigest()
    assert (meta.size, meta.etag, sum(told)) == (size, stored.etag, size)
    assert files_of(tmp_path / "new") == ["file"]
    buffer = bytearray(size + 3)
    assert bucket.object("a").read_into(buffer, connections=connections) == size
    assert buffer == body + bytes(3)


def test_a_large_object_comes_by_several_connections_each_part_once(serving: Serving, tmp_path: Path) -> None:
    node, client = serving(BODY)
    client.object(URI).download(tmp_path / "file", connections=4)
    assert (tmp_path / "file").read_bytes() == BODY
    first, *others = node.requests
    assert b"Range" not in first
    assert sorted(int(head.partition(b"bytes=")[2].partition(b"-")[0]) for head in others) == [
        PART * number for number in range(1, 21)
    ]
    assert all(b'If-Match: "v1"\r\n' in head for head in others)
    assert 2 <= len(node.connections) <= 1 + 4


def test_parts_that_are_cut_go_on(serving: Serving, tmp_path: Path) -> None:
    node, client = serving(BODY)
    node.spoil = lambda number, right: right[: len(right) // 2] if number % 3 else right
    array = np.zeros(len(BODY), np.uint8)
    assert client.object(URI).read_into(array, connections=3) == len(BODY)
    assert array.tobytes() == BODY


@pytest.mark.parametrize("is_refused", [False, True])
def test_an_interrupt_ends_a_download_whose_parts_are_not_answered(
    serving: Serving, tmp_path: Path, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the silence that an answer may have nor the time until the next try is waited out: both are minutes."""
    monkeypatch.setattr(http, "BUSY_WAITS", (1000.0,))
    node, client = serving(BODY)
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    node.spoil = lambda number, right: (busy if is_refused else None) if number else right

    def interrupt(number: int) -> None:
        if number == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    node.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        client.object(URI).download(tmp_path / "file", connections=4)
    assert "file" not in files_of(tmp_path)


def test_parts_of_two_versions_are_never_put_together(serving: Serving, tmp_path: Path) -> None:
    node, client = serving(BODY)

    def replace(number: int) -> None:
        if number == 5:
            node.body, node.etag = os.urandom(len(BODY)), "v2"

    node.before = replace
    with pytest.raises(Conflict, match="ais://bkt/a changed while it was being read"):
        client.object(URI).download(tmp_path / "file", connections=2)
    assert "file" not in files_of(tmp_path)
    # What is left is named by its version, so it is no beginning of the new one.
    client.object(URI).download(tmp_path / "file", connections=2)
    assert (tmp_path / "file").read_bytes() == node.body


@pytest.mark.parametrize("connections", [1, 4])
def test_what_a_broken_download_left_is_whole_and_gone_on_with(
    serving: Serving, tmp_path: Path, connections: int
) -> None:
    node, client = serving(BODY)
    broken = len(BODY) * 2 // 3

    def breaks(number: int, right: bytes) -> bytes:
        if connections == 1:
            return right[:broken] if number == 0 else right[: right.index(b"\r\n\r\n") + 4]
        return right[: right.index(b"\r\n\r\n") + 4] if number in range(12, 40) else right

    node.spoil = breaks
    with pytest.raises(TruncatedBody):
        client.object(URI).download(tmp_path / "file", connections=connections)
    (left,) = tmp_path.iterdir()
    kept = left.read_bytes()
    assert left.suffix in (".part", ".parts")
    assert len(kept) > PART
    assert kept == BODY[: len(kept)]
    node.spoil = lambda _, right: right
    told: list[int] = []
    client.object(URI).download(tmp_path / "file", connections=connections, progress=told.append)
    assert (tmp_path / "file").read_bytes() == BODY
    assert sum(told) == len(BODY) - len(kept)
    assert files_of(tmp_path) == ["file"]


def test_of_what_a_killed_download_left_only_what_has_no_holes_is_taken(serving: Serving, tmp_path: Path) -> None:
    _, client = serving(BODY)
    with client.object(URI).get() as reader:
        part = downloading.Download(reader, tmp_path / "file").part
    # As a process leaves it that is killed while its threads write parts: with holes behind what its name says.
    left = part.with_suffix(f".{PART}.parts")
    left.write_bytes(BODY[:PART] + bytes(len(BODY) - PART - 5))
    part.with_suffix(".1-1.5.parts").write_bytes(BODY[:5])
    told: list[int] = []
    client.object(URI).download(tmp_path / "file", progress=told.append)
    assert (tmp_path / "file").read_bytes() == BODY
    assert sum(told) == len(BODY) - PART
    assert files_of(tmp_path) == ["file"]


@pytest.mark.parametrize("connections", [1, 4])
def test_two_downloads_of_one_file_at_once_do_not_meet(serving: Serving, tmp_path: Path, connections: int) -> None:
    _, client = serving(BODY)
    others: list[int] = []

    def meanwhile(_: int) -> None:
        if not others:
            others.append(0)
            others[0] = client.object(URI).download(tmp_path / "file", connections=connections).size
            assert (tmp_path / "file").read_bytes() == BODY

    client.object(URI).download(tmp_path / "file", connections=connections, progress=meanwhile)
    assert others == [len(BODY)]
    assert (tmp_path / "file").read_bytes() == BODY
    assert files_of(tmp_path) == ["file"]


def test_what_was_kept_is_kept_when_going_on_fails_at_once(serving: Serving, tmp_path: Path) -> None:
    node, client = serving(BODY)
    with client.object(URI).get() as reader:
        part = downloading.Download(reader, tmp_path / "file").part
    part.write_bytes(BODY[:PART])
    node.spoil = lambda _, right: right if b"206" not in right[:20] else b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(ShardmillError):
        client.object(URI).download(tmp_path / "file")
    assert files_of(tmp_path) == [part.name]
    assert part.read_bytes() == BODY[:PART]


def test_a_file_that_gets_another_name_meanwhile_is_no_trouble(serving: Serving, tmp_path: Path) -> None:
    _, client = serving(BODY)
    with client.object(URI).get() as reader:
        part = downloading.Download(reader, tmp_path / "file").part
    # Listed, and not there when it is looked at.
    part.with_suffix(f".1-1.{PART}.parts").symlink_to(tmp_path / "gone")
    client.object(URI).download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_what_another_process_writes_is_left_to_it(serving: Serving, tmp_path: Path) -> None:
    _, client = serving(BODY)
    with client.object(URI).get() as reader:
        part = downloading.Download(reader, tmp_path / "file").part
    begun = (part, part.with_suffix(f".{PART}.parts"))
    with contextlib.ExitStack() as stack:
        for path in begun:
            file = stack.enter_context(path.open("wb"))
            file.write(b"of another process")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        client.object(URI).download(tmp_path / "file", connections=4)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [path.read_bytes() for path in begun] == [b"of another process"] * 2


def test_a_file_with_other_bytes_than_the_nodes_is_not_left(bucket: BucketHandle, tmp_path: Path) -> None:
    handle = bucket.object("a")
    handle.put(BODY)
    with handle.get() as reader:
        part = downloading.Download(reader, tmp_path / "file").part
    part.write_bytes(b"not what the node has")
    with pytest.raises(CorruptObject, match="other bytes than the node has"):
        handle.download(tmp_path / "file")
    assert files_of(tmp_path) == []
    handle.download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_an_object_that_does_not_fit_is_refused_and_members_and_arrays_are_read(client: Client, shards: Path) -> None:
    handle = client.object("gs://sharded-imagenet/imagenet-train-000000.tar")
    size = (shards / "imagenet-train-000000.tar").stat().st_size
    with pytest.raises(BadRequest, match=f"has {size} bytes, the buffer only {size - 1}"):
        handle.read_into(bytearray(size - 1))
    pixels = np.zeros((size // 2 + 1, 2), np.uint8)
    assert handle.read_into(pixels) == size
    assert pixels.tobytes()[:size] == (shards / "imagenet-train-000000.tar").read_bytes()
    with pytest.raises((TypeError, BufferError, ValueError)):
        handle.read_into(bytes(size))


def test_an_object_that_is_replaced_meanwhile_is_a_conflict_or_its_old_bytes(
    bucket: BucketHandle, tmp_path: Path
) -> None:
    handle = bucket.object("a")
    handle.put(BODY)
    replaced = False

    def replace(_: int) -> None:
        nonlocal replaced
        if not replaced:
            replaced = True
            handle.put(os.urandom(len(BODY)))

    with pytest.raises(Conflict):
        handle.download(tmp_path / "file", connections=2, progress=replace)
    assert "file" not in files_of(tmp_path)
