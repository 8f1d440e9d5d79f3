"""kill -9 of a node while a reader streams: what has arrived never looks like a whole shard."""

import random
import re
import socket
import time
from pathlib import Path

import pytest

from shardmill.core.api import TransformInfo
from tests.etl.judges import count_samples, gnu_tar_is_content, tarfile_is_content
from tests.etl.over_http import Served, serve
from tests.etl.support import IDENTITY, members, write_shard

MOMENTS = 30
KEPT = ",seed=1"
LARGE = 20 << 20  # bytes; more than sockets hold between a node and a reader who does not read
SEGMENT = 1448  # bytes of payload in a packet of an Ethernet; loopback's 64 KiB give a socket sixty times the buffer


class SlowReader:
    """Takes a given number of bytes, then waits; reads the rest once the node is gone."""

    def __init__(self, served: Served, path: str, *, segment: int | None) -> None:
        self._socket = socket.socket()
        self._socket.settimeout(60)
        # Small, so that the node's socket is full and the next byte is wherever the kernel had no room for more.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        if segment is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        self._socket.connect(served.address)
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        self._received = b""

    def take(self, count: int) -> None:
        while len(self._received) < count:
            data = self._socket.recv(4096)
            assert data, "the node ended the answer"
            self._received += data

    def finish(self) -> tuple[bytes, bool]:
        """All of the body that arrives, and whether its end did."""
        parts = [self._received]
        try:
            while data := self._socket.recv(1 << 16):
                parts.append(data)
        except ConnectionResetError:
            pass
        self._socket.close()
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0]
        length = re.search(rb"\r\nContent-Length: (\d+)", head, re.IGNORECASE)
        return _unchunk(body) if length is None else (body, len(body) == int(length[1]))


def _unchunk(body: bytes) -> tuple[bytes, bool]:
    """The payload of a chunked body as a client that keeps what it has would see it."""
    found: list[bytes] = []
    position = 0
    while (line := body.find(b"\r\n", position)) >= 0:
        size = int(body[position:line], 16)
        if not size:
            return b"".join(found), True
        found.append(body[line + 2 : line + 2 + size])
        position = line + 2 + size + 2
    return b"".join(found), False


@pytest.fixture(scope="module")
def directory(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small.tar`: payloads of a few bytes to 3 KB, so that every second byte is one where a stop would be missed;
    `pictures.tar`: photographs between labels of one or two bytes."""
    directory = tmp_path_factory.mktemp("killed")
    order = random.Random(5)
    samples = [{"cls": b"7", "txt": order.randbytes(order.randrange(1, 3000))} for _ in range(12_000)]
    write_shard(directory / "small.tar", samples)
    found = members((shards / "imagenet-train-000001.tar").read_bytes())
    pictures = [data for name, data in found.items() if name.endswith(".jpg")]
    count = LARGE // (sum(map(len, pictures)) // len(pictures))
    write_shard(directory / "pictures.tar", [{"cls": b"7", "jpg": pictures[n % len(pictures)]} for n in range(count)])
    return directory


@pytest.mark.timeout(400)
def test_a_killed_node_never_leaves_a_short_shard_that_looks_whole(directory: Path, tmp_path: Path) -> None:
    order = random.Random(11)
    info: TransformInfo | None = None
    for moment in range(MOMENTS):
        file = "pictures.tar" if moment % 3 == 2 else "small.tar"
        with serve(directory, "--workers", "2", data=tmp_path / "data") as served:
            if info is None:
                info = served.register(IDENTITY, decoder=None)
                for name in ("small.tar", "pictures.tar"):
                    assert served.get(info, name, KEPT).status == 200
            # Two answers of five are results that are finished already.
            path = served.path(info, file, KEPT if moment % 5 in (1, 4) else "")
            reader = SlowReader(served, path, segment=SEGMENT if moment % 2 else None)
            reader.take(order.randrange(12_000, 150_000))
            # Of the moments that differ: the socket has just begun to fill, or is full to the last byte it has room for.
            time.sleep(order.choice([0.0, order.random() / 4]))
            served.node.kill()
            data, is_complete = reader.finish()
        assert not is_complete
        assert len(data) > 10_000
        assert not tarfile_is_content(data), (moment, len(data))
        assert not gnu_tar_is_content(data), (moment, len(data))


def test_a_slow_reader_who_is_not_disturbed_gets_the_whole_shard(directory: Path) -> None:
    with serve(directory, "--workers", "2") as served:
        info = served.register(IDENTITY, decoder=None)
        for segment in (None, SEGMENT):
            reader = SlowReader(served, served.path(info, "small.tar"), segment=segment)
            reader.take(100_000)
            data, is_complete = reader.finish()
            assert is_complete
            assert tarfile_is_content(data)
            assert gnu_tar_is_content(data)
            assert count_samples(data) == 12_000
