"""A node before an origin that counts: one fetch for all, blocks for a range, one version an answer, and kills."""

import hashlib
import http.client
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.faults import Fault, FaultServer, MadeUp, Served, fault_server
from shardmill.testing.node import RunningNode, running_node
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.server.readers import wait_until
from tests.storage.cache.support import MIB, disk_use, make
from tests.storage.cache.test_node import make_shard
from tests.storage.full_disk import small_disk

READERS = 200
MEMORY = 512 << 20  # bytes; what answers to all readers would take is twelve times as much


@dataclass(frozen=True)
class Size:
    """How much a promise is tried with; in full size by `tests/emulators`."""

    members: int
    """Of a shard, half a MiB each."""
    objects: int
    """That are read through a small disk."""
    object: int
    """Bytes of each."""
    disk: int


SOME = Size(members=64, objects=24, object=4 * MIB, disk=48 * MIB)
FULL = Size(members=128, objects=64, object=32 * MIB, disk=256 * MIB)


@pytest.fixture
def size() -> Size:
    return SOME


@pytest.fixture
def origin() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.fixture
def node(origin: FaultServer, tmp_path: Path) -> Iterator[RunningNode]:
    with running_node(*flags(origin), data=tmp_path / "data") as found:
        yield found


def flags(origin: FaultServer, *more: str) -> tuple[str, ...]:
    return ("--bucket", f"gs://far={origin.endpoint}/shards", "--workers", "2", *more)


def configured(origin: FaultServer, directory: Path, text: str) -> tuple[str, ...]:
    """Flags of a node before the origin as an S3 bucket `far`."""
    path = directory / "node.toml"
    path.write_text(
        f'[[bucket]]\nuri = "s3://far"\nendpoint = "{origin.endpoint}"\naccess_key_id = "name"\n'
        f'secret_access_key = "secret"\n{text}'
    )
    return ("--config", str(path), "--workers", "2")


def digest_of(node: RunningNode, target: str) -> tuple[int, str]:
    """Status and hash of an answer, read piece by piece."""
    connection = http.client.HTTPConnection(*Asking(node).address, timeout=120)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        hasher = hashlib.blake2b()
        while piece := response.read(1 << 20):
            hasher.update(piece)
        return response.status, hasher.hexdigest()
    finally:
        connection.close()


def peak_memory(node: RunningNode) -> int:
    for line in Path(f"/proc/{node.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def test_two_hundred_readers_of_a_cold_shard_cause_one_fetch(
    origin: FaultServer, node: RunningNode, size: Size
) -> None:
    """Half of them raw, half through a transform; what they take of memory does not grow with their number."""
    shard = make_shard(size.members, 512 << 10)
    origin.put("/shards/a.tar", shard)
    transform = Asking(node).register(IDENTITY, decoder=None)
    targets = ("/o/gs/far/a.tar", f"/t/gs/far/{transform.uuid},seed=1~a.tar")
    with ThreadPoolExecutor(READERS) as threads:
        answers = list(threads.map(lambda number: digest_of(node, targets[number % 2]), range(READERS)))
    assert set(answers[::2]) == {(200, hashlib.blake2b(shard).hexdigest())}
    assert len(set(answers[1::2])) == 1
    assert answers[1][0] == 200
    assert len(origin.asked("GET")) == 1
    wait_until(lambda: origin.bytes_sent == len(shard), "the origin has counted what it sent")
    assert peak_memory(node) < MEMORY


def test_a_range_of_a_huge_object_fetches_its_blocks(origin: FaultServer, node: RunningNode) -> None:
    data = MadeUp(1 << 30)
    start, size = 700 * MIB + 12_345, len(data)
    origin.put("/shards/huge", Served(data, "v1"))
    with Client(node.endpoint) as client:
        handle = client.object("gs://far/huge")
        assert handle.get_range(start, start + MIB) == data[start : start + MIB]
        wait_until(lambda: origin.bytes_sent == 2 * MIB, "the rest of the blocks is sent")
        wait_until(lambda: handle.cached().ranges == [(700 * MIB, 702 * MIB)], "two blocks are there")
        # What is read on from there fetches no more than it has to.
        assert handle.get_range(start + MIB, start + 2 * MIB) == data[start + MIB : start + 2 * MIB]
        wait_until(lambda: origin.bytes_sent == 3 * MIB, "the rest of the blocks is sent")
        assert handle.get_range(size - 10, size + 10) == data[size - 10 :]
        wait_until(lambda: origin.bytes_sent == 4 * MIB, "the rest of the blocks is sent")


