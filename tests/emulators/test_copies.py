"""Copies within a bucket of S3: the store makes them, and not a byte of the object comes to the node."""

from pathlib import Path

import msgspec
import pytest

from shardmill.client import Client
from shardmill.core.api import CacheInfo
from shardmill.core.errors import ObjectNotFound, PreconditionFailed
from shardmill.testing.emulators import Emulator, make_moto_bucket
from shardmill.testing.node import running_node
from tests.emulators.test_uploads import SIGNED
from tests.server.readers import get
from tests.storage.cache.support import MIB, make


def fetches(client: Client) -> int:
    """Reads of the store so far."""
    (found,) = msgspec.json.decode(get(f"{client.endpoint}/api/cache").body, type=CacheInfo).buckets
    return found.fetches


def test_the_store_copies_and_the_next_reader_has_it(moto: Emulator, tmp_path: Path) -> None:
    name = make_moto_bucket(moto)
    (tmp_path / "node.toml").write_text(
        f'[[bucket]]\nuri = "s3://{name}"\nendpoint = "{moto.endpoint}"\naccess_key_id = "name"\n'
        'secret_access_key = "secret"\nwritable = true\n'
    )
    data = make(9 * MIB + 1, 3)
    with running_node("--config", tmp_path / "node.toml", data=tmp_path / "data") as node:
        with Client(node.endpoint) as client:
            source, target = (client.object(f"s3://{name}/{key}") for key in ("dir/a b+é", "old"))
            source.put(data, meta={"who": "me"})
            target.put(b"old")
            assert target.read() == b"old"
            before = fetches(client)
            made = source.copy_to(target)
            assert (made.created, made.size) == (False, len(data))
            assert fetches(client) == before
            assert moto.request("GET", f"/{name}/old", SIGNED) == data
            assert (target.read(), dict(target.head().user)) == (data, {"who": "me"})
            assert source.copy_to(f"s3://{name}/new").created
            with pytest.raises(PreconditionFailed):
                source.copy_to(target, if_absent=True)
            with pytest.raises(ObjectNotFound):
                client.object(f"s3://{name}/none").copy_to(target)
            assert target.read() == data
