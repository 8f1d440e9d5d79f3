"""Open bodies: every byte of one version of an object, or an exception; what is cut is continued where it can be."""

import functools
import io
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from shardmill.client.answers import Answer, NodeUnreachable, TruncatedBody, gather
from shardmill.client.continuing import WAITS, ShardBody
from shardmill.client.http import Transport
from shardmill.client.leash import Leash
from shardmill.client.uploads import BLOCK
from shardmill.core.errors import BadRequest, Conflict, PreconditionFailed
from shardmill.core.meta import ObjectMeta
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import ObjectRef

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 128 << 10  # bytes given out at once; larger ones need fresh memory each, which costs more than receiving them
MAX_RESUMES = 5  # of one read without a byte in between

_META = "shardmill-meta-"
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:([0-9]{1,18})|\*)", re.ASCII)


class PlainBody:
    """Bytes [start, stop) of one version, of which the first have been asked for. Resources: `close` it.

    *Recovery:* when the connection breaks, the rest is asked for by a range of the same ETag, also of a node that is
    back within seconds; in a forked child, whose parent owns the connection, likewise.
    """

    __slots__ = ("_answer", "_leash", "_path", "_resumes", "_stop", "_transport", "_what", "etag", "position")

    def __init__(
        self,
        transport: Transport,
        what: object,
        path: str,
        answer: Answer,
        start: int = 0,
        stop: int | None = None,
        leash: Leash | None = None,
    ) -> None:
        """Args:
        transport: Where the rest is asked for.
        what: For messages.
        path: Of the object.
        answer: Has the bytes from `start` on; closed by this.
        start: Where they begin.
        stop: One past the last; None: the object's end.
        leash: By which whoever interrupts it ends its tries to go on; None: one of its own.
        """
        self._transport = transport
        self._what = what
        self._path = path
        self._answer = answer
        self._stop = stop
        self._resumes = 0
        self._leash = leash or Leash()
        self.position = start
        """Of the next byte in the object."""
        self.etag = strong_etag(answer.headers)

    def read_some(self, limit: int) -> bytes:
        """What has arrived, at most `limit` bytes; empty at the end.

        Raises:
            TruncatedBody: It was cut, and could not be gone on with.
            Conflict: It was cut, and has another version since.
        """
        while True:
            try:
                data = self._answer.read_some(limit)
            except TruncatedBody as error:
                self._resume(error)
                continue
            self._count(len(data))
            return data

    def read_into(self, view: memoryview) -> int:
        """As `read_some`, to the front of a buffer; 0 at the end."""
        while True:
            try:
                count = self._answer.read_into(view)
            except TruncatedBody as error:
                self._resume(error)
                continue
            self._count(count)
            return count

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes, however long that takes; fewer bytes only at the end."""
        filled = 0
        while filled < len(view) and (count := self.read_into(view[filled : filled + BLOCK])):
            filled += count
        return filled

    def read_all(self) -> bytes:
        """The rest."""
        left = self._answer.left
        if left is None:
            return b"".join(iter(lambda: self.read_some(BLOCK), b""))
        data = self.read_some(min(left, BLOCK)) if left else b""
        return data if len(data) == left else gather(data, left, self.read_into)

    def skip_to(self, position: int) -> None:
        """Go on with that byte, by a range of the same version. Raises like `read_some`, once."""
        self._answer.close()
        self.position = position
        self._ask()

    def interrupt(self) -> None:
        """Make whoever reads this in another thread stop with TruncatedBody."""
        self._leash.pull()
        self._answer.interrupt()

    def close(self) -> None:
        self._answer.close()

    def _count(self, count: int) -> None:
        if count:
            self.position += count
            self._resumes = 0

    def _resume(self, error: TruncatedBody) -> None:
        """Go on where it was cut; what has no ETag cannot be gone on with and raises."""
        if self.etag is None or self._resumes >= MAX_RESUMES or self._leash.is_pulled:
            raise error
        self._resumes += 1
        for wait in WAITS:
            try:
                self._ask()
            except NodeUnreachable:
                self._leash.wait(wait)
            else:
                return
        raise error

    def _ask(self) -> None:
        wanted = ByteRange(self.position, self._stop)
        headers = {"Range": str(wanted), "If-Range": f'"{self.etag}"'}
        answer = self._transport.request("GET", self._path, headers=headers, leash=self._leash)
        if strong_etag(answer.headers) != self.etag:
            answer.close()
            raise _changed(self._what)
        check_range(answer, wanted, self._what)
        self._answer = answer


class ObjectReader(io.BufferedIOBase):
    """An open body: a binary file, and an iterable of chunks. Resources: whoever opened it closes it.

    *Recovery:* when its connection breaks, a body with an ETag is continued by range, as long as the ETag stays the
    same, also by a node that is back within seconds; a transformed shard that is being made goes on at the sample where
    it was cut, with the same bytes. A forked child that goes on reading does so over a connection of its own.
    """

    def __init__(self, transport: Transport, ref: ObjectRef, path: str) -> None:
        super().__init__()
        self._body: PlainBody | ShardBody | None = None
        self._transport, self._ref, self._path = transport, ref, path
        answer = transport.request("GET", path)
        self.request_id = answer.request_id
        self.seed: int | None = _integer(answer.headers.get("shardmill-seed"))
        """The seed of this read, drawn by the node if the URL has none; the same URL with it gives the same bytes."""
        self.meta: ObjectMeta = meta_of(ref, answer)
        """As of this answer; the size is -1 while a transformed object is being made."""
        if path.startswith("/t/") and self.meta.size < 0:
            self._body = ShardBody(transport, ref, path, answer)
        else:
            self._body = PlainBody(transport, ref, path, answer)

    def __iter__(self) -> Iterator[bytes]:
        """Chunks as they arrive (not lines), each at most 128 KiB."""
        while chunk := self.read1(CHUNK):
            yield chunk

    @property
    def body(self) -> PlainBody | ShardBody:
        """What is read from.

        Raises:
            ValueError: It was closed.
        """
        if self._body is None or self.closed:
            raise ValueError("read of a closed object")
        return self._body

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        body = self.body
        if size is None or size < 0:
            return body.read_all() if isinstance(body, PlainBody) else b"".join(self)
        if size <= BLOCK and len(first := self.read1(size)) in (0, size):
            return first
        parts = bytearray(first if size <= BLOCK else b"")
        while len(parts) < size and (chunk := self.read1(min(BLOCK, size - len(parts)))):
            parts += chunk
        return bytes(parts)

    def read1(self, size: int = -1, /) -> bytes:
        return self.body.read_some(BLOCK if size < 0 else min(size, BLOCK))

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Put what has arrived at the front of a buffer, received straight into it; 0 at the end."""
        view, body = memoryview(buffer).cast("B")[:BLOCK], self.body
        if isinstance(body, PlainBody):
            return body.read_into(view)
        data = body.read_some(len(view))
        view[: len(data)] = data
        return len(data)

    readinto1 = readinto

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes, however long that takes; fewer bytes only at the end."""
        return self.body.fill(view)

    def skip_to(self, position: int) -> None:
        """Leave out what comes before that byte, by a range of the same version.

        Raises:
            Conflict: It has another version by now.
            BadRequest: It is a transformed shard that is being made, of which there are no ranges yet.
        """
        body = self.body
        if isinstance(body, ShardBody):
            raise BadRequest("a transformed shard has ranges only once it is made; read up to there")
        body.skip_to(position)

    @property
    def url(self) -> str:
        """What is read."""
        return self._transport.endpoint + self._path

    @property
    def position(self) -> int:
        """Of the next byte in the object; 0 for a transformed shard that is being made, as long as it was not read."""
        return self._body.position if isinstance(self._body, PlainBody) else 0

    def ranged(self, start: int, stop: int, leash: Leash) -> PlainBody:
        """Bytes [start, stop) of the same version, by another connection; the caller closes it.

        Raises:
            Conflict: It has another version by now.
            TruncatedBody: The leash was pulled, here or while the body was read.
        """
        wanted = ByteRange(start, stop)
        headers = {"Range": str(wanted), "If-Match": f'"{self.meta.etag}"'}
        try:
            answer = self._transport.request("GET", self._path, headers=headers, leash=leash)
        except PreconditionFailed:
            raise _changed(self._ref) from None
        body = PlainBody(self._transport, self._ref, self._path, answer, start, stop, leash)
        if body.etag != self.meta.etag:
            body.close()
            raise _changed(self._ref)
        if check_range(answer, wanted, self._ref) not in (None, self.meta.size):
            body.close()
            raise _changed(self._ref)
        return body

    def interrupt(self) -> None:
        """Make whoever reads this in another thread stop with TruncatedBody."""
        if isinstance(self._body, PlainBody):
            self._body.interrupt()

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()


def _changed(what: object) -> Conflict:
    return Conflict(f"{what} changed while it was being read; read it again")


def check_range(answer: Answer, wanted: ByteRange, what: object) -> int | None:
    """The object's size, as a 206 tells it.

    Raises:
        TruncatedBody: It has other bytes than were asked for; it is closed then.
    """
    told = answer.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(told)
    if answer.status == 206 and match is not None:
        first, last = int(match[1]), int(match[2])
        size = None if match[3] is None else int(match[3])
        # Of an unknown size any end before the one that was asked for may be the object's.
        stop = wanted.stop if size is None else min(size, wanted.stop or size)
        is_right = first == wanted.start and (last + 1 == stop or (size is None and (stop is None or last < stop)))
        if is_right and (answer.left is None or answer.left == last + 1 - first):
            return size
    answer.close()
    raise TruncatedBody(f"the node answered {wanted} of {what} with {answer.status} {told}".rstrip())


def meta_of(ref: ObjectRef, answer: Answer) -> ObjectMeta:
    """What an answer's head says of the object; its size is -1 where the head has none."""
    headers = answer.headers
    size = answer.size
    etag = strong_etag(headers)
    modified = headers.get("last-modified")
    return ObjectMeta(
        key=ref.key,
        size=-1 if size is None else size,
        etag=etag,
        version=etag or "",
        modified=_time_of(modified) if modified else 0.0,
        checksum=headers.get("shardmill-checksum"),
        user={name[len(_META) :]: value for name, value in headers.items() if name.startswith(_META)},
    )


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """The ETag without quotes; a weak one is none."""
    etag = headers.get("etag")
    return None if etag is None or etag.startswith("W/") else etag.strip('"')


@functools.lru_cache(256)
def _time_of(date: str) -> float:
    """Unix time of an HTTP date."""
    return parsedate_to_datetime(date).timestamp()


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
