"""Batches by the client: the asked order, what is missing, what is cut, what is not what was asked for."""

import io
import os
import tarfile
from collections.abc import Iterator

import pytest

from shardmill.client import BatchItem, BucketHandle, Client, TruncatedBody, batch
from shardmill.core.errors import BadRequest, MemberNotFound, ObjectNotFound, ServerError
from tests.client.scripted import Build, answer


def archive(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as written:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            written.addfile(info, io.BytesIO(payload))
    return file.getvalue()


@pytest.fixture
def bucket(client: Client) -> Iterator[BucketHandle]:
    handle = client.bucket("ais://batch")
    handle.create()
    yield handle
    handle.remove(force=True)


def test_items_of_many_objects_come_in_their_order(
    bucket: BucketHandle, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over several requests, and where one shard is asked for by turns with another."""
    monkeypatch.setattr(batch, "SLICE", 7)
    members = {f"{number:03d}.txt": os.urandom(number * 41) for number in range(40)}
    for name in ("a.tar", "b.tar"):
        bucket.object(name).put(archive(*members.items()))
    bucket.object("plain").put(b"as it is")
    wanted: list[batch.Wanted] = [
        (bucket.object("ab"[number % 3 % 2] + ".tar").uri, name) for number, name in enumerate(members)
    ]
    wanted[5:5] = [bucket.object("plain").uri] * 2
    found = list(client.read_batch(iter(wanted)))
    assert [item.uri if item.member is None else (item.uri, item.member) for item in found] == wanted
    assert all(item.data == (members[item.member] if item.member else b"as it is") for item in found)
    assert list(client.read_batch([])) == []


def test_what_is_missing_is_an_error_or_left_out(bucket: BucketHandle, client: Client) -> None:
    shard = bucket.object("a.tar")
    shard.put(archive(("1", b"one"), ("2", b"")))
    wanted: list[batch.Wanted] = [(shard.uri, "1"), (shard.uri, "none"), bucket.object("none").uri, (shard.uri, "2")]
    with pytest.raises(MemberNotFound):
        list(client.read_batch(wanted))
    with pytest.raises(ObjectNotFound):
        list(client.read_batch(wanted[2:]))
    assert list(client.read_batch(wanted, missing="skip")) == [
        BatchItem(shard.uri, "1", b"one"),
        BatchItem(shard.uri, "2", b""),
    ]
    with pytest.raises(BadRequest):
        list(client.read_batch([(shard.uri, "")]))


def test_members_as_a_shard_of_their_own(bucket: BucketHandle) -> None:
    shard = bucket.object("a.tar")
    shard.put(archive(("1.txt", b"one"), ("2.txt", b"two"), ("3.txt", b"three")))
    with (
        shard.open_members(["3.txt", "none", "1.txt"], missing="skip") as file,
        tarfile.open(fileobj=file, mode="r|") as few,
    ):
        assert [(info.name, few.extractfile(info).read()) for info in few] == [  # type: ignore[union-attr]
            ("3.txt", b"three"),
            ("1.txt", b"one"),
        ]
    with pytest.raises(MemberNotFound):
        shard.open_members(["none"])


def test_a_batch_that_is_cut_goes_on_with_what_is_left(scripted: Build) -> None:
    whole = archive(("ais/bkt/s/1", b"1" * 600), ("ais/bkt/s/2", b"2" * 600), ("ais/bkt/s/3", b"3" * 600))
    rest = archive(("ais/bkt/s/2", b"2" * 600), ("ais/bkt/s/3", b"3" * 600))
    cut = b"!" + answer("200 OK", whole)[: -len(whole) + 2000]
    node, client = scripted(cut, answer("200 OK", rest))
    found = list(client.read_batch([("ais://bkt/s", name) for name in "123"]))
    assert [item.data[:1] + item.data[-1:] for item in found] == [b"11", b"22", b"33"]
    assert b'"members":["1","2","3"]' in node.requests[0]
    assert b'"members":["2","3"]' in node.requests[1]


def test_a_batch_that_is_cut_again_and_again_raises(scripted: Build) -> None:
    whole = archive(("ais/bkt/s/1", b"1" * 600))
    cut = b"!" + answer("200 OK", whole)[: -len(whole) + 700]
    node, client = scripted(*[cut] * batch.TRIES)
    with pytest.raises(TruncatedBody):
        list(client.read_batch([("ais://bkt/s", "1")]))
    assert len(node.requests) == batch.TRIES


@pytest.mark.parametrize(
    "given", [archive(("ais/bkt/s/2", b"")), archive(), archive(("ais/bkt/s/1", b""), ("ais/bkt/s/1", b""))]
)
def test_another_answer_than_what_was_asked_for_is_an_error(scripted: Build, given: bytes) -> None:
    _, client = scripted(answer("200 OK", given))
    with pytest.raises(ServerError):
        list(client.read_batch([("ais://bkt/s", "1")]))


def test_a_tar_without_its_end_is_cut_where_items_are_missing(scripted: Build) -> None:
    """Were a node's length wrong, the archive's own end would still tell."""
    _, client = scripted(*[answer("200 OK")] * batch.TRIES)
    with pytest.raises(TruncatedBody):
        list(client.read_batch([("ais://bkt/s", "1")]))
    node, client = scripted(answer("200 OK", archive(("ais/bkt/s/1", b""))[:512]))
    assert list(client.read_batch([("ais://bkt/s", "1")])) == [BatchItem("ais://bkt/s", "1", b"")]
    assert len(node.requests) == 1
