"""One member of a large shard, the last of 14,600, beside the first, and beside a range of the same bytes from nginx.

All are asked by the same blocking reader over one kept-alive connection, in turns. nginx is the one that is installed,
with one worker and its settings for small answers; where there is none, the rows that compare with it are left out.
"""

import contextlib
import io
import socket
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nginx as nginxes
from benchmarks.table import Row, Samples, ratio_of
from shardmill import Client
from shardmill.testing.node import running_node

MEMBERS = 14_600
SIZE = 3600  # bytes of a member; with header and padding all are 64 MiB
REQUESTS = 1000  # a round


@dataclass(frozen=True)
class Asked:
    """What is read again and again, and from where."""

    what: str
    port: int
    request: bytes


class Reader:
    """Asks and reads, and looks at no more of an answer than its length and its status."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def read(self, request: bytes, size: int) -> bytes:
        """The body of one answer, which has `size` bytes."""
        self._socket.sendall(request)
        data = self._socket.recv(65536)
        end = data.find(b"\r\n\r\n")
        while end < 0 or len(data) < end + 4 + size:
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError(data[:200])
            data += more
            end = data.find(b"\r\n\r\n")
        return data[end + 4 :]


def measure(directory: Path, rounds: int, nginx: Path | None = None) -> list[Row]:
    """First and last member from a directory, the last from the pool.

    Args:
        directory: Scratch.
        rounds: Of the table.
        nginx: Its program; default: the one that is installed.
    """
    program = nginx or nginxes.installed()
    files = directory / "files"
    files.mkdir(parents=True)
    shard, first, last = files / "shard.tar", "000000.jpg", f"{MEMBERS - 1:06d}.jpg"
    write_shard(shard)
    with tarfile.open(shard) as archive:
        info = archive.getmember(last)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(running_node("--bucket", f"gs://files=dir:{files}", data=directory / "data"))
        with Client(node.endpoint) as client:
            client.bucket("ais://bench").create()
            client.object("ais://bench/shard.tar").put(shard)
        port = int(node.endpoint.rpartition(":")[2])
        asked = [
            Asked(what, port, _request(f"/o/{bucket}/shard.tar?member={name}"))
            for what, bucket, name in (
                (
                    f"first of {MEMBERS} members of a {shard.stat().st_size >> 20} MiB shard in a directory",
                    "gs/files",
                    first,
                ),
                ("last of them", "gs/files", last),
                ("last of them, the shard in the pool", "ais/bench", last),
            )
        ]
        if program is not None:
            header = f"Range: bytes={info.offset_data}-{info.offset_data + SIZE - 1}"
            beside = stack.enter_context(nginxes.running(program, directory, files)).port
            asked.append(Asked("the last one's bytes as a range from nginx", beside, _request("/shard.tar", header)))
        return _rows(_measure(asked, rounds), has_nginx=program is not None)


def write_shard(path: Path) -> None:
    """A shard of members of one size."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(MEMBERS):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = SIZE
            archive.addfile(info, io.BytesIO(b"%06d" % number * (SIZE // 6)))


def _measure(asked: list[Asked], rounds: int) -> list[tuple[str, Samples]]:
    """Microseconds of each."""
    times = [(each.what, Samples()) for each in asked]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(Reader(each.port))) for each in asked]
        for number in range(rounds + 1):
            for reader, each, (_, samples) in zip(readers, asked, times, strict=True):
                taken = _seconds(reader, each.request) / REQUESTS * 1e6
                # The first round makes the index and brings the file into the page cache.
                if number > 0:
                    samples.add(taken)
    return times


def _rows(times: list[tuple[str, Samples]], *, has_nginx: bool) -> list[Row]:
    rows = [Row(what, samples, "µs") for what, samples in times]
    first, last, pool = (samples for _, samples in times[:3])
    rows.append(Row("time of the last member, of the first's", ratio_of(last, first), ""))
    if has_nginx:
        beside = times[3][1]
        for what, samples in (("a directory", last), ("the pool", pool)):
            what = f"time of the last member in {what}, of an nginx range's of the same bytes"
            rows.append(Row(what, ratio_of(samples, beside), "", at_most=3, contest="cost"))
    return rows


def _seconds(reader: Reader, request: bytes) -> float:
    expected = reader.read(request, SIZE)
    if len(expected) != SIZE:
        raise RuntimeError(expected[:200])
    start = time.perf_counter()
    for _ in range(REQUESTS):
        reader.read(request, SIZE)
    return time.perf_counter() - start


def _request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
