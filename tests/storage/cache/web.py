"""A web server as an origin, which counts, waits and changes as it is told; and a client of it as the cache needs one."""

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

import aiohttp

from shardmill.core.errors import BackendUnavailable, ObjectChanged, ObjectNotFound, RangeNotSatisfiable
from shardmill.core.origins import InThread, OriginFacts, OriginStatistics
from shardmill.core.ranges import ByteRange
from shardmill.storage.origins.drawn import DrawnBody

PIECE = 64 << 10


@dataclass(frozen=True)
class Served:
    """An object as it is served."""

    data: bytes
    etag: str | None = None
    modified: float | None = 1_700_000_000.0
    has_length: bool = True
    takes_ranges: bool = True


@dataclass(frozen=True)
class Asked:
    method: str
    key: str
    range: str | None


class Web:
    """Use `web()`; `objects` may be changed at any time."""

    def __init__(self) -> None:
        self.objects: dict[str, Served] = {}
        self.asked: list[Asked] = []
        self.sent = 0
        """Bytes of payload."""
        self.cut_after: int | None = None
        """Break answers off after so many bytes of payload."""
        self.is_dying = False
        """And answer nothing more with success."""
        self.status: int | None = None
        """Answer everything with it."""
        self.gate_at: int | None = None
        """Stop after so many bytes of payload until `gate` is set."""
        self.gate = threading.Event()
        self.head_gate = threading.Event()
        """Wait for it before any answer."""
        self.head_gate.set()
        self.lock = threading.Lock()
        self.url = ""

    def gets(self, key: str | None = None) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "GET" and key in (None, asked.key)]

    def heads(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "HEAD"]

    def reset(self) -> None:
        with self.lock:
            self.asked.clear()
            self.sent = 0


@contextlib.contextmanager
def web() -> Iterator[Web]:
    """A server on a free loopback port."""
    found = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            key = unquote(self.path.lstrip("/"))
            with found.lock:
                found.asked.append(Asked(self.command, key, self.headers.get("Range")))
            found.head_gate.wait(30)
            served = found.objects.get(key)
            if found.status is not None or served is None:
                self.send_response(found.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = self.headers.get("If-Match")
            if wanted is not None and served.etag is not None and wanted != f'"{served.etag}"':
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send(served)

        def send(self, served: Served) -> None:
            size = len(served.data)
            start, stop, status = 0, size, 200
            asked = ByteRange.parse(self.headers.get("Range"))
            if asked is not None and served.takes_ranges and self.command == "GET":
                resolved = asked.resolve(size)
                if resolved is None:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                (start, stop), status = resolved, 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            if served.etag is not None:
                self.send_header("ETag", f'"{served.etag}"')
            if served.modified is not None:
                self.send_header("Last-Modified", formatdate(served.modified, usegmt=True))
            if served.has_length:
                self.send_header("Content-Length", str(stop - start))
            else:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.command == "GET":
                self.send_payload(served, start, stop)

        def send_payload(self, served: Served, start: int, stop: int) -> None:
            position = start
            with contextlib.suppress(ConnectionError):
                while position < stop:
                    done = position - start
                    if found.cut_after is not None and done >= found.cut_after:
                        self.close_connection = True
                        if found.is_dying:
                            found.status = 500
                        return
                    limits = [PIECE, stop - position]
                    if found.cut_after is not None:
                        limits.append(found.cut_after - done)
                    if found.gate_at is not None and not found.gate.is_set():
                        if done >= found.gate_at:
                            found.gate.wait(30)
                        else:
                            limits.append(found.gate_at - done)
                    piece = served.data[position : position + min(limits)]
                    if served.has_length:
                        self.wfile.write(piece)
                    else:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    position += len(piece)
                    with found.lock:
                        found.sent += len(piece)
                if not served.has_length:
                    self.wfile.write(b"0\r\n\r\n")

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that leave are what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield found
    finally:
        found.gate.set()
        found.head_gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Read:
    def __init__(self, facts: OriginFacts, answer: aiohttp.ClientResponse, start: int, stop: int | None) -> None:
        self.facts = facts
        self._answer = answer
        whole = answer.status == 200
        self._skip = start if whole else 0
        self._left = float("inf") if stop is None or not whole else stop - start
        length = answer.content_length or 0
        size = length if stop is None else min(length, stop - start)
        drawn = None if self._skip else DrawnBody.take(answer, size, start=start, label=facts.key, idle_seconds=30)
        self.body = drawn
        self.is_drawn = drawn is not None

    async def draw(self, give: Callable[[memoryview], None], most: int, in_thread: InThread) -> int:
        assert self.body is not None
        return await self.body.draw(give, most, in_thread)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        try:
            async for piece in self._answer.content.iter_any():
                view = memoryview(piece)[self._skip :]
                self._skip = max(0, self._skip - len(piece))
                if len(view) > self._left:
                    view = view[: int(self._left)]
                self._left -= len(view)
                if view:
                    yield view
                if not self._left:
                    return
        except aiohttp.ClientError as error:
            raise BackendUnavailable(f"it broke off: {type(error).__name__}") from None


class WebOrigin:
    """A client, of long bodies by threads, without retries or resumption."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def head(self, key: str) -> OriginFacts:
        async with self._session.head(f"{self._url}/{quote(key)}") as answer:
            return self._facts(key, answer)

    @asynccontextmanager
    async def read(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
    ) -> AsyncIterator[_Read]:
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if version is not None and version.startswith("etag:"):
            headers["If-Match"] = f'"{version.removeprefix("etag:")}"'
        async with self._session.get(f"{self._url}/{quote(key)}", headers=headers) as answer:
            facts = self._facts(key, answer)
            if version is not None and facts.version != version:
                raise ObjectChanged(f"{key} changed")
            reading = _Read(facts, answer, start, stop)
            try:
                yield reading
            finally:
                if reading.body is not None:
                    reading.body.close()

    def statistics(self) -> OriginStatistics:
        return OriginStatistics(0, 0, {}, 0.0, 0)

    def _facts(self, key: str, answer: aiohttp.ClientResponse) -> OriginFacts:
        if answer.status == 404:
            raise ObjectNotFound(f"no object {key}")
        if answer.status == 412:
            raise ObjectChanged(f"{key} changed")
        if answer.status == 416:
            raise RangeNotSatisfiable(f"{key} ends before", size=None)
        if answer.status >= 400:
            raise BackendUnavailable(f"{key}: {answer.status}")
        told = answer.headers.get("Content-Range") or answer.headers.get("Content-Length")
        size = int(told.rpartition("/")[2]) if told else None
        etag = answer.headers.get("ETag")
        date = answer.headers.get("Last-Modified")
        facts = OriginFacts(
            key,
            size,
            etag.strip('"') if etag else None,
            parsedate_to_datetime(date).timestamp() if date else None,
        )
        return replace(facts, takes_ranges=answer.status == 206 or answer.method == "HEAD")
