"""A node before a web server: raw and transformed, by many at once, while it arrives, cut and killed."""

import http.client
import io
import queue
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardmill.testing.node import RunningNode, running_node
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.storage.cache.support import MIB, make
from tests.storage.cache.web import Served, Web, web

SAMPLES = 40


def make_shard(samples: int, size: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for ordinal in range(samples):
            for field, data in (("bin", make(size, ordinal)), ("cls", b"%d" % ordinal)):
                member = tarfile.TarInfo(f"{ordinal:06d}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        yield found


@pytest.fixture
def node(origin: Web, tmp_path: Path) -> Iterator[RunningNode]:
    with running_node(*flags(origin), data=tmp_path / "data") as found:
        yield found


def flags(origin: Web) -> tuple[str, ...]:
    return ("--bucket", f"gs://far={origin.url}/shards", "--workers", "2")


def read_some(node: RunningNode, target: str, received: "queue.Queue[bytes]") -> None:
    """Read an answer as far as it comes, whatever it announces."""
    host, port = Asking(node).address
    with socket.create_connection((host, port), timeout=60) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1)
        body = bytearray()
        while True:
            try:
                data = sock.recv(1 << 16)
            except ConnectionResetError:
                break
            if not data:
                break
            body += data
            received.put(data)
        received.put(b"")


def taken(received: "queue.Queue[bytes]", least: int) -> bytes:
    """At least so many bytes, or all there will be."""
    found = b""
    while len(found) < least:
        data = received.get(timeout=60)
        if not data:
            break
        found += data
    return found


def test_many_readers_raw_and_transformed_cause_one_fetch(origin: Web, node: RunningNode) -> None:
    shard = make_shard(SAMPLES, 256 << 10)
    origin.objects["shards/a.tar"] = Served(shard, "v1")
    asking = Asking(node)
    transform = asking.register(IDENTITY, decoder=None)
    raw, made = "/o/gs/far/a.tar", f"/t/gs/far/{transform.uuid},seed=1~a.tar"
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda number: asking.ask("GET", made if number % 2 else raw), range(40)))
    assert {answer.status for answer in answers} == {200}
    assert all(answer.body == shard for answer in answers[::2])
    assert len({answer.body for answer in answers[1::2]}) == 1
    assert len(origin.gets()) == 1
    assert origin.sent == len(shard)
    answer = asking.ask("GET", raw)
    assert (answer.body, answer.headers["etag"], len(origin.asked)) == (shard, '"v1"', len(origin.asked))


def test_what_is_asked_is_what_is_fetched(origin: Web, node: RunningNode) -> None:
    data = make(30 * MIB)
    origin.objects["shards/a.bin"] = Served(data, "v1")
    asking = Asking(node)
    head = asking.ask("HEAD", "/o/gs/far/a.bin")
    assert (head.status, head.headers["content-length"], origin.sent) == (200, str(len(data)), 0)
    connection = http.client.HTTPConnection(*asking.address, timeout=60)
    wanted = {
        "bytes=10485760-11534335": (206, data[10 * MIB : 11 * MIB], MIB),
        "bytes=-100": (206, data[-100:], 2 * MIB),
        f"bytes={len(data)}-": (416, None, 2 * MIB),
        "bytes=10485770-10485779": (206, data[10485770:10485780], 2 * MIB),
    }
    for header, (status, body, sent) in wanted.items():
        connection.request("GET", "/o/gs/far/a.bin", headers={"Range": header})
        response = connection.getresponse()
        found = response.read()
        assert (response.status, origin.sent) == (status, sent), header
        assert body is None or found == body
    connection.request("GET", "/o/gs/far/a.bin", headers={"If-None-Match": '"v1"'})
    response = connection.getresponse()
    assert (response.status, response.read(), origin.sent) == (304, b"", 2 * MIB)
    connection.close()
    assert asking.ask("GET", "/o/gs/far/missing").status == 404


