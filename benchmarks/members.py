"""One member of a large shard, the last of 14,600, beside a range of the same bytes from nginx.

Both are asked by the same blocking reader over one kept-alive connection, in turns. nginx is the distribution's own
package, with one worker and its settings for small answers; where it is not installed there is no such row.
"""

import contextlib
import io
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row, Samples
from shardmill import Client
from shardmill.testing.node import running_node

MEMBERS = 14_600
SIZE = 3600  # bytes of a member; with header and padding all are 64 MiB
REQUESTS = 1000  # a round

_CONF = """worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush off;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  open_file_cache max=100;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


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


def measure(directory: Path, rounds: int, nginx: str | None = None) -> list[Row]:
    """Members from a directory and from the pool, first and last, of an nginx range's rate.

    Args:
        directory: Scratch.
        rounds: Of the table.
        nginx: Its program; default: the one that is installed.
    """
    program = nginx or shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        return []
    files = directory / "files"
    files.mkdir(parents=True)
    shard, last = files / "shard.tar", f"{MEMBERS - 1:06d}.jpg"
    write_shard(shard)
    with tarfile.open(shard) as archive:
        info = archive.getmember(last)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(running_node("--bucket", f"gs://files=dir:{files}", data=directory / "data"))
        with Client(node.endpoint) as client:
            client.bucket("ais://bench").create()
            client.object("ais://bench/shard.tar").put(shard)
        port = int(node.endpoint.rpartition(":")[2])
        requests = {
            f"{which} of {MEMBERS} members of a {shard.stat().st_size >> 20} MiB shard in {where}": (
                port,
                _request(f"/o/{bucket}/shard.tar?member={name}"),
            )
            for which, where, bucket, name in (
                ("first", "a directory", "gs/files", "000000.jpg"),
                ("last", "a directory", "gs/files", last),
                ("last", "the pool", "ais/bench", last),
            )
        }
        beside = stack.enter_context(_nginx(program, directory, files))
        limit = beside, _request("/shard.tar", f"Range: bytes={info.offset_data}-{info.offset_data + SIZE - 1}")
        return _measure(requests, limit, rounds)


def write_shard(path: Path) -> None:
    """A shard of members of one size."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(MEMBERS):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = SIZE
            archive.addfile(info, io.BytesIO(b"%06d" % number * (SIZE // 6)))


def _measure(requests: dict[str, tuple[int, bytes]], limit: tuple[int, bytes], rounds: int) -> list[Row]:
    times = {what: Samples() for what in requests}
    with contextlib.ExitStack() as stack:

        def reader(port: int) -> Reader:
            return stack.enter_context(contextlib.closing(Reader(port)))

        raw = reader(limit[0])
        readers = {what: reader(port) for what, (port, _) in requests.items()}
        for _ in range(rounds + 1):
            beside = _seconds(raw, limit[1])
            for what, (_, request) in requests.items():
                times[what].add(_seconds(readers[what], request) / beside)
    # The first round makes the index and brings the file into the page cache.
    return [
        Row(f"{what}: its time, of an nginx range's of the same bytes (at most 3)", Samples(samples.values[1:]), "")
        for what, samples in times.items()
    ]


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


@contextlib.contextmanager
def _nginx(program: str, directory: Path, root: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    configuration = directory / "nginx.conf"
    configuration.write_text(_CONF.format(directory=directory, port=port, root=root))
    process = subprocess.Popen([program, "-c", configuration, "-e", directory / "error.log"])
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()
