"""Buckets and objects of a real node, through the client."""

import io
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import BucketHandle, Client
from shardmill.client.shards import read_stream
from shardmill.core.errors import (
    BadRequest,
    BadShard,
    BucketNotFound,
    BucketReadOnly,
    Conflict,
    MemberNotFound,
    ObjectNotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
)

IMAGENET = "gs://sharded-imagenet"
SHARD = "imagenet-train-000000.tar"


@pytest.fixture
def bucket(client: Client) -> Iterator[BucketHandle]:
    """An empty bucket of this test's own."""
    handle = client.bucket("ais://objects")
    handle.create()
    yield handle
    handle.remove(force=True)


def test_buckets_are_listed_with_their_backing(client: Client) -> None:
    found = {info.uri: (info.backing, info.writable) for info in client.buckets()}
    assert found[IMAGENET] == ("dir", False)
    assert found["ais://pool"] == ("pool", True)


def test_a_shard_reads_back_as_its_file_whole_in_chunks_and_by_range(client: Client, shards: Path) -> None:
    expected = (shards / SHARD).read_bytes()
    handle = client.bucket("gcp://sharded-imagenet").object(SHARD)
    assert handle.read() == expected
    with handle.get() as reader:
        assert reader.meta.size == len(expected)
        assert b"".join(reader) == expected
    with handle.get() as reader:
        assert reader.read(7) + reader.read() == expected
    assert handle.get_range(1000, 3000) == expected[1000:3000]
    assert handle.get_range(len(expected) - 5, len(expected) + 5) == expected[-5:]
    with pytest.raises(RangeNotSatisfiable):
        handle.get_range(len(expected), len(expected) + 1)


def test_a_reader_is_a_file_for_tarfile_and_can_start_anywhere(client: Client, shards: Path) -> None:
    handle = client.bucket(IMAGENET).object(SHARD)
    with tarfile.open(shards / SHARD) as archive:
        names = archive.getnames()
    with handle.get() as reader, tarfile.open(fileobj=reader, mode="r|") as archive:
        assert archive.getnames() == names
    with handle.get() as reader:
        reader.skip_to(512)
        assert reader.read() == (shards / SHARD).read_bytes()[512:]


def test_samples_stream_in_order(client: Client, shards: Path) -> None:
    with client.bucket(IMAGENET).object(SHARD).get() as reader:
        samples = list(read_stream(reader))
    with tarfile.open(shards / SHARD) as archive:
        members = {member.name: member.size for member in archive if member.isfile()}
    assert {f"{s.key}.{name}": len(data) for s in samples for name, data in s.fields.items()} == members


