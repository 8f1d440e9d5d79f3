"""Connections of the front: order, turns with aiohttp, readers that are slow, stalled or gone, and the end of the node."""

import asyncio
import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.server.front.connection import FrontConnection
from shardmill.server.front.desk import Desk
from shardmill.server.front.ears import Ears
from shardmill.server.front.plans import Plan
from shardmill.server.front.storing import Ending
from shardmill.testing.node import running_node
from tests.server.wire import Wire, in_chunks, request, wait_for

LARGE = 24 << 20  # bytes; more than sockets hold


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory behind `ais://notes`."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def wire(notes: Path) -> Iterator[Wire]:
    """A node of these tests alone: it is asked for a great many things."""
    buckets = ("--bucket", "ais://pool", "--bucket", f"ais://notes=dir-rw:{notes}")
    with running_node(*buckets, "--durability", "kill") as node:
        yield Wire(node, (str(notes),))


@pytest.fixture(scope="module")
def large(wire: Wire) -> tuple[str, bytes]:
    """Path and bytes of an object larger than what the kernel buffers."""
    data = random.Random(1).randbytes(LARGE)
    assert wire.put("/o/ais/pool/large", data).status == 201
    return "/o/ais/pool/large", data


@pytest.fixture(scope="module")
def small(wire: Wire) -> dict[str, bytes]:
    """Objects of many sizes up to what goes out in one write, and beyond."""
    found = {}
    for size in (0, 1, 4096, 65_536, 65_537, 131_072, 131_073, 300_000):
        path = f"/o/ais/pool/of-{size}"
        found[path] = os.urandom(size)
        assert wire.put(path, found[path]).status == 201
    return found


def test_many_requests_sent_together_are_answered_in_their_order(wire: Wire, small: dict[str, bytes]) -> None:
    asked = [random.Random(number).choice(list(small)) for number in range(300)]
    with wire.connect() as peer:
        sending = threading.Thread(target=peer.send, args=(b"".join(request("GET", path) for path in asked),))
        sending.start()
        try:
            for path in asked:
                answer = peer.read()
                assert (answer.status, answer.body) == (200, small[path])
        finally:
            sending.join()


def test_a_connection_goes_to_and_fro_between_plain_reads_and_the_rest(wire: Wire, small: dict[str, bytes]) -> None:
    path = "/o/ais/pool/of-4096"
    with wire.connect() as peer:
        for number in range(20):
            peer.send(request("GET", path))
            assert peer.read().body == small[path]
            peer.send(request("PUT", "/o/ais/pool/turns", body=b"%d" % number))
            assert peer.read().status in (200, 201)
            peer.send(request("GET", "/o/ais/pool/turns"))
            assert peer.read().body == b"%d" % number
            peer.send(request("GET", "/healthz") + request("HEAD", path))
            assert peer.read().body == b"ok\n"
            assert peer.read(head=True).headers["content-length"] == "4096"
        put = request("PUT", "/o/ais/pool/turns", "Transfer-Encoding: chunked") + in_chunks(b"a", b"b")
        peer.send(put + request("GET", "/o/ais/pool/turns") + request("DELETE", "/o/ais/pool/turns"))
        assert [peer.read().status, peer.read().body, peer.read().status] == [200, b"ab", 204]
        peer.send(request("GET", "/o/ais/pool/turns"))
        assert peer.read().code == "object_not_found"


def test_a_head_that_comes_byte_by_byte_is_answered(wire: Wire, small: dict[str, bytes]) -> None:
    path = "/o/ais/pool/of-4096"
    with wire.connect() as peer:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for byte in request("GET", path):
                peer.send(bytes([byte]))
            assert peer.read().body == small[path]


def test_who_sends_nothing_more_gets_what_was_asked_for(wire: Wire, large: tuple[str, bytes]) -> None:
    path, data = large
    with wire.connect() as peer:
        peer.send(request("GET", path) * 2 + request("GET", "/o/ais/pool/none"))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [peer.read().body == data, peer.read().body == data] == [True, True]
        assert peer.read().code == "object_not_found"
        peer.wait_closed()