def test_a_small_disk_is_read_through_by_more_than_it_holds(origin: FaultServer, tmp_path: Path, size: Size) -> None:
    """Twice in random order by several: right bytes, use under the watermark, and what is pinned stays."""
    names = [str(number) for number in range(size.objects)]
    objects = {name: MadeUp(size.object + 1000 * number, number + 1) for number, name in enumerate(names)}
    for name, data in objects.items():
        origin.put(f"/far/{name}", Served(data, f"v{name}"))
    pinned = MadeUp(size.object)
    origin.put("/kept/pinned", Served(pinned, "v1"))
    kept = f'[[bucket]]\nuri = "ht://kept"\nbacking = "{origin.endpoint}/kept"\npin = true\n'
    given = configured(origin, tmp_path, kept)
    order = [name for _ in range(2) for name in random.Random(1).sample(names, len(names))]
    with small_disk(tmp_path / "disk", f"{size.disk >> 20}m") as is_real:
        room = {} if is_real else {"SHARDMILL_CACHE_CAPACITY": str(size.disk)}
        data_directory = tmp_path / "disk" / "data"
        with running_node(*given, data=data_directory, environ=room) as node, Client(node.endpoint) as client:
            assert client.object("ht://kept/pinned").read() == pinned[:]
            cache = client.cache()
            assert cache.high <= size.disk * 9 // 10
            others = taken(tmp_path / "disk") - cache.used
            most = []

            def read(names: list[str]) -> None:
                for name in names:
                    assert digest_of(node, f"/o/s3/far/{name}") == (200, hashlib.blake2b(objects[name][:]).hexdigest())
                    most.append(client.cache().used)
                    if is_real:
                        most.append(taken(tmp_path / "disk") - others)

            with ThreadPoolExecutor(3) as threads:
                for future in [threads.submit(read, order[number::3]) for number in range(3)]:
                    future.result()
            assert len(most) >= 2 * len(names)
            # What else the node writes down meanwhile is little.
            assert max(most) <= cache.high + MIB
            far = next(bucket for bucket in client.cache().buckets if bucket.bucket == "s3://far")
            assert far.evicted > len(names) // 2
            origin.forget()
            assert client.object("ht://kept/pinned").read() == pinned[:]
            assert origin.bytes_sent == 0


def taken(disk: Path) -> int:
    """Bytes of a file system."""
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize("kind", ["raw", "range", "transformed"])
def test_an_object_that_is_replaced_while_it_arrives_gives_one_version(
    origin: FaultServer, node: RunningNode, kind: str
) -> None:
    """The origin breaks off and has another one when it is asked for the rest."""
    old, new = make_shard(8, MIB), make_shard(9, MIB - 512)
    transform = Asking(node).register(IDENTITY, decoder=None)
    target = f"/t/gs/far/{transform.uuid},seed=1~a.tar" if kind == "transformed" else "/o/gs/far/a.tar"
    headers = {"Range": f"bytes={MIB}-{7 * MIB - 1}"} if kind == "range" else {}
    origin.put("/shards/a.tar", Served(old, "old"))
    origin.misbehave("/shards/a.tar", Fault("cut", at=3 * MIB + 100, times=1, replacement=Served(new, "new")))
    body = read_all(node, target, headers)
    versions = {"raw": (old, new), "range": (old[MIB : 7 * MIB], new[MIB : 7 * MIB])}
    if kind in versions:
        before, after = versions[kind]
        assert before.startswith(body) or body == after
    again = read_all(node, target, headers)
    if kind in versions:
        assert again == versions[kind][1]
    else:
        # Whole, and of the new one: it has samples that the old one had not.
        assert b"000008.cls" in again
        assert len(again) > len(body) or again == body
    assert Asking(node).ask("GET", "/o/gs/far/a.tar").body == new


def read_all(node: RunningNode, target: str, headers: dict[str, str]) -> bytes:
    """The body as far as it came."""
    connection = http.client.HTTPConnection(*Asking(node).address, timeout=60)
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        assert response.status in (200, 206, 409), response.status
        if response.status == 409:
            return b""
        return response.read()
    except http.client.IncompleteRead as error:
        return error.partial
    except ConnectionError:
        return b""
    finally:
        connection.close()


