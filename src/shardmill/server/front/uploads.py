"""Objects that are stored by the front: a PUT of known length with nothing unusual about it.

A small one whose bytes came with its head is stored in one step; whatever goes another way than to be stored there goes
to aiohttp from its first byte. A larger one has the connection to itself (`Receiver`): its bytes are received into two
buffers, one of which is hashed and written while the other fills.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

import msgspec

from shardmill.core.conditions import Conditions
from shardmill.core.errors import RequestTimeout, ShardmillError
from shardmill.core.meta import MAX_USER, ObjectMeta
from shardmill.core.paths import parse_object_path
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import PutResult
from shardmill.node.access import ANONYMOUS
from shardmill.node.objects import Objects
from shardmill.server.errors import error_answer, error_body
from shardmill.server.front.gate import FIELD, HARMLESS, MAX_HEAD
from shardmill.server.intake import LEAST_RATE
from shardmill.server.objects import META, parse_checksum
from shardmill.server.security import HostRules

SMALL = 64 << 10  # bytes of a body that is stored in one step
BUFFER = 1 << 20  # bytes that are hashed and written at once
LAST = (408, 413)  # answers behind which the rest of the body is not worth reading

_END = b"\r\n\r\n"
_REQUEST = re.compile(rb"PUT (/o/[A-Za-z0-9/._~%!$&'()*+,;=:@-]+) HTTP/1\.1")
_LENGTH = re.compile(r"[0-9]{1,15}")
_CONDITIONS = frozenset(["if-match", "if-none-match", "if-modified-since", "if-unmodified-since"])
_JUDGED = frozenset(["host", "content-length", "connection", "expect", "shardmill-checksum", *_CONDITIONS])
_PASSED_OVER = (HARMLESS | {"content-type"}) - {"origin"}
_NO_CONDITIONS = Conditions()
_HOSTS = 64  # values of Host that are known to be ours


class Upload:
    """A request to store an object, parsed."""

    __slots__ = ("checksum", "conditions", "head", "is_waiting", "path", "ref", "size", "user")
    method = "PUT"

    def __init__(
        self,
        head: bytes,
        path: str,
        ref: ObjectRef,
        size: int,
        user: dict[str, str],
        conditions: Conditions,
        checksum: str | None,
        *,
        is_waiting: bool,
    ) -> None:
        self.head = head
        """As it came, for whoever has to answer after all."""
        self.path = path
        self.ref = ref
        self.size = size
        self.user = user
        self.conditions = conditions
        self.checksum = checksum
        self.is_waiting = is_waiting
        """The body is sent when it is asked for."""


class Uploads:
    """Reads heads, and stores what is small.

    Args:
        max_object: Bytes.
        patience: See `server.intake.receive`.
    """

    def __init__(self, objects: Objects, rules: HostRules, max_object: int, patience: float) -> None:
        self._objects = objects
        self._rules = rules
        self._max_object = max_object
        self._patience = patience
        self._hosts: set[str] = set()

    def next_upload(self, data: bytes) -> Upload | None:
        """The request that begins what came; None: it is not the front's, or not all of its head is there."""
        if not data.startswith(b"PUT /o/"):
            return None
        end = data.find(_END, 0, MAX_HEAD)
        upload = self._parse(data[: end + len(_END)]) if end >= 0 else None
        return upload if upload is not None and self._objects.keeps(upload.ref.bucket) else None

    def store_whole(self, upload: Upload, body: bytes, done: Callable[[PutResult | None], None]) -> bool:
        """Store a body at once; False, or `done` called with None: it has to be done otherwise."""
        try:
            return self._objects.put_whole(
                ANONYMOUS,
                upload.ref,
                body,
                user=upload.user,
                conditions=upload.conditions,
                checksum=upload.checksum,
                # Whoever answers instead finds the error again, if it still is one.
                done=lambda result, _: done(result),
            )
        except ShardmillError:
            return False

    async def check(self, upload: Upload) -> None:
        """Raise what can be refused before the body is read."""
        await self._objects.check_put(ANONYMOUS, upload.ref, upload.conditions)

    async def store(self, upload: Upload, receiver: "Receiver") -> PutResult:
        """Store what is received."""
        return await self._objects.put(
            ANONYMOUS,
            upload.ref,
            receiver.body(self._patience),
            size=upload.size,
            user=upload.user,
            conditions=upload.conditions,
            checksum=upload.checksum,
        )

    def _parse(self, head: bytes) -> Upload | None:
        first, *lines = head[: -len(_END)].split(b"\r\n")
        request = _REQUEST.fullmatch(first)
        fields = _fields(lines) if request is not None else None
        if request is None or fields is None:
            return None
        judged, user = fields
        length = judged.get("content-length", "")
        expected = judged.get("expect")
        is_plain = (
            _LENGTH.fullmatch(length) is not None
            and int(length) <= self._max_object
            and (expected is None or expected.lower() == "100-continue")
            and judged.get("connection", "keep-alive").lower() == "keep-alive"
        )
        if not is_plain:
            return None
        path = request[1].decode("ascii")
        try:
            self._check_host(judged.get("host", ""))
            ref = parse_object_path(path)
            checksum = parse_checksum(judged.get("shardmill-checksum"))
        except ShardmillError:
            # What is wrong is said by the other way.
            return None
        conditions = _NO_CONDITIONS if _CONDITIONS.isdisjoint(judged) else _conditions(judged)
        return Upload(
            head,
            path,
            ref,
            int(length),
            user,
            conditions,
            checksum,
            is_waiting=expected is not None and int(length) > 0,
        )

    def _check_host(self, host: str) -> None:
        if host not in self._hosts:
            self._rules.check_host(host)
            if len(self._hosts) < _HOSTS:
                self._hosts.add(host)


