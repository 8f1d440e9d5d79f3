"""Bodies on their way to a node: files by the kernel, pieces in chunks, and sources that end too early."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardmill.client import BucketHandle, Client
from shardmill.client.uploads import BLOCK
from shardmill.core.errors import BucketReadOnly, ObjectNotFound

SIZES = (0, 1, 65536, 65537, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17)


@pytest.fixture
def bucket(client: Client) -> Iterator[BucketHandle]:
    handle = client.bucket("ais://uploads")
    handle.create()
    yield handle
    handle.remove(force=True)


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_body_of_every_size_arrives_whole(bucket: BucketHandle, tmp_path: Path, size: int) -> None:
    body = os.urandom(size)
    path = tmp_path / "body"
    path.write_bytes(body)
    pieces = [body[start : start + 70_001] for start in range(0, size, 70_001)]
    for given in (body, bytearray(body), memoryview(body), path, str(path), io.BytesIO(body), pieces, iter(pieces)):
        told: list[int] = []
        stored = bucket.object("a").put(given, progress=told.append)
        assert (stored.size, sum(told)) == (size, size)
        assert bucket.object("a").read() == body
        assert stored.checksum == bucket.object("a").head().checksum


def test_a_file_is_sent_from_where_it_stands_and_stands_at_its_end_after_it(
    bucket: BucketHandle, tmp_path: Path
) -> None:
    path = tmp_path / "body"
    path.write_bytes(bytes(range(256)) * 1000)
    for buffering in (-1, 0):
        with path.open("rb", buffering=buffering) as file:
            assert file.read(3) == b"\0\1\2"
            assert bucket.object("a").put(file).size == 255_997
            assert file.read() == b""
            assert file.tell() == 256_000
        assert bucket.object("a").read() == path.read_bytes()[3:]


def test_views_of_other_items_are_sent_as_their_bytes(bucket: BucketHandle) -> None:
    numbers: Any = memoryview(bytearray(80_000)).cast("d")
    assert bucket.object("a").put(numbers).size == 80_000
    assert bucket.object("b").put([numbers[:10], numbers[10:]]).size == 80_000
    assert bucket.object("b").read() == bytes(80_000)


def test_a_file_that_shrinks_on_its_way_leaves_the_old_object(bucket: BucketHandle, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(bytes(3 * BLOCK))
    bucket.object("kept").put(b"old")
    with pytest.raises(ValueError, match="has 1048581 bytes, 3145728 were announced: its file has shrunk"):
        bucket.object("kept").put(path, progress=lambda _: os.truncate(path, BLOCK + 5))
    assert bucket.object("kept").read() == b"old"


def test_a_source_that_fails_is_what_is_raised_and_nothing_is_stored(bucket: BucketHandle) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        bucket.object("a").put(pieces())
    with pytest.raises(TypeError, match="binary mode"):
        bucket.object("a").put(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(ObjectNotFound):
        bucket.object("a").head()


def test_a_refusal_ends_a_large_upload_early_with_its_reason(client: Client, tmp_path: Path) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10_000:
            sent += 1
            yield bytes(BLOCK)

    with pytest.raises((BucketReadOnly, ConnectionError)):
        client.object("gs://sharded-imagenet/new").put(pieces())
    assert sent < 1000
