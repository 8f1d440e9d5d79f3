"""Large objects on their way through a node to a store: what is left there of those that did not come to their end."""

import re
import socket
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.emulators import Emulator, make_moto_bucket
from shardmill.testing.node import RunningNode, running_node
from tests.etl.over_http import Served as Asking
from tests.server.readers import wait_until
from tests.storage.cache.support import MIB, make

SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4"}
SIZE = 60 * MIB  # several parts


@pytest.fixture
def bucket(moto: Emulator, tmp_path: Path) -> str:
    name = make_moto_bucket(moto)
    (tmp_path / "node.toml").write_text(
        f'[[bucket]]\nuri = "s3://{name}"\nendpoint = "{moto.endpoint}"\naccess_key_id = "name"\n'
        'secret_access_key = "secret"\nwritable = true\n'
    )
    return name


def serve(tmp_path: Path) -> AbstractContextManager[RunningNode]:
    return running_node("--config", tmp_path / "node.toml", data=tmp_path / "data")


def unfinished(moto: Emulator, bucket: str) -> list[str]:
    """Uploads in parts that were begun and neither ended nor given up."""
    return re.findall("<UploadId>([^<]+)", moto.request("GET", f"/{bucket}?uploads", SIGNED).decode())


def begin(node: RunningNode, bucket: str, data: bytes) -> socket.socket:
    """Send most of an object."""
    sock = socket.create_connection(Asking(node).address, timeout=60)
    sock.sendall(
        f"PUT /o/s3/{bucket}/object HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    )
    sock.sendall(data[: SIZE * 3 // 4])
    return sock


def test_what_a_sender_leaves_behind_is_removed_at_the_store(moto: Emulator, bucket: str, tmp_path: Path) -> None:
    old, new = make(MIB, 1), make(SIZE, 2)
    with serve(tmp_path) as node, Client(node.endpoint) as client:
        handle = client.object(f"s3://{bucket}/object")
        handle.put(old)
        with begin(node, bucket, new):
            wait_until(lambda: bool(unfinished(moto, bucket)), "no upload in parts was begun")
        wait_until(lambda: not unfinished(moto, bucket), "the upload in parts is left")
        assert handle.read() == old
        fetched = client.cache().buckets[0].fetched
        handle.put(new)
        assert handle.read() == new
        assert client.cache().buckets[0].fetched == fetched
        assert unfinished(moto, bucket) == []


def test_a_node_that_is_killed_while_parts_arrive_leaves_the_old_object(
    moto: Emulator, bucket: str, tmp_path: Path
) -> None:
    """Here and at the store; the parts that lie there are the store's to remove, as the docs say."""
    old, new = make(MIB, 1), make(SIZE, 2)
    with serve(tmp_path) as node, Client(node.endpoint) as client:
        handle = client.object(f"s3://{bucket}/object")
        handle.put(old)
        assert handle.read() == old
        with begin(node, bucket, new):
            wait_until(lambda: bool(unfinished(moto, bucket)), "no upload in parts was begun")
            node.kill()
    assert moto.request("GET", f"/{bucket}/object", SIGNED) == old
    with serve(tmp_path) as node, Client(node.endpoint) as client:
        handle = client.object(f"s3://{bucket}/object")
        assert handle.read() == old
        handle.put(new)
        assert handle.read() == new
    assert moto.request("GET", f"/{bucket}/object", SIGNED) == new