def test_policy_always_sees_a_replaced_object_at_once_by_one_request(origin: FaultServer, tmp_path: Path) -> None:
    old, new = make_shard(4, 1000), make_shard(5, 1000)
    origin.put("/far/a.tar", Served(old, "old"))
    with running_node(*configured(origin, tmp_path, 'revalidate = "always"\n'), data=tmp_path / "data") as node:
        asking = Asking(node)
        transform = asking.register(IDENTITY, decoder=None)
        made = f"/t/s3/far/{transform.uuid},seed=1~a.tar"
        assert asking.ask("GET", "/o/s3/far/a.tar").body == old
        first = asking.ask("GET", made)
        origin.forget()
        for target in ("/o/s3/far/a.tar", made):
            assert asking.ask("GET", target).status == 200
        assert [(asked.method, asked.path) for asked in origin.requests] == [("HEAD", "/far/a.tar")] * 2
        assert origin.bytes_sent == 0
        origin.put("/far/a.tar", Served(new, "new"))
        answer = asking.ask("GET", "/o/s3/far/a.tar")
        assert (answer.body, answer.headers["etag"]) == (new, '"new"')
        second = asking.ask("GET", made)
        assert b"000004.cls" in second.body
        assert b"000004.cls" not in first.body


def test_a_node_that_is_killed_while_it_stores_leaves_the_old_object(origin: FaultServer, tmp_path: Path) -> None:
    """Neither here nor at the origin, and what is cached of it is right."""
    old, new = make(3 * MIB, 1), make(2 * MIB, 2)
    origin.put("/far/a", Served(old, "old"))
    given = configured(origin, tmp_path, "writable = true\n")
    with running_node(*given, data=tmp_path / "data") as node:
        assert Asking(node).ask("GET", "/o/s3/far/a").body == old
        with socket.create_connection(Asking(node).address, timeout=60) as sock:
            sock.sendall(f"PUT /o/s3/far/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(new)}\r\n\r\n".encode())
            # A half of it has gone on to the node when it dies.
            sock.sendall(new[:MIB])
            node.kill()
    assert origin.objects()["/far/a"].data == old
    with running_node(*given, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        handle = client.object("s3://far/a")
        assert handle.read() == old
        handle.put(new)
        assert origin.objects()["/far/a"].data == new
        assert handle.read() == new
        wait_until(lambda: not client.cache().buckets[0].filling, "all has arrived")
        used = client.cache().used
        assert abs(disk_use(tmp_path / "data" / "cache") - used) <= 64 << 10


def has_evicted(client: Client, count: int) -> bool:
    return client.cache().buckets[0].evicted >= count


def test_a_node_that_is_killed_while_it_fills_and_evicts_serves_no_hole(origin: FaultServer, tmp_path: Path) -> None:
    objects = {f"{number}": make(5 * MIB + number, number) for number in range(6)}
    for name, data in objects.items():
        origin.put(f"/shards/{name}", Served(data, "v1"))
    room = {"SHARDMILL_CACHE_CAPACITY": "17MiB"}
    for _ in range(3):
        with running_node(*flags(origin), data=tmp_path / "data", environ=room) as node:
            ended = threading.Event()

            def read(first: int, node: RunningNode = node, ended: threading.Event = ended) -> None:
                number = first
                while not ended.is_set():
                    try:
                        body = Asking(node).ask("GET", f"/o/gs/far/{number % 6}").body
                    except (OSError, http.client.HTTPException):
                        return
                    assert body == objects[str(number % 6)]
                    number += 1

            with ThreadPoolExecutor(3) as threads:
                futures = [threads.submit(read, 2 * number) for number in range(3)]
                try:
                    with Client(node.endpoint) as client:
                        wait_until(partial(has_evicted, client, 4), "objects leave for others")
                    node.kill()
                finally:
                    ended.set()
                for future in futures:
                    future.result()
    with running_node(*flags(origin), data=tmp_path / "data", environ=room) as node, Client(node.endpoint) as client:
        cache = client.cache()
        assert abs(disk_use(tmp_path / "data" / "cache") - cache.used) <= MIB
        assert cache.used <= cache.high
        for name, data in objects.items():
            assert client.object(f"gs://far/{name}").read() == data