def _fields(lines: list[bytes]) -> tuple[dict[str, str], dict[str, str]] | None:
    """The headers that decide, and user metadata; None: there is one that is not known, or one twice."""
    judged: dict[str, str] = {}
    user: dict[str, str] = {}
    others: dict[str, str] = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if field is None:
            return None
        name = field[1].decode("ascii").lower()
        if name in _JUDGED:
            found, key = judged, name
        elif name.startswith(META):
            found, key = user, name.removeprefix(META)
        elif name in _PASSED_OVER:
            found, key = others, name
        else:
            return None
        if not key or key in found:
            return None
        found[key] = field[2].decode("ascii")
    if user and sum(len(name) + len(value) for name, value in user.items()) > MAX_USER:
        return None
    return judged, user


def _conditions(judged: dict[str, str]) -> Conditions:
    return Conditions.parse({name.title(): judged[name] for name in _CONDITIONS & judged.keys()})


def answer_of(result: PutResult) -> tuple[bytes, bytes]:
    """The head of the answer up to the request's id, and from there to the date's value."""
    meta = result.meta
    lines = [
        "HTTP/1.1 201 Created" if result.created else "HTTP/1.1 200 OK",
        *_described(meta),
        *(f"Shardmill-Meta-{name}: {value}" for name, value in meta.user.items()),
        "Shardmill-Request-Id: ",
    ]
    return "\r\n".join(lines).encode(), b"\r\nServer: shardmill\r\nContent-Length: 0\r\nDate: "


def _described(meta: ObjectMeta) -> list[str]:
    """As `server.objects.describe_bytes`."""
    lines = [f"Last-Modified: {_date(int(meta.modified))}"]
    if meta.etag is not None:
        lines.insert(0, f'ETag: "{meta.etag}"')
    if meta.checksum is not None:
        lines.append(f"Shardmill-Checksum: {meta.checksum}")
    return lines


@lru_cache(16)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


