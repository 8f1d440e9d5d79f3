"""A shard read with urllib and tarfile: all of it, or an error that says why."""

import socket
import tarfile
from pathlib import Path

import pytest

from shardmill.cli.plain_reading import PlainShard
from shardmill.client import Client, NodeUnreachable, TruncatedBody
from shardmill.core.errors import ObjectNotFound, TransformFailed

IMAGENET = "gs://sharded-imagenet"
SHARD = "imagenet-train-000000.tar"


def test_samples_are_those_of_the_archive(client: Client, shards: Path) -> None:
    expected: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shards / SHARD) as archive:
        for member in archive:
            payload = archive.extractfile(member)
            if payload is not None:
                key, field = member.name.split(".", 1)
                expected.setdefault(key, {})[field] = payload.read()
    reader = PlainShard(client.object_url(IMAGENET, SHARD))

    assert {sample.key: sample.fields for sample in reader.samples()} == expected
    assert reader.received == (shards / SHARD).stat().st_size
    assert reader.first_byte is not None


def test_an_answer_that_is_an_error_is_raised_as_one(client: Client) -> None:
    with pytest.raises(ObjectNotFound, match=r"missing\.tar"):
        list(PlainShard(client.object_url(IMAGENET, "missing.tar")).samples())


def test_nobody_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(NodeUnreachable, match=rf"127\.0\.0\.1:{port}/o/ais/a/b"):
        list(PlainShard(f"http://127.0.0.1:{port}/o/ais/a/b").samples())


@pytest.mark.parametrize(("failing", "raised"), [(0, TransformFailed), (5, TruncatedBody)])
def test_a_transform_that_fails_never_looks_like_a_short_shard(
    client: Client, tmp_path: Path, failing: int, raised: type[Exception]
) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "def fail_on(sample, key):\n    if sample['__key__'] == key:\n        raise ValueError('bad luck')\n    return sample\n"
    )
    keys = [sample.key for sample in PlainShard(client.object_url(IMAGENET, SHARD)).samples()]
    info = client.transforms.add(f"{source}:fail_on", args={"key": keys[failing]})
    received = []

    with pytest.raises(raised) as caught:
        for sample in PlainShard(client.object_url(IMAGENET, SHARD, info.uuid)).samples():
            received.append(sample.key)

    assert received == keys[: len(received)]
    assert len(received) <= failing
    if raised is TransformFailed:
        assert "bad luck" in str(caught.value)
