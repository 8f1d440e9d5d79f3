"""Many members of a shard by one iteration."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import BucketHandle, Client
from shardmill.client.batches import AHEAD
from shardmill.core.errors import Conflict, MemberNotFound, ObjectNotFound
from tests.client.scripted import Build, answer

COUNT = 5 * AHEAD + 3


def shard_of(text: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(COUNT):
            member = tarfile.TarInfo(f"{number:04d}.txt")
            payload = f"{text} {number} ".encode() * number
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return file.getvalue()


@pytest.fixture
def bucket(client: Client) -> Iterator[BucketHandle]:
    handle = client.bucket("ais://batches")
    handle.create()
    yield handle
    handle.remove(force=True)


def test_members_come_in_the_order_of_their_names_over_one_connection(bucket: BucketHandle, client: Client) -> None:
    shard = bucket.object("shard.tar")
    shard.put(shard_of("text"))
    names = [f"{number:04d}.txt" for number in [*range(COUNT - 1, -1, -3), 7, 7]]
    found = list(shard.read_members(names))
    assert [name for name, _ in found] == names
    assert all(payload == f"text {int(name[:4])} ".encode() * int(name[:4]) for name, payload in found)
    assert list(shard.read_members([])) == []
    assert [name for name, _ in shard.read_members(member.name for member in shard.members())] == sorted(
        f"{number:04d}.txt" for number in range(COUNT)
    )
    assert client.buckets()


def test_all_members_of_a_real_shard_are_its_files(client: Client, shards: Path) -> None:
    name = "imagenet-train-000000.tar"
    with tarfile.open(shards / name) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
    assert dict(client.object(f"gs://sharded-imagenet/{name}").read_members(files)) == files


def test_an_iteration_that_is_left_leaves_no_answers_to_the_next_request(bucket: BucketHandle) -> None:
    shard = bucket.object("shard.tar")
    shard.put(shard_of("text"))
    members = shard.read_members(f"{number:04d}.txt" for number in range(COUNT))
    assert next(members)[0] == "0000.txt"
    assert next(members)[0] == "0001.txt"
    members.close()  # type: ignore[attr-defined]
    assert shard.member("0003.txt").read() == b"text 3 " * 3


def test_what_does_not_exist_is_said_where_it_comes(bucket: BucketHandle) -> None:
    shard = bucket.object("shard.tar")
    shard.put(shard_of("text"))
    members = shard.read_members(["0001.txt", "0002.txt", "none.txt", "0003.txt"])
    assert [next(members)[0], next(members)[0]] == ["0001.txt", "0002.txt"]
    with pytest.raises(MemberNotFound, match=r"none\.txt"):
        next(members)
    with pytest.raises(ObjectNotFound):
        next(bucket.object("nothing.tar").read_members(["a"]))


def test_members_of_two_versions_of_a_shard_do_not_come_from_one_iteration(bucket: BucketHandle) -> None:
    shard = bucket.object("shard.tar")
    shard.put(shard_of("old"))
    members = shard.read_members(f"{number:04d}.txt" for number in range(1, COUNT))
    assert next(members)[1] == b"old 1 "
    shard.put(shard_of("new"))
    with pytest.raises(Conflict, match="was replaced while its members were read"):
        for name, payload in members:
            assert payload == f"old {int(name[:4])} ".encode() * int(name[:4])


def test_a_connection_that_ends_between_members_is_replaced(scripted: Build) -> None:
    def member(body: bytes, offset: int) -> bytes:
        return answer("200 OK", body, f'ETag: "v-{offset}"')

    # A busy node, one that closes behind an answer, one that is cut in it: each time the rest is asked for again.
    busy = answer("503 Service Unavailable", b'{"code":"busy","message":"m","request_id":"r"}', "Retry-After: 0")
    node, client = scripted(
        member(b"a", 1),
        busy, member(b"b", 2),
        b"!" + member(b"c", 3),
        b"!" + member(b"dd", 4)[:-1], member(b"dd", 4),
        member(b"e", 5),
    )  # fmt: skip
    # One name at a time, since the script's node answers what comes at once but once.
    shard = client.object("ais://bkt/shard.tar")
    found = [next(iter(shard.read_members([name])))[1] for name in "abcde"]
    assert found == [b"a", b"b", b"c", b"dd", b"e"]
    assert all(b"GET /o/ais/bkt/shard.tar?member=" in request for request in node.requests)
