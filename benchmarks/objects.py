"""Stored objects: reading one beside a bare sendfile loop."""

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

from benchmarks.table import Row, Samples
from shardmill import Client
from shardmill.testing.node import running_node

OBJECT = 64 << 20  # bytes


class SendfileServer:
    """The limit: answers every request with one file by blocking sendfile, and knows nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, self._path.open("rb") as file:
                connection.recv(65536)
                size = os.fstat(file.fileno()).st_size
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
                connection.sendfile(file)


def measure(directory: Path, rounds: int) -> list[Row]:
    """GET of one large object, as a file of a directory bucket and from the pool."""
    path = directory / "files" / "object.bin"
    path.parent.mkdir()
    path.write_bytes(os.urandom(OBJECT))
    with running_node("--bucket", f"gs://files=dir:{path.parent}", data=directory / "data") as node:
        with Client(node.endpoint) as client:
            client.bucket("ais://bench").create()
            client.object("ais://bench/object.bin").put(path)
            urls = {
                "a directory": client.object_url("gs://files", path.name),
                "the pool": client.object_url("ais://bench", path.name),
            }
            return _read(urls, path, rounds)


def _read(urls: dict[str, str], path: Path, rounds: int) -> list[Row]:
    ratios = {name: Samples() for name in urls}
    limit = SendfileServer(path)
    try:
        for _ in range(rounds + 1):
            raw = _seconds(limit.url)
            for name, url in urls.items():
                ratios[name].add(raw / _seconds(url))
    finally:
        limit.close()
    # The first round brings the file into the page cache and verifies the stored blocks.
    return [
        Row(f"64 MiB from {name} by curl, of a bare sendfile loop's rate", Samples(ratios[name].values[1:]), "")
        for name in urls
    ]


def _seconds(url: str) -> float:
    start = time.perf_counter()
    subprocess.run(["curl", "-sSf", "-o", "/dev/null", url], check=True)
    return time.perf_counter() - start