def test_puts_of_every_kind_read_back_with_their_metadata(bucket: BucketHandle, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a path" * 100_000)
    bodies = {
        "bytes": (b"abc", b"abc"),
        "empty": (b"", b""),
        "view": (memoryview(b"xyz"), b"xyz"),
        "path": (tmp_path / "file", b"from a path" * 100_000),
        "text path": (str(tmp_path / "file"), b"from a path" * 100_000),
        "file": (io.BytesIO(b"from a file"), b"from a file"),
        "pieces": (iter([b"a", b"", b"b" * 3_000_000]), b"a" + b"b" * 3_000_000),
    }
    for name, (body, expected) in bodies.items():
        stored = bucket.object(name).put(body, meta={"origin": name})  # type: ignore[arg-type]
        assert stored.created
        assert stored.size == len(expected)
        meta = bucket.object(name).head()
        assert (meta.size, meta.etag, meta.user["origin"]) == (len(expected), stored.etag, name)
        assert bucket.object(name).read() == expected


def test_put_replaces_unless_told_not_to(bucket: BucketHandle) -> None:
    handle = bucket.object("a")
    assert handle.put(b"1").created
    assert not handle.put(b"2").created
    with pytest.raises(PreconditionFailed):
        handle.put(b"3", if_absent=True)
    assert handle.read() == b"2"


def test_listings_page_and_roll_up(bucket: BucketHandle) -> None:
    keys = ["a.b", "a/1", "a/2", "b", "ü"]
    for key in keys:
        bucket.object(key).put(key.encode())
    assert [item.key for item in bucket.list()] == keys
    assert [item.key for item in bucket.list("a/")] == ["a/1", "a/2"]
    pages = list(bucket.pages(limit=2))
    assert [len(page.objects) for page in pages] == [2, 2, 1]
    (level,) = bucket.pages(delimiter="/")
    assert ([item.key for item in level.objects], level.prefixes) == (["a.b", "b", "ü"], ["a/"])


def test_removing_objects_and_buckets(client: Client, bucket: BucketHandle) -> None:
    bucket.object("a").put(b"1")
    with pytest.raises(Conflict):
        bucket.remove()
    bucket.object("a").delete()
    with pytest.raises(ObjectNotFound):
        bucket.object("a").delete()
    with pytest.raises(ObjectNotFound):
        bucket.object("a").read()
    with pytest.raises(ObjectNotFound):
        bucket.object("a").head()
    with pytest.raises(BucketNotFound):
        list(client.bucket("ais://nowhere").list())


def test_what_is_not_allowed_says_so(client: Client) -> None:
    with pytest.raises(BucketReadOnly):
        client.bucket(IMAGENET).object("new").put(b"x")
    with pytest.raises(BadRequest, match="--bucket"):
        client.bucket("s3://remote").create()


def test_listed_templates_and_prefixes_become_urls(client: Client) -> None:
    expected = [client.object_url(IMAGENET, f"imagenet-val-{number:06d}.tar") for number in range(6)]
    assert client.expand_object_urls(IMAGENET, template="imagenet-val-%06d.tar") == expected
    assert client.expand_object_urls(IMAGENET, prefix="imagenet-val-") == expected
    with pytest.raises(ObjectNotFound, match="starts with 'nothing'"):
        client.expand_object_urls(IMAGENET, prefix="nothing")


def test_threads_share_a_client(client: Client, shards: Path) -> None:
    expected = {path.name: path.read_bytes() for path in shards.glob("imagenet-val-*.tar")}
    wrong: list[str] = []

    def read(name: str) -> None:
        for _ in range(5):
            if client.bucket(IMAGENET).object(name).read() != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_members_are_listed_and_read_by_name(client: Client, shards: Path) -> None:
    shard = client.bucket(IMAGENET).object(SHARD)
    with tarfile.open(shards / SHARD) as judge:
        infos = [info for info in judge if info.isreg()]
        assert [(found.name, found.offset, found.size) for found in shard.members()] == [
            (info.name, info.offset_data, info.size) for info in infos
        ]
        for info in (infos[0], infos[-1]):
            file = judge.extractfile(info)
            assert file is not None
            expected, member = file.read(), shard.member(info.name)
            assert member.read() == expected
            with member.get() as reader:
                assert (reader.meta.size, reader.read()) == (info.size, expected)
            assert member.get_range(1, info.size + 5) == expected[1:]
            assert member.get_range(1, 1) == b""
            assert member.head().size == info.size
            assert urllib.request.urlopen(member.url()).read() == expected


def test_a_member_that_is_not_there_is_no_empty_one(client: Client) -> None:
    shard = client.bucket(IMAGENET).object(SHARD)
    for read in (shard.member("none").read, shard.member("none").head, shard.member("none").get):
        with pytest.raises(MemberNotFound, match="none"):
            read()
    with pytest.raises(ObjectNotFound):
        client.object(f"{IMAGENET}/none.tar").member("a").read()
    with pytest.raises(BadRequest):
        shard.member("")


def test_members_of_any_name_are_read(client: Client, bucket: BucketHandle) -> None:
    stream, names = io.BytesIO(), ["a b+c%20&=.txt", "./x/ü.json", "{0..9}::$;.txt"]
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            tar.addfile(info, io.BytesIO(name.encode()))
    bucket.object("odd.tar").put(stream.getvalue())
    assert [found.name for found in bucket.object("odd.tar").members()] == names
    for name in names:
        assert bucket.object("odd.tar").member(name).read() == name.encode()
    bucket.object("bad.tar").put(b"no tar")
    with pytest.raises(BadShard):
        list(bucket.object("bad.tar").members())


def test_a_listing_of_members_never_mixes_two_versions(client: Client, bucket: BucketHandle) -> None:
    def shard(prefix: str) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for number in range(2500):
                tar.addfile(tarfile.TarInfo(f"{prefix}{number}"))
        return stream.getvalue()

    bucket.object("s.tar").put(shard("a"))
    listing = bucket.object("s.tar").members()
    assert next(listing).name == "a0"
    bucket.object("s.tar").put(shard("b"))
    with pytest.raises(Conflict):
        list(listing)
    assert [found.name for found in bucket.object("s.tar").members()] == [f"b{number}" for number in range(2500)]
