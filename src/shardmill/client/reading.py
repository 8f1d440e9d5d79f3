"""Open bodies: every byte of one version of an object, or an exception; what is cut is continued where it can be."""

import io
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from shardmill.client.continuing import WAITS, ShardBody
from shardmill.client.http import BLOCK, Answer, NodeUnreachable, Transport, TruncatedBody
from shardmill.core.errors import Conflict
from shardmill.core.meta import ObjectMeta
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import ObjectRef

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_RESUMES = 5  # of one read without a byte in between

_Data = TypeVar("_Data")


class ObjectReader(io.BufferedIOBase):
    """An open body: a binary file, and an iterable of chunks. Resources: whoever opened it closes it.

    *Recovery:* when its connection breaks, a body with an ETag is continued by range, as long as the ETag stays the
    same, also by a node that is back within seconds; a transformed shard that is being made goes on at the sample where
    it was cut, with the same bytes.
    """

    def __init__(self, transport: Transport, ref: ObjectRef, path: str) -> None:
        super().__init__()
        self._transport = transport
        self._path = path
        self._ref = ref
        self._answer: Answer | None = None
        self._received = 0
        self._resumes = 0
        self._answer = transport.request("GET", path)
        self.request_id = self._answer.request_id
        self.seed: int | None = _integer(self._answer.headers.get("Shardmill-Seed"))
        """The seed of this read, drawn by the node if the URL has none; the same URL with it gives the same bytes."""
        self.meta: ObjectMeta = meta_of(ref, self._answer)
        """As of this answer; the size is -1 while a transformed object is being made."""
        self._shard = (
            ShardBody(transport, ref, path, self._answer) if path.startswith("/t/") and self.meta.size < 0 else None
        )

    def __iter__(self) -> Iterator[bytes]:
        """Chunks as they arrive (not lines), each at most 1 MiB."""
        while chunk := self.read1(BLOCK):
            yield chunk

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            if self.meta.size >= 0 and self._received == 0:
                return self._read_whole()
            return b"".join(self)
        if size <= BLOCK and len(first := self.read1(size)) in (0, size):
            return first
        parts = bytearray(first if size <= BLOCK else b"")
        while len(parts) < size and (chunk := self.read1(min(BLOCK, size - len(parts)))):
            parts += chunk
        return bytes(parts)

    def read1(self, size: int = -1, /) -> bytes:
        limit = BLOCK if size < 0 else min(size, BLOCK)
        if self._shard is not None:
            return self._shard.read_some(limit)
        return self._with_resume(lambda answer: answer.read_some(limit), len)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")[:BLOCK]
        if self._shard is not None:
            data = self._shard.read_some(len(view))
            view[: len(data)] = data
            return len(data)
        return self._with_resume(lambda answer: answer.read_into(view), int)

    readinto1 = readinto

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes, however long that takes; fewer bytes only at the end."""
        if self._shard is not None:
            return self._shard.fill(view)
        filled = 0
        while filled < len(view) and (count := self.readinto(view[filled:])):
            filled += count
        return filled

    def skip_to(self, position: int) -> None:
        """Leave out what comes before that byte, by a range of the same version.

        Raises:
            Conflict: It has another version by now.
        """
        if self._answer is not None:
            self._answer.close()
        self._received = position
        self._continue()

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        if self._shard is not None:
            self._shard.close()
        super().close()

    def _read_whole(self) -> bytes:
        body = bytearray(self.meta.size)
        view, position = memoryview(body), 0
        while count := self.readinto(view[position:]):
            position += count
        view.release()
        return bytes(body)

    def _with_resume(self, read: Callable[[Answer], _Data], size: Callable[[_Data], int]) -> _Data:
        while True:
            if self._answer is None or self.closed:
                raise ValueError("read of a closed object")
            try:
                data = read(self._answer)
            except TruncatedBody as error:
                self._resume(error)
                continue
            if size(data):
                self._received += size(data)
                self._resumes = 0
            return data

    def _resume(self, error: TruncatedBody) -> None:
        """Continue where it was cut; what has no ETag cannot be continued and raises."""
        if self.meta.etag is None or self._resumes >= MAX_RESUMES:
            raise error
        self._resumes += 1
        for wait in WAITS:
            try:
                self._continue()
            except NodeUnreachable:
                time.sleep(wait)
            else:
                return
        raise error

    def _continue(self) -> None:
        headers = {"Range": str(ByteRange(self._received, None)), "If-Range": f'"{self.meta.etag}"'}
        answer = self._transport.request("GET", self._path, headers=headers)
        if answer.status != 206:
            answer.close()
            raise Conflict(f"{self._ref} changed while it was being read; read it again")
        self._answer = answer


def meta_of(ref: ObjectRef, answer: Answer) -> ObjectMeta:
    """What an answer's head says of the object; its size is -1 where the head has none."""
    headers = answer.headers
    size = answer.size
    etag = strong_etag(headers)
    modified = headers.get("Last-Modified")
    prefix = "shardmill-meta-"
    return ObjectMeta(
        key=ref.key,
        size=-1 if size is None else size,
        etag=etag,
        version=etag or "",
        modified=parsedate_to_datetime(modified).timestamp() if modified else 0.0,
        checksum=headers.get("Shardmill-Checksum"),
        user={
            name.lower().removeprefix(prefix): value
            for name, value in headers.items()
            if name.lower().startswith(prefix)
        },
    )


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """The ETag without quotes; a weak one is none."""
    etag = headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag.strip('"')


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