@pytest.mark.parametrize("is_transformed", [False, True])
def test_bytes_are_sent_while_the_shard_still_arrives(origin: Web, node: RunningNode, is_transformed: bool) -> None:
    shard = make_shard(SAMPLES, 512 << 10)
    origin.objects["shards/a.tar"] = Served(shard, "v1")
    origin.gate_at = len(shard) // 2
    target = "/o/gs/far/a.tar"
    if is_transformed:
        target = f"/t/gs/far/{Asking(node).register(IDENTITY, decoder=None).uuid},seed=1~a.tar"
    received: queue.Queue[bytes] = queue.Queue()
    reading = threading.Thread(target=read_some, args=(node, target, received))
    reading.start()
    first = taken(received, MIB)
    assert len(first) >= MIB
    assert origin.sent < len(shard)
    origin.gate.set()
    body = first + taken(received, 1 << 40)
    reading.join()
    assert is_transformed or body == shard


def test_a_shard_whose_origin_breaks_off_never_ends_like_a_whole_one(origin: Web, node: RunningNode) -> None:
    """Wherever that is: in a payload, in its padding, before a header, within one."""
    shard = make_shard(6, 600_000)
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        members = archive.getmembers()
    cuts = [
        place
        for member in members[6:8]
        for place in (
            member.offset,
            member.offset + 100,
            member.offset_data,
            member.offset_data + member.size - 1,
            member.offset_data + member.size,
            member.offset_data + -(-member.size // 512) * 512,
        )
    ]
    origin.gate_at = MIB
    for number, cut in enumerate(cuts):
        origin.objects[f"shards/{number}.tar"] = Served(shard, f"v{number}")
        origin.cut_after, origin.is_dying = cut, True
        origin.gate.clear()
        received: queue.Queue[bytes] = queue.Queue()
        reading = threading.Thread(target=read_some, args=(node, f"/o/gs/far/{number}.tar", received))
        reading.start()
        first = taken(received, 1)
        origin.gate.set()
        body = first + taken(received, 1 << 40)
        reading.join()
        assert shard.startswith(body)
        assert len(body) <= cut
        assert not tarfile_is_content(body), cut
        assert not gnu_tar_is_content(body), cut
        assert body
        origin.cut_after, origin.status = None, None
        assert Asking(node).ask("GET", f"/o/gs/far/{number}.tar").body == shard


def test_a_killed_node_leaves_a_shard_inside_a_payload_and_goes_on_where_it_was(origin: Web, tmp_path: Path) -> None:
    shard = make_shard(SAMPLES, 256 << 10)
    origin.objects["shards/a.tar"] = Served(shard, "v1")
    origin.gate_at = len(shard) // 2
    with running_node(*flags(origin), data=tmp_path / "data") as node:
        received: queue.Queue[bytes] = queue.Queue()
        reading = threading.Thread(target=read_some, args=(node, "/o/gs/far/a.tar", received))
        reading.start()
        body = taken(received, 4 * MIB)
        node.kill()
        body += taken(received, 1 << 40)
        reading.join()
    assert shard.startswith(body)
    assert not tarfile_is_content(body)
    origin.gate.set()
    origin.reset()
    with running_node(*flags(origin), data=tmp_path / "data") as node:
        assert Asking(node).ask("GET", "/o/gs/far/a.tar").body == shard
        assert origin.sent < len(shard) * 3 // 4


def test_a_failing_origin_is_told_before_the_first_byte(origin: Web, node: RunningNode) -> None:
    origin.objects["shards/a.tar"] = Served(b"x" * 100_000, "v1")
    origin.status = 403
    answer = Asking(node).ask("GET", "/o/gs/far/a.tar")
    assert (answer.status, answer.error.code) == (403, "backend_denied")
    origin.status = 500
    answer = Asking(node).ask("GET", "/o/gs/far/a.tar")
    assert (answer.status, answer.error.code) == (502, "backend_unavailable")
    origin.status = None
    assert Asking(node).ask("GET", "/o/gs/far/a.tar").status == 200
