"""A store with a limit: serves the files of a directory by HTTP, all answers together at so many bytes a second.

`python limited.py DIR RATE` prints `ready PORT` and serves until it is ended. Standard library.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 256 << 10  # bytes sent at a time
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Pace:
    """Bytes a second, of all who send."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def wait(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            # What was not used is lost, but for what a late wake-up has cost.
            begin = max(now - 0.005, self._free)
            self._free = begin + size / self._rate
        if begin > now:
            time.sleep(begin - now)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD, with one range."""

    protocol_version = "HTTP/1.1"
    directory: Path
    pace: Pace

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, *, is_head: bool) -> None:
        path = self.directory / Path(self.path).name
        size = path.stat().st_size
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = 0, size
        if found:
            start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{path.name}-{size}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not is_head:
            with path.open("rb") as file, contextlib.suppress(ConnectionError):
                self.send(file.fileno(), start, stop)

    def send(self, file: int, start: int, stop: int) -> None:
        self.wfile.flush()
        while start < stop:
            self.pace.wait(min(PIECE, stop - start))
            end = min(stop, start + PIECE)
            while start < end:
                start += os.sendfile(self.connection.fileno(), file, start, end - start)


class Server(ThreadingHTTPServer):
    """Clients that leave are nothing to tell of."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def server_bind(self) -> None:
        super().server_bind()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def main() -> None:
    Handler.directory, Handler.pace = Path(sys.argv[1]), Pace(float(sys.argv[2]))
    server = Server(("127.0.0.1", 0), Handler)
    print("ready", server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
