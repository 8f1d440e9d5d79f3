"""A web server that misbehaves on request, to try origins and caches on: it cuts, stalls, lies and refuses.

It runs in a thread of its own on a free loopback port, so that nodes in other processes reach it, and counts what it
is asked. Beside plain paths it answers the reading half of the S3 and Azure dialects: objects at `/BUCKET/KEY`, and
listings.
"""

import asyncio
import contextlib
import html
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from hashlib import blake2b
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import numpy as np

from shardmill.core.ranges import ByteRange

Kind = Literal[
    "cut",
    "stall",
    "silent",
    "status",
    "redirect",
    "unending",
    "chunked",
    "no_etag",
    "weak_etag",
    "no_modified",
    "no_ranges",
    "no_conditions",
    "wrong_range",
    "gzip",
    "html",
]

PIECE = 65_536  # bytes of payload a write
MAX_BODY = 1 << 30
START_SECONDS = 10.0

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in to go on.</body></html>\n"
"""What a proxy that wants a login answers in place of an object, with status 200."""

_COPIES = ("x-amz-copy-source", "x-goog-copy-source", "x-ms-copy-source")


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to misbehave; several can be set for a path, and each answer takes all that are left.

    Before the head: silent (nothing comes), status (with Retry-After if it is set), redirect (302 to `location`), html
    (a page to log in, with 200). In the head: chunked and unending (no length; the latter ends by closing), no_etag,
    weak_etag, no_modified, gzip (content-encoded, so it says), no_ranges (the whole with 200), no_conditions (If-Match
    is ignored), wrong_range (another than asked for). After `at` bytes of payload: cut, stall.
    """

    kind: Kind
    at: int = 0
    times: int | None = None
    """Answers that it befalls; None: all."""
    status: int = 503
    retry_after: int | None = None
    location: str = ""
    replacement: "Served | None" = None
    """Becomes the object when this has happened: a change between the cut and the resumption."""
    methods: tuple[str, ...] = ("GET",)


class MadeUp:
    """Bytes that take no memory: each tells its place, and no two of different `seed` are alike.

    Args:
        size: How many.
        seed: Below 2^16.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self._size = size
        self._seed = seed << 48

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, asked: slice) -> bytes:
        start, stop, _ = asked.indices(self._size)
        first = start // 8
        words = np.arange(first, -(-stop // 8), dtype="<u8") + np.uint64(self._seed)
        return words.tobytes()[start - first * 8 : stop - first * 8]


@dataclass(frozen=True, slots=True)
class Served:
    """An object."""

    data: bytes | MadeUp
    etag: str = ""
    """Without quotes; default: by the bytes."""
    modified: float = 1_700_000_000.0
    content_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return self.etag or blake2b(self.data[:], digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked."""

    method: str
    target: str
    """As it came, percent-encoded."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def copied(self) -> str | None:
        """Path of the object that a PUT asks to be copied; None: it brings its own bytes."""
        found = next((self.headers[name] for name in _COPIES if name in self.headers), None)
        return None if found is None else "/" + unquote(urlsplit(found).path).lstrip("/")

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))


Counting = Callable[[int, Served | None, str], None]
"""Counts bytes of payload and, when a fault says so, replaces the object of a path."""


@dataclass(slots=True)
class _Set:
    fault: Fault
    left: int | None


class FaultServer:
    """Use it as a context manager; `endpoint` is its URL."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[Request] = []
        """All so far, in the order of their heads."""
        self.bytes_sent = 0
        """Of payload, over all answers."""
        self.lists: Literal["by key", "by folder", "by age"] = "by key"
        """In what order. By folder, as stores that keep keys as paths do: what lies in `a/` comes before `a.b`, and who
        starts after `a` does not see it. By age, as none should."""
        self._objects: dict[str, Served] = {}
        self._faults: dict[str, list[_Set]] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="fault server")
        self._started: Future[int] = Future()

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._started.result(START_SECONDS)}"
        return self

    def __exit__(self, *exception: object) -> None:
        def stop() -> None:
            if self._stop is not None:
                self._stop.set()

        self._loop.call_soon_threadsafe(stop)
        self._thread.join()

    def put(self, path: str, served: Served | bytes) -> Served:
        """Have an object at a path (`/bucket/key`), in place of what was there."""
        found = served if isinstance(served, Served) else Served(served)
        with self._lock:
            self._objects[path] = found
        return found

    def remove(self, path: str) -> None:
        with self._lock:
            self._objects.pop(path, None)

    def objects(self) -> dict[str, Served]:
        """Path → object, as they are now."""
        with self._lock:
            return dict(self._objects)

    def misbehave(self, path: str, *faults: Fault) -> None:
        """From now on these faults, and no others, befall a path; `*` is every path."""
        with self._lock:
            self._faults[path] = [_Set(fault, fault.times) for fault in faults]

    def forget(self) -> None:
        """Forget all faults and all requests; objects stay."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.bytes_sent = 0

    def asked(self, method: str, path: str | None = None) -> list[Request]:
        """The requests of a method, and of a path if it is given."""
        with self._lock:
            return [found for found in self.requests if found.method == method and (path is None or found.path == path)]

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer_one(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            # A cut is a reset where bytes were announced and will not come; either way the client is told at once.
            writer.transport.abort()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read and answer one request; False: the connection is to be closed."""
        request = await _read_request(reader)
        with self._lock:
            self.requests.append(request)
            faults = self._take(request)
            served = self._objects.get(request.path)
        answer = _Answer(request, served, faults, writer)
        if request.method == "PUT" and answer.fault("status") is None:
            with self._lock:
                stored = _stored(request) if request.copied is None else self._objects.get(request.copied)
                if stored is None:
                    faults.append(Fault("status", status=404))
                else:
                    self._objects[request.path] = stored
        if request.query.get("list-type") == "2":
            answer.listing = _listing(request, self.objects(), self.lists)
        elif request.query.get("comp") == "list":
            answer.listing = _azure_listing(request, self.objects())
        return await answer.send(self._count)

    def _take(self, request: Request) -> list[Fault]:
        """The faults that befall this request; each is counted once."""
        taken = []
        for path in (request.path, "*"):
            for item in self._faults.get(path, []):
                if request.method not in item.fault.methods or item.left == 0:
                    continue
                if item.left is not None:
                    item.left -= 1
                taken.append(item.fault)
        return taken

    def _count(self, sent: int, replaced: Served | None, path: str) -> None:
        with self._lock:
            self.bytes_sent += sent
            if replaced is not None:
                self._objects[path] = replaced


@dataclass(slots=True)
class _Answer:
    """One answer on its way."""

    request: Request
    served: Served | None
    faults: list[Fault]
    writer: asyncio.StreamWriter
    listing: bytes | None = None

    def fault(self, kind: Kind) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind == kind), None)

    async def send(self, count: Counting) -> bool:
        if self.fault("silent"):
            await _for_ever()
        if found := self.fault("status"):
            extra = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
            return await self._plain(found.status, _error(found.status), extra)
        if found := self.fault("redirect"):
            return await self._plain(302, b"", {"Location": found.location})
        if self.fault("html"):
            return await self._plain(200, PAGE, {"Content-Type": "text/html; charset=utf-8"})
        if self.request.method in ("PUT", "DELETE", "POST"):
            return await self._plain(200, b"", {"ETag": f'"{_stored(self.request).tag}"'})
        if self.listing is not None:
            return await self._object(Served(self.listing, content_type="application/xml"), count)
        if self.served is None:
            return await self._plain(404, _error(404), {})
        return await self._object(self.served, count)

    async def _object(self, served: Served, count: Counting) -> bool:
        headers = {"Content-Type": served.content_type, **served.headers}
        if not self.fault("no_modified"):
            headers["Last-Modified"] = formatdate(served.modified, usegmt=True)
        if not self.fault("no_etag"):
            headers["ETag"] = f'W/"{served.tag}"' if self.fault("weak_etag") else f'"{served.tag}"'
        if self.fault("gzip"):
            headers["Content-Encoding"] = "gzip"
        if not self.fault("no_conditions") and self._is_refused(served):
            return await self._plain(412, _error(412), {})
        size = len(served.data)
        start, stop, status = 0, size, 200
        asked = None if self.fault("no_ranges") else ByteRange.parse(self.request.headers.get("range"))
        if not self.fault("no_ranges"):
            headers["Accept-Ranges"] = "bytes"
        if asked is not None:
            found = asked.resolve(size)
            if found is None:
                return await self._plain(416, _error(416), {"Content-Range": f"bytes */{size}"})
            (start, stop), status = found, 206
            shift = 1 if self.fault("wrong_range") and stop < size else 0
            headers["Content-Range"] = f"bytes {start + shift}-{stop + shift - 1}/{size}"
        is_chunked, is_unending = bool(self.fault("chunked")), bool(self.fault("unending"))
        if is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif is_unending:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(stop - start)
        self._head(status, headers)
        if self.request.method == "HEAD":
            await self.writer.drain()
            return not is_unending
        return await self._payload(served.data[start:stop], count, is_chunked=is_chunked) and not is_unending

    async def _payload(self, data: bytes, count: Counting, *, is_chunked: bool) -> bool:
        stops = [fault for fault in self.faults if fault.kind in ("cut", "stall") and fault.at < len(data)]
        ending = min(stops, key=lambda fault: fault.at, default=None)
        stop = len(data) if ending is None else ending.at
        for position in range(0, stop, PIECE):
            piece = data[position : min(stop, position + PIECE)]
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            await self.writer.drain()
            count(len(piece), None, self.request.path)
        if ending is None:
            if is_chunked:
                self.writer.write(b"0\r\n\r\n")
            if self.fault("unending"):
                self.writer.write_eof()
            await self.writer.drain()
            return True
        count(0, ending.replacement, self.request.path)
        if ending.kind == "stall":
            await _for_ever()
        # Without this what is still in the buffer would go with the connection.
        self.writer.write_eof()
        await asyncio.sleep(0.05)
        return False

    async def _plain(self, status: int, body: bytes, headers: Mapping[str, str]) -> bool:
        self._head(status, {"Content-Length": str(len(body)), "Content-Type": "application/xml", **headers})
        if self.request.method != "HEAD":
            self.writer.write(body)
        await self.writer.drain()
        return True

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Status", *(f"{name}: {value}" for name, value in headers.items())]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def _is_refused(self, served: Served) -> bool:
        wanted = self.request.headers.get("if-match")
        return wanted is not None and wanted not in ("*", f'"{served.tag}"')


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(min(MAX_BODY, int(headers.get("content-length", "0"))))
    return Request(method, target, headers, body)


def _stored(request: Request) -> Served:
    kept = {name: value for name, value in request.headers.items() if "-meta-" in name}
    kind = request.headers.get("content-type", "application/octet-stream")
    return Served(request.body, content_type=kind, headers=kept)


def _error(status: int) -> bytes:
    codes = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 429: "SlowDown", 503: "SlowDown"}
    return b"<Error><Code>%b</Code><Message>as told</Message></Error>" % codes.get(status, "InternalError").encode()


def _listing(request: Request, objects: Mapping[str, Served], order: str) -> bytes:
    """A page of ListObjectsV2 over the objects below the path."""
    query = request.query
    folder = request.path.rstrip("/") + "/"
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    token, after = query.get("continuation-token", ""), query.get("start-after", "")
    limit = int(query.get("max-keys", "1000"))
    is_encoded = query.get("encoding-type") == "url"
    code = quote if is_encoded else html.escape
    encoding = "<EncodingType>url</EncodingType>" if is_encoded else ""
    entries: dict[str, str] = {}
    for path in objects:
        key = path.removeprefix(folder)
        if not path.startswith(folder) or not key.startswith(prefix):
            continue
        head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
        entries[prefix + head + mark] = "prefix" if mark else "key"
    names = list(entries)
    if order == "by key":
        names = sorted(name for name in names if name > after)
    elif order == "by folder":
        names = sorted(names, key=_path)
        names = [name for name in names if _path(name) > _path(after) and not (after and name.startswith(after + "/"))]
    if token:
        del names[: names.index(token) + 1]
    rows = []
    for name in names[:limit]:
        if entries[name] == "prefix":
            rows.append(f"<CommonPrefixes><Prefix>{code(name)}</Prefix></CommonPrefixes>")
            continue
        served = objects[folder + name]
        rows.append(
            f"<Contents><Key>{code(name)}</Key><LastModified>{_iso(served.modified)}</LastModified>"
            f"<ETag>&quot;{served.tag}&quot;</ETag><Size>{len(served.data)}</Size></Contents>"
        )
    is_more = len(names) > limit
    more = f"<NextContinuationToken>{html.escape(names[limit - 1])}</NextContinuationToken>" if is_more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"{encoding}<IsTruncated>{str(is_more).lower()}</IsTruncated>{more}<KeyCount>{len(rows)}</KeyCount>{''.join(rows)}"
        "</ListBucketResult>"
    ).encode()


def _path(name: str) -> list[str]:
    return name.split("/")


def _azure_listing(request: Request, objects: Mapping[str, Served]) -> bytes:
    """All of what Azure's List Blobs has of the objects below the path, in one page."""
    folder = request.path.rstrip("/") + "/"
    prefix = folder + request.query.get("prefix", "")
    rows = [
        f"<Blob><Name>{html.escape(path.removeprefix(folder))}</Name><Properties>"
        f"<Last-Modified>{formatdate(served.modified, usegmt=True)}</Last-Modified><Etag>{served.tag}</Etag>"
        f"<Content-Length>{len(served.data)}</Content-Length><Content-Type>{served.content_type}</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
        for path, served in sorted(objects.items())
        if path.startswith(prefix)
    ]
    return (
        f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{"".join(rows)}</Blobs><NextMarker/>'
        "</EnumerationResults>"
    ).encode()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    """A server without objects or faults, until the context is left."""
    with FaultServer() as server:
        yield server
