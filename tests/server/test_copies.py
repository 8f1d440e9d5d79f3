"""`POST /api/objects/copy`: by the store behind a bucket, or through the node; the old object stays where it fails."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.core.errors import (
    BackendDenied,
    BackendUnavailable,
    BadRequest,
    BucketNotFound,
    BucketReadOnly,
    Conflict,
    ObjectNotFound,
    PreconditionFailed,
    ShardmillError,
)
from shardmill.testing.faults import Fault, FaultServer, MadeUp, Served, fault_server
from shardmill.testing.node import RunningNode, running_node
from tests.server.readers import wait_until
from tests.server.wire import Wire
from tests.storage.cache.support import MIB, make
from tests.storage.cache.test_faults import CONFIG

CLOUDS = ["s3", "gs", "az"]
DATA = make(5 * MIB + 7)  # more than is verified or read at once


@pytest.fixture
def store() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.fixture
def config(store: FaultServer, tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    text = CONFIG.format(endpoint=store.endpoint).replace('endpoint = "', 'writable = true\nendpoint = "')
    path.write_text(f'{text}\n[[bucket]]\nuri = "ais://pool"\n')
    return path


@pytest.fixture
def node(config: Path, tmp_path: Path) -> Iterator[RunningNode]:
    with running_node("--config", config, "--workers", "1", data=tmp_path / "data") as found:
        yield found


@pytest.fixture
def far(node: RunningNode) -> Iterator[Client]:
    with Client(node.endpoint) as found:
        yield found


@pytest.mark.parametrize("target", ["ais://pool/copy", "ais://notes/folder/copy"])
def test_bytes_metadata_and_checksum_go_along_between_local_buckets(wire: Wire, target: str) -> None:
    with Client(wire.node.endpoint) as client:
        source = client.object("ais://pool/the source")
        put = source.put(DATA, meta={"who": "me"})
        made = source.copy_to(target)
        copy = client.object(target)
        assert (made.created, made.size) == (True, len(DATA))
        assert (copy.read(), dict(copy.head().user)) == (DATA, {"who": "me"})
        source.put(b"other")
        again = source.copy_to(copy)
        assert (again.created, copy.read()) == (False, b"other")
        client.object(target).copy_to(source)
        assert source.read() == b"other"
        if target.startswith("ais://pool"):
            assert made.checksum == put.checksum is not None
        copy.delete()


def test_a_directory_is_copied_from_and_an_empty_object_too(wire: Wire, shards: Path) -> None:
    with Client(wire.node.endpoint) as client:
        shard = "imagenet-val-000000.tar"
        client.object(f"gs://sharded-imagenet/{shard}").copy_to("ais://pool/shard")
        assert client.object("ais://pool/shard").read() == (shards / shard).read_bytes()
        client.object("ais://pool/empty").put(b"")
        assert client.object("ais://pool/empty").copy_to("ais://pool/shard").size == 0
        assert client.object("ais://pool/shard").read() == b""


@pytest.mark.parametrize(
    ("source", "target", "if_absent", "error", "status"),
    [
        ("ais://pool/none", "ais://pool/kept", False, ObjectNotFound, 404),
        ("ais://nobodys/x", "ais://pool/kept", False, BucketNotFound, 404),
        ("ais://pool/given", "ais://nobodys/x", False, BucketNotFound, 404),
        ("ais://pool/given", "gs://sharded-imagenet/x", False, BucketReadOnly, 403),
        ("ais://pool/given", "ais://pool/kept", True, PreconditionFailed, 412),
        ("ais://pool/given", "ais://pool/given", False, BadRequest, 400),
        ("ais://pool/given", "no uri", False, BadRequest, 400),
        ("ais://pool/given", "ais://notes/../kept", False, BadRequest, 400),
    ],
)
def test_what_cannot_be_copied_is_refused_and_changes_nothing(
    wire: Wire, source: str, target: str, if_absent: bool, error: type[ShardmillError], status: int
) -> None:
    wire.put("/o/ais/pool/given", b"given")
    wire.put("/o/ais/pool/kept", b"kept")
    wanted = {"source": source, "destination": target, "if_absent": if_absent}
    answer = wire.post_json("/api/objects/copy", wanted)
    assert (answer.status, answer.code) == (status, error.code)
    assert wire.get("/o/ais/pool/kept").body == b"kept"


def test_a_request_is_taken_strictly(wire: Wire) -> None:
    for wanted in ({"source": "ais://pool/x"}, {"source": "ais://pool/x", "destination": "ais://pool/y", "more": 1}):
        assert wire.post_json("/api/objects/copy", wanted).status == 400


@pytest.mark.parametrize("provider", CLOUDS)
def test_within_a_bucket_of_a_cloud_no_byte_comes_here(store: FaultServer, far: Client, provider: str) -> None:
    store.put("/bucket/dir/a b", DATA)
    store.put("/bucket/old", b"old")
    target = far.object(f"{provider}://bucket/old")
    assert target.read() == b"old"
    store.forget()
    made = far.object(f"{provider}://bucket/dir/a b").copy_to(target)
    assert (made.created, made.size) == (False, len(DATA))
    assert store.asked("GET") == []
    assert [request.body for request in store.asked("PUT")] == [b""]
    assert store.objects()["/bucket/old"].data == DATA
    # What was cached of the old version is not served.
    assert target.read() == DATA
    assert far.object(f"{provider}://bucket/dir/a b").copy_to(f"{provider}://bucket/new").created


def test_if_absent_is_judged_by_the_store_itself(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", DATA)
    far.object("s3://bucket/a").copy_to("s3://bucket/b", if_absent=True)
    (request,) = store.asked("PUT")
    assert (request.headers["if-none-match"], request.body) == ("*", DATA)


def test_between_stores_bytes_pass_through(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", DATA)
    far.object("ht://bucket/a").copy_to("ais://pool/a")
    assert far.object("ais://pool/a").read() == DATA
    far.object("ais://pool/a").copy_to("gs://bucket/b")
    assert store.objects()["/bucket/b"].data == DATA
    far.object("gs://bucket/b").copy_to("s3://bucket/c")
    assert store.objects()["/bucket/c"].data == DATA


def test_a_copy_that_the_store_refuses_leaves_the_old_object(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", DATA)
    store.put("/bucket/old", b"old")
    store.misbehave("/bucket/old", Fault("status", status=500, methods=("PUT",)))
    target = far.object("s3://bucket/old")
    assert target.read() == b"old"
    with pytest.raises(BackendUnavailable):
        far.object("s3://bucket/a").copy_to(target)
    assert target.read() == b"old"
    store.forget()
    far.object("s3://bucket/a").copy_to(target)
    assert target.read() == DATA


def test_a_copy_that_was_made_though_the_store_did_not_say_so_is_seen(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", DATA)
    store.put("/bucket/old", b"old")
    store.misbehave("/bucket/old", Fault("silent", methods=("PUT",)))
    target = far.object("s3://bucket/old")
    assert target.read() == b"old"
    with pytest.raises(BackendUnavailable):
        far.object("s3://bucket/a").copy_to(target)
    assert target.read() == DATA


def test_what_is_too_large_for_the_store_to_copy_passes_through(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", Served(MadeUp((1 << 30) + 1), etag="large"))
    store.misbehave("/bucket/a", Fault("status", status=403))
    with pytest.raises(BackendDenied):
        far.object("s3://bucket/a").copy_to("s3://bucket/b")
    assert store.asked("GET", "/bucket/a") != []
    assert store.asked("PUT") == []


def test_a_source_that_is_replaced_amid_a_copy_leaves_the_old_object(store: FaultServer, far: Client) -> None:
    store.put("/bucket/a", DATA)
    store.misbehave("/bucket/a", Fault("cut", at=3 * MIB, times=1, replacement=Served(make(len(DATA), 1))))
    target = far.object("ais://pool/old")
    target.put(b"old")
    with pytest.raises(Conflict):
        far.object("ht://bucket/a").copy_to(target)
    assert target.read() == b"old"


def test_a_node_that_is_killed_amid_a_copy_leaves_the_old_object(
    store: FaultServer, config: Path, tmp_path: Path
) -> None:
    config.write_text(config.read_text().replace('idle_timeout = "0.5s"', 'idle_timeout = "60s"'))
    store.put("/bucket/a", DATA)
    store.misbehave("/bucket/a", Fault("stall", at=3 * MIB))
    failed: list[BaseException] = []
    with running_node("--config", config, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        client.object("ais://pool/old").put(b"old")

        def copy() -> None:
            try:
                client.object("ht://bucket/a").copy_to("ais://pool/old")
            except ConnectionError as error:
                failed.append(error)

        copying = threading.Thread(target=copy)
        copying.start()
        wait_until(lambda: store.bytes_sent >= 3 * MIB, "nothing was read of the source")
        node.kill()
        copying.join(30)
        assert len(failed) == 1
    with running_node("--config", config, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        assert client.object("ais://pool/old").read() == b"old"
