"""A node before a store that misbehaves: right bytes or an error, never a shorter or mixed object, and well afterwards."""

import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.testing.faults import Fault, FaultServer, Served, fault_server
from shardmill.testing.node import RunningNode, running_node
from tests.etl.judges import tarfile_is_content
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.storage.cache.support import make
from tests.storage.cache.test_node import make_shard

SHARD = make_shard(6, 500_000)  # long enough to be received by threads
OTHER = make_shard(7, 500_000)

CONFIG = """
[origins]
connect_timeout = "2s"
idle_timeout = "0.5s"
retries = 2
backoff = "0.01s"
max_backoff = "0.02s"

[cache]
absent = "0s"
listing = "0s"

[[bucket]]
uri = "s3://bucket"
endpoint = "{endpoint}"
access_key_id = "name"
secret_access_key = "secret"

[[bucket]]
uri = "gs://bucket"
endpoint = "{endpoint}"
token = "token"

[[bucket]]
uri = "az://bucket"
endpoint = "{endpoint}"
account = "account"
account_key = "c2VjcmV0"

[[bucket]]
uri = "ht://bucket"
backing = "{endpoint}/bucket"
"""

FAULTS = {
    "refused": [Fault("status", status=403)],
    "unknown": [Fault("status", status=401)],
    "busy once": [Fault("status", times=1)],
    "busy": [Fault("status")],
    "too many": [Fault("status", status=429)],
    "broken": [Fault("status", status=500)],
    "silent": [Fault("silent")],
    "elsewhere": [Fault("redirect", location="http://169.254.169.254/latest")],
    "page": [Fault("html")],
    "chunked": [Fault("chunked")],
    "unending": [Fault("unending")],
    "no etag": [Fault("no_etag")],
    "no version": [Fault("no_etag"), Fault("no_modified")],
    "weak etag": [Fault("weak_etag")],
    "no ranges": [Fault("no_ranges")],
    "wrong range": [Fault("wrong_range")],
    "gzip": [Fault("gzip")],
    **{
        f"{kind} {'once ' if times else ''}at {at}": [Fault(kind, at=at, times=times)]
        for kind in ("cut", "stall")
        for times in (1, None)
        for at in (0, 700_000, len(SHARD) - 1)
    },
    **{
        f"replaced at {at}": [Fault("cut", at=at, times=1, replacement=Served(OTHER))] for at in (0, 700_000, len(SHARD) - 1)
    },
}  # fmt: skip


@pytest.fixture
def store() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.fixture
def node(store: FaultServer, tmp_path: Path) -> Iterator[RunningNode]:
    (tmp_path / "node.toml").write_text(CONFIG.format(endpoint=store.endpoint))
    with running_node("--config", tmp_path / "node.toml", "--workers", "1", data=tmp_path / "data") as found:
        yield found


def ask(node: RunningNode, target: str, **headers: str) -> tuple[int, bytes, bool]:
    """Status, body, and whether the body came to its end; within a minute, or the test fails."""
    connection = http.client.HTTPConnection(*Asking(node).address, timeout=60)
    try:
        connection.request("GET", target, headers=headers)
        try:
            answer = connection.getresponse()
        except ConnectionError:
            return 0, b"", False
        try:
            return answer.status, answer.read(), True
        except http.client.IncompleteRead as error:
            return answer.status, error.partial, False
        except ConnectionError:
            return answer.status, b"", False
    finally:
        connection.close()


@pytest.mark.parametrize("provider", ["s3", "gs", "az", "http"])
@pytest.mark.parametrize("phase", ["raw", "range", "transform"])
def test_a_fault_gives_right_bytes_or_an_error_and_nothing_is_left_of_it(
    store: FaultServer, node: RunningNode, provider: str, phase: str
) -> None:
    transform = Asking(node).register(IDENTITY, decoder=None).uuid
    headers = {"Range": "bytes=100000-899999"} if phase == "range" else {}

    def path(name: str) -> str:
        if phase == "transform":
            return f"/t/{provider}/bucket/{transform},seed=1~{name}"
        return f"/o/{provider}/bucket/{name}"

    rights = {}
    for name, data in (("shard.tar", SHARD), ("other.tar", OTHER)):
        store.put(f"/bucket/{name}", data)
        status, rights[data], is_whole = ask(node, path(name), **headers)
        assert status in (200, 206)
        assert is_whole
        assert phase == "transform" or rights[data] == (data[100_000:900_000] if headers else data)
    for number, (fault, faults) in enumerate(FAULTS.items()):
        name = f"{number}.tar"
        store.put(f"/bucket/{name}", SHARD)
        store.misbehave(f"/bucket/{name}", *faults)
        status, body, is_whole = ask(node, path(name), **headers)
        if status not in (200, 206):
            assert status in (0, 403, 409, 502, 503, 504), (fault, status, body)
        elif is_whole:
            assert body in rights.values(), fault
        else:
            assert any(right.startswith(body) for right in rights.values()), fault
            assert phase == "range" or not tarfile_is_content(body), fault
        store.misbehave(f"/bucket/{name}")
        now = store.objects()[f"/bucket/{name}"].data[:]
        status, body, is_whole = ask(node, path(name), **headers)
        assert (status, is_whole) == (206 if phase == "range" else 200, True), (fault, body[:500])
        assert body == rights[now], fault


@pytest.mark.parametrize("provider", ["s3", "gs", "az"])
def test_a_listing_is_whole_or_an_error(store: FaultServer, node: RunningNode, provider: str) -> None:
    names = [f"{number:03d}" for number in range(60)]
    for name in names:
        store.put(f"/bucket/{name}", make(5))
    query = "restype=container&comp=list" if provider == "az" else "list-type=2"
    with urllib.request.urlopen(f"{store.endpoint}/bucket?{query}", timeout=60) as answer:
        size = len(answer.read())
    faults = FAULTS | {
        f"{kind} {'once ' if times else ''}at {at} of {size}": [Fault(kind, at=at, times=times)]
        for kind in ("cut", "stall")
        for times in (1, None)
        for at in (size // 2, size - 1)
    }
    target = f"/api/objects?bucket={provider}://bucket"
    for fault, given in faults.items():
        store.misbehave("*", *given)
        status, body, is_whole = ask(node, target)
        assert is_whole, fault
        assert status in (403, 502, 503, 504) or (status == 200 and listed(body) == names), (fault, status, body)
        store.misbehave("*")
        status, body, is_whole = ask(node, target)
        assert (status, is_whole) == (200, True), (fault, body)
        assert listed(body) == names, fault


def listed(body: bytes) -> list[str]:
    return [found["key"] for found in json.loads(body)["objects"]]