def test_who_sends_nothing_more_is_closed_when_the_other_way_has_answered(wire: Wire) -> None:
    wire.put("/o/ais/pool/no-shard", bytes(range(256)) * 40)
    with wire.connect() as peer:
        # In one segment with the end, so that this is known before the object is open.
        peer.socket.send(request("GET", "/o/ais/pool/no-shard?member=a.jpg"), socket.MSG_MORE)
        peer.socket.shutdown(socket.SHUT_WR)
        assert peer.read().status == 422
        peer.wait_closed()


def test_ranges_of_a_large_object_are_its_bytes(wire: Wire, large: tuple[str, bytes]) -> None:
    path, data = large
    chance = random.Random(2)
    with wire.connect() as peer:
        for _ in range(60):
            start = chance.randrange(LARGE)
            stop = min(LARGE, start + chance.choice((1, 4096, 100_000, 131_072, 131_073, 1 << 20, 5 << 20)))
            peer.send(request("GET", path, f"Range: bytes={start}-{stop - 1}"))
            answer = peer.read()
            assert answer.status == 206
            assert answer.body == data[start:stop]


def test_a_large_object_that_is_not_in_memory_is_sent_from_the_disk(wire: Wire, notes: Path) -> None:
    data = os.urandom(9 << 20)
    path = notes / "cold"
    path.write_bytes(data)
    for _ in range(2):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        assert wire.get("/o/ais/notes/cold").body == data
        assert wire.get("/o/ais/notes/cold", "Range: bytes=70000-80000").body == data[70000:80001]


