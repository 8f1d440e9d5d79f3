"""`python pool.py FILE.py:FUNCTION DIRECTORY PROCESSES`: samples through a `ProcessPoolExecutor`, in order.

Written with care: processes get the place of a sample and not its bytes, they frame their arrays themselves, the first
sample goes out as soon as it is made, and a few are under way for each process. It prints `ready PORT`.
"""

import collections
import http.server
import io
import itertools
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.raw import decode, load

FUNCTION, DIRECTORY, PROCESSES = load(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
UNDER_WAY = 4  # samples for each process

Place = tuple[str, int, int]
"""A field, where it begins in the shard, and its bytes."""


def places(path: Path) -> Iterator[tuple[str, list[Place]]]:
    """Samples of a shard: key and fields."""
    with tarfile.open(path) as archive:
        for key, members in itertools.groupby(archive, key=lambda member: member.name.partition(".")[0]):
            yield key, [(member.name.partition(".")[2], member.offset_data, member.size) for member in members]


def make(path: Path, key: str, fields: list[Place]) -> bytes:
    """One transformed sample, framed."""
    with path.open("rb") as file:
        raw = {name: os.pread(file.fileno(), size, offset) for name, offset, size in fields}
    sample = FUNCTION(decode(raw))
    framed = io.BytesIO()
    array = io.BytesIO()
    np.save(array, np.ascontiguousarray(sample["npy"]), allow_pickle=False)
    for name, payload in (("cls", raw["cls"]), ("npy", array.getbuffer())):
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size = len(payload)
        framed.write(member.tobuf())
        framed.write(payload)
        framed.write(bytes(-len(payload) % 512))
    return framed.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        path = DIRECTORY / Path(self.path).name
        pending: collections.deque[Future[bytes]] = collections.deque()
        for key, fields in places(path):
            pending.append(executor.submit(make, path, key, fields))
            if len(pending) == PROCESSES * UNDER_WAY or pending[0].done():
                self.wfile.write(pending.popleft().result())
        while pending:
            self.wfile.write(pending.popleft().result())
        self.wfile.write(bytes(1024))

    def log_message(self, *_: object) -> None:
        pass


executor = ProcessPoolExecutor(PROCESSES)
# All processes are started before there are threads.
list(executor.map(len, [b""] * PROCESSES * UNDER_WAY))
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("ready", server.server_address[1], flush=True)
server.serve_forever()