def answer_of_error(error: ShardmillError, request_id: str) -> tuple[bytes, bytes]:
    """The head of the answer that says what is wrong up to the date's value, and the body."""
    answer = error_answer(error, request_id)
    body = msgspec.json.encode(error_body(error, request_id))
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
        f"Shardmill-Request-Id: {request_id}",
        "Server: shardmill",
        f"Content-Length: {len(body)}",
        *(["Connection: close"] if error.status in LAST else []),
        "Date: ",
    ]
    return "\r\n".join(lines).encode(), body


class Receiver(asyncio.BufferedProtocol):
    """A connection while the body of one request comes; nothing of what follows it is read.

    Args:
        before: The protocol of the connection before and behind, which is told of all but the body.
        transport: It is not reading.
        size: Of the body.
        first: Bytes of it that came with the head.
    """

    def __init__(self, before: asyncio.BufferedProtocol, transport: asyncio.Transport, size: int, first: bytes) -> None:
        self._before = before
        self._transport = transport
        self._left = size
        self._free = [memoryview(bytearray(min(size, BUFFER))) for _ in range(2 if size > BUFFER else 1)]
        self._filling: memoryview | None = self._free.pop() if size else None
        self._count = 0
        """Bytes in what is being filled."""
        self._full: deque[tuple[memoryview, int]] = deque()
        """What nobody has taken yet, and how much of each there is."""
        self._arrived = asyncio.Event()
        self._is_discarding = False
        self._waited = 0.0
        """Seconds in all."""
        self.received = 0
        # It is less than a buffer holds.
        if first:
            self.get_buffer(0)[: len(first)] = first
            self.buffer_updated(len(first))
        if not self.is_complete:
            transport.resume_reading()

    @property
    def is_complete(self) -> bool:
        """All of the body has come."""
        return not self._left

    async def body(self, patience: float) -> AsyncIterator[memoryview]:
        """What comes, each piece valid until the next is asked for; see `server.intake.receive`."""
        while self._full or not self.is_complete:
            if not self._full:
                await self._wait(patience)
            piece, count = self._full.popleft()
            yield piece[:count]
            self._give_back(piece)

    async def discard(self, seconds: float) -> None:
        """Read off what is left, for so long, so that whoever sends it sees the answer."""
        self._is_discarding = True
        self._filling, self._count = memoryview(bytearray(BUFFER)), 0
        self._transport.resume_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.is_complete:
                    self._arrived.clear()
                    await self._arrived.wait()

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self._filling is not None
        return self._filling[self._count : self._count + self._left]

    def buffer_updated(self, nbytes: int) -> None:
        assert self._filling is not None
        self._left -= nbytes
        self._count += nbytes
        self.received += nbytes
        self._arrived.set()
        if self._is_discarding:
            self._count = 0
        elif self.is_complete or self._count == len(self._filling):
            self._full.append((self._filling, self._count))
            self._filling, self._count = (self._free.pop() if self._free else None), 0
        if self.is_complete or self._filling is None:
            self._transport.pause_reading()

    async def _wait(self, patience: float) -> None:
        """Wait for a piece.

        Raises:
            RequestTimeout: Nothing came for `patience`, or all of it too slowly.
        """
        loop = asyncio.get_running_loop()
        while not self._full:
            asked = loop.time()
            self._arrived.clear()
            try:
                async with asyncio.timeout(min(patience, patience + self.received / LEAST_RATE - self._waited)):
                    await self._arrived.wait()
            except TimeoutError:
                raise RequestTimeout(
                    f"the body stopped or came too slowly: {self.received} bytes, and the next were waited for in vain "
                    f"(body_timeout is {patience:g} s)"
                ) from None
            self._waited += loop.time() - asked

    def _give_back(self, piece: memoryview) -> None:
        if self._filling is None and not self.is_complete:
            self._filling = piece
            self._transport.resume_reading()
        else:
            self._free.append(piece)

    # What the transport tells beside.

    def connection_lost(self, exc: Exception | None) -> None:
        self._before.connection_lost(exc)

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def eof_received(self) -> bool | None:
        # Amid a body it is the end of the connection, and of whoever waits for the rest.
        return self._before.eof_received() if self.is_complete else False