def test_a_file_that_is_cut_under_its_reader_is_not_completed(wire: Wire, notes: Path) -> None:
    path = notes / "cut"
    path.write_bytes(bytes(LARGE))
    before = wire.metrics().get('shardmill_requests_total{route="o",status="cut"}', 0)
    with wire.connect(receive_buffer=16 << 10) as peer:
        peer.send(request("GET", "/o/ais/notes/cut"))
        status, headers = peer.read_head()
        assert (status, int(headers["content-length"])) == (200, LARGE)
        os.truncate(path, LARGE // 2)
        got = 0
        while data := peer.read_some():
            got += len(data)
        assert got < LARGE
    assert wire.metrics()['shardmill_requests_total{route="o",status="cut"}'] == before + 1


def test_readers_who_leave_in_the_middle_leave_nothing(wire: Wire, large: tuple[str, bytes]) -> None:
    wire.get("/healthz")
    before = wire.connections()
    for reset in (True, False):
        peers = [wire.connect(receive_buffer=16 << 10) for _ in range(10)]
        for peer in peers:
            peer.send(request("GET", large[0]))
            assert peer.read_head()[0] == 200
        for peer in peers:
            peer.reset() if reset else peer.socket.close()
        wait_for(lambda: wire.connections() <= before, "the node has closed the connections", 5)
    assert wire.get(large[0]).body == large[1]


def test_a_reader_of_a_large_file_who_is_slow_holds_nobody_up(wire: Wire, large: tuple[str, bytes]) -> None:
    path, data = large
    with wire.connect(receive_buffer=16 << 10) as slow:
        slow.send(request("GET", path))
        assert slow.read_head()[0] == 200
        for _ in range(3):
            assert wire.get(path).body == data
        got = hashlib.md5(usedforsecurity=False)
        left = LARGE
        while left:
            piece = slow.read_some()
            assert piece
            got.update(piece)
            left -= len(piece)
        assert got.digest() == hashlib.md5(data, usedforsecurity=False).digest()


def test_an_answer_that_goes_on_is_finished_while_the_node_drains(tmp_path: Path) -> None:
    with running_node("--bucket", "ais://pool", "--durability", "kill", data=tmp_path / "data") as node:
        wire = Wire(node, ())
        wire.put("/o/ais/pool/large", bytes(LARGE))
        with wire.connect(receive_buffer=16 << 10) as peer, wire.connect() as idle:
            idle.send(request("GET", "/o/ais/pool/none"))
            assert idle.read().status == 404
            peer.send(request("GET", "/o/ais/pool/large"))
            assert peer.read_head()[0] == 200
            os.kill(node.pid, signal.SIGTERM)
            wait_for(lambda: wire.get("/readyz").status == 503, "the node drains")
            idle.send(request("GET", "/o/ais/pool/none"))
            assert idle.read().status == 404
            left = LARGE
            while left:
                data = peer.read_some()
                assert data
                left -= len(data)
            peer.wait_closed()
            idle.wait_closed()
        assert node.wait() == 0


def test_an_answer_that_goes_on_is_cut_when_somebody_is_in_a_hurry(tmp_path: Path) -> None:
    with running_node("--bucket", "ais://pool", "--durability", "kill", data=tmp_path / "data") as node:
        wire = Wire(node, ())
        wire.put("/o/ais/pool/large", bytes(LARGE))
        with wire.connect(receive_buffer=16 << 10) as peer:
            peer.send(request("GET", "/o/ais/pool/large"))
            _, headers = peer.read_head()
            os.kill(node.pid, signal.SIGTERM)
            wait_for(lambda: wire.get("/readyz").status == 503, "the node drains")
            os.kill(node.pid, signal.SIGTERM)
            got = 0
            while data := peer.read_some():
                got += len(data)
            assert got < int(headers["content-length"])
        assert node.wait() == 0


# Opens connections that ask once and stay, says so, and ends when its input does.
_CROWD = """
import resource, socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
peers = []
for number in range(count):
    peer = socket.create_connection(("127.0.0.1", port))
    peer.sendall(b"GET /o/ais/pool/small HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    peers.append(peer)
    assert b"200 OK" in peer.recv(65536)
print("here", flush=True)
sys.stdin.read()
open_ = 0
for peer in peers:
    peer.setblocking(False)
    try:
        open_ += peer.recv(65536) != b""
    except BlockingIOError:
        open_ += 1
    except ConnectionError:
        pass
print(open_, peers[0].fileno() >= 0, flush=True)
"""


@pytest.fixture
def crowd() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_ten_thousand_idle_connections_take_little_and_the_oldest_makes_room(
    tmp_path: Path, crowd: list[subprocess.Popen[str]]
) -> None:
    count = 10_000
    environ = {"SHARDMILL_SERVER_MAX_CONNECTIONS": str(count)}
    with running_node("--bucket", "ais://pool", data=tmp_path / "data", environ=environ) as node:
        wire = Wire(node, ())
        wire.put("/o/ais/pool/small", b"small")
        with wire.connect() as oldest:
            oldest.send(request("GET", "/o/ais/pool/small"))
            assert oldest.read().body == b"small"
            before = resident(node.pid)
            command = [sys.executable, "-c", _CROWD, node.endpoint.rpartition(":")[2], str(count - 1)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            crowd.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            assert (resident(node.pid) - before) / count < 20_000
            with wire.connect() as newest:
                newest.send(request("GET", "/o/ais/pool/small"))
                assert newest.read().body == b"small"
                oldest.wait_closed()
                out, _ = process.communicate()
                assert out.split()[0] == str(count - 1)


class _Lobby:
    """Knows whether somebody has left."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()

    def arrived(self, connection: FrontConnection) -> None: ...

    def left(self, connection: FrontConnection, work: "asyncio.Task[Ending] | None") -> None:
        self.has_left.set()

    def finished_one(self) -> None: ...

    def hand_over(self, connection: FrontConnection, transport: asyncio.Transport, data: bytes) -> None: ...


class _BrokenDesk(Desk):
    """Fails where nobody expects it."""

    def __init__(self) -> None:
        self.received = memoryview(bytearray(4096))
        self.ears = Ears(asyncio.get_running_loop())
        self.known = {}

    def next_plan(self, data: bytes, start: int) -> Plan | None:
        raise ZeroDivisionError


def test_a_defect_ends_the_connection_of_whoever_met_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        desk, lobby = _BrokenDesk(), _Lobby()
        server = await asyncio.get_running_loop().create_server(lambda: FrontConnection(lobby, desk), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            writer.write(request("GET", "/o/ais/pool/none"))
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await lobby.has_left.wait()
        desk.close()

    asyncio.run(main())
    assert "unexpected ZeroDivisionError" in caplog.text
