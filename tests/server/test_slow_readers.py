"""Readers that take nothing: cut after `send_timeout`, and everything of theirs given back; nobody else notices."""

import re
import time
from pathlib import Path

import pytest

from tests.server.wire import Peer, Wire, request, wait_for

SHARD = "/o/gs/sharded-imagenet/imagenet-train-000000.tar"
# More than sockets and a run's window hold, so that the run waits for its reader.
SOURCE = """
def transform(sample):
    sample["blob"] = bytes(2_000_000)
    return sample
"""


def stall(wire: Wire, *requests: bytes) -> Peer:
    """A peer that asks, reads one head and then nothing."""
    peer = wire.connect(receive_buffer=16 << 10)
    try:
        peer.send(b"".join(requests))
        assert peer.read_head()[0] == 200
    except BaseException:
        peer.socket.close()
        raise
    return peer


def resident(wire: Wire) -> int:
    """Bytes of memory that the node has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{wire.node.pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.fixture
def big(hasty: Wire) -> str:
    """Path of an object larger than what the kernel buffers."""
    if hasty.ask("HEAD", "/o/ais/pool/big").status == 404:
        assert hasty.put("/o/ais/pool/big", bytes(24 << 20)).status == 201
    return "/o/ais/pool/big"


def test_10_a_reader_that_takes_nothing_of_a_file_is_cut(hasty: Wire, big: str) -> None:
    hasty.get("/healthz")
    before = set(hasty.descriptors().values())
    peers = [stall(hasty, request("GET", big)) for _ in range(20)]
    try:
        assert hasty.get(big).body == bytes(24 << 20)
        wait_for(lambda: set(hasty.descriptors().values()) <= before, "the node has closed what it had open for them")
        assert hasty.metrics()['shardmill_requests_total{route="o",status="cut"}'] >= 20
    finally:
        for peer in peers:
            peer.socket.close()


def test_10_a_reader_that_takes_nothing_of_small_answers_is_cut(hasty: Wire) -> None:
    """Each is small enough to be written at once; together they are not."""
    hasty.put("/o/ais/pool/small", bytes(60_000))
    before = hasty.connections()
    with stall(hasty, *[request("GET", "/o/ais/pool/small")] * 500):
        wait_for(lambda: hasty.connections() <= before, "the node has closed the connection")


def test_10_answers_that_nobody_reads_do_not_pile_up(hasty: Wire) -> None:
    count = 1500
    size = len(hasty.get("/api/openapi.json").body)
    before, had = hasty.connections(), resident(hasty)
    answered = 'shardmill_requests_total{route="api",status="200"}'
    known = hasty.metrics().get(answered, 0)
    with stall(hasty, *[request("GET", "/api/openapi.json")] * count):
        wait_for(lambda: hasty.connections() <= before, "the node has closed the connection")
    assert hasty.metrics().get(answered, 0) - known < count
    assert resident(hasty) - had < count * size / 3


def test_10_a_reader_that_takes_nothing_of_a_run_is_cut_and_its_run_ends(hasty: Wire) -> None:
    uuid = hasty.register(SOURCE, "stalled")
    before = hasty.connections()
    peers = [stall(hasty, request("GET", f"/t/gs/sharded-imagenet/{uuid}~imagenet-train-000000.tar")) for _ in range(3)]
    try:
        wait_for(lambda: hasty.connections() - before == set(), "the node has closed the connections")
        wait_for(lambda: hasty.metrics()['shardmill_runs{state="running"}'] == 0, "the runs have ended")
        assert hasty.metrics()['shardmill_requests_total{route="t",status="cut"}'] >= 3
    finally:
        for peer in peers:
            peer.socket.close()


def test_a_reader_that_is_slow_but_reads_is_served_to_the_end(hasty: Wire, big: str) -> None:
    """A pause is shorter than `send_timeout`, all of them together are longer."""
    with hasty.connect(receive_buffer=16 << 10) as peer:
        peer.send(request("GET", big))
        _, headers = peer.read_head()
        left = int(headers["content-length"])
        for number in range(6):
            left -= len(peer.read_some())
            if number < 5:
                time.sleep(0.3)
        while left:
            data = peer.read_some()
            assert data
            left -= len(data)


def test_promise_10_a_reader_of_a_run_that_leaves_frees_workers_and_descriptors(wire: Wire) -> None:
    uuid = wire.register(SOURCE, "left")
    path = f"/t/gs/sharded-imagenet/{uuid}~imagenet-train-000000.tar"
    assert wire.get(path).status == 200
    before = _of_files(wire)
    for reset in (False, True):
        peers = [stall(wire, request("GET", path)) for _ in range(8)]
        for peer in peers:
            peer.reset() if reset else peer.socket.close()
        wait_for(lambda: wire.metrics()['shardmill_runs{state="running"}'] == 0, "the runs have ended", 5)
        wait_for(lambda: _of_files(wire) <= before, "the descriptors are closed", 5)
    assert wire.get(path).status == 200


def _of_files(wire: Wire) -> set[str]:
    """What the node has open but for its connections and what it shares with workers, which are kept for the next run."""
    shared = ("socket:", "anon_inode", "/memfd", "pipe:")
    return {target for target in wire.descriptors().values() if not target.startswith(shared)}
