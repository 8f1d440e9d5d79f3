"""Handles of buckets and objects: names bound to a node. Making one costs no request.

A reader either gives every byte of one version of the object or raises.
"""

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec

from shardmill.client.http import BLOCK, Answer, NodeUnreachable, Transport, TruncatedBody, Upload
from shardmill.core.api import Failures, ObjectInfo, ObjectPage
from shardmill.core.errors import BadRequest, Conflict, CorruptObject, ObjectNotFound, ShardmillError, TransformFailed
from shardmill.core.meta import ObjectMeta
from shardmill.core.paths import object_path, transformed_path
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.specs import Spec

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PAGE = 1000  # keys asked for at once
MAX_RESUMES = 5  # of one read without a byte in between

_Data = TypeVar("_Data")

Body = bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes] | Iterable[bytes]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a node answered to a put."""

    size: int
    etag: str | None
    checksum: str | None
    created: bool
    """False: an existing object was replaced."""


class BucketHandle:
    """One bucket of a node."""

    def __init__(self, transport: Transport, bucket: Bucket) -> None:
        self._transport = transport
        self.bucket = bucket

    @property
    def uri(self) -> str:
        return str(self.bucket)

    def __repr__(self) -> str:
        return f"BucketHandle({self.uri!r})"

    def object(self, key: str) -> "ObjectHandle":
        """The object of that key; nothing in it is decoded or expanded."""
        return ObjectHandle(self._transport, ObjectRef.of(self.bucket, key))

    def list(self, prefix: str = "", delimiter: str = "") -> Iterator[ObjectInfo]:
        """Objects in key order, page by page. With a delimiter, only those without it behind the prefix."""
        for page in self.pages(prefix, delimiter):
            yield from page.objects

    def pages(
        self, prefix: str = "", delimiter: str = "", *, after: str = "", limit: int = PAGE
    ) -> Iterator[ObjectPage]:
        """The listing's pages; with a delimiter they also carry the common prefixes."""
        while True:
            query = {"bucket": self.uri, "prefix": prefix, "delimiter": delimiter, "after": after, "limit": str(limit)}
            query = {name: value for name, value in query.items() if value}
            with self._transport.request("GET", "/api/objects", query=query) as answer:
                page = msgspec.json.decode(answer.read_all(), type=ObjectPage)
            yield page
            if page.next is None:
                return
            after = page.next

    def create(self) -> None:
        """Create it in the node's own store; only `ais://` buckets can be created."""
        self._transport.request("PUT", self._path).close()

    def remove(self, force: bool = False) -> None:
        """Remove it; `force` even if it holds objects, which are then gone."""
        self._transport.request("DELETE", self._path, query={"force": "true"} if force else None).close()

    @property
    def _path(self) -> str:
        return f"/api/buckets/{self.bucket.provider}/{self.bucket.name}"


class ObjectHandle:
    """One object of a node."""

    def __init__(self, transport: Transport, ref: ObjectRef) -> None:
        self._transport = transport
        self.ref = ref

    @property
    def uri(self) -> str:
        return str(self.ref)

    def __repr__(self) -> str:
        return f"ObjectHandle({self.uri!r})"

    def url(
        self,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
    ) -> str:
        """The URL under which any HTTP client gets the object, transformed if a version is named."""
        return self._transport.endpoint + build_path(self.ref, transform_id, seed, epoch, start, count)

    def get(
        self,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
    ) -> "ObjectReader":
        """Open the object for reading; its first byte has been asked for when this returns.

        Raises:
            ObjectNotFound, BucketNotFound, TransformNotFound: Something named does not exist.
            TransformFailed: The user's code failed before the first byte.
        """
        return ObjectReader(self._transport, self.ref, build_path(self.ref, transform_id, seed, epoch, start, count))

    def read(self, transform_id: str | None = None, *, seed: int | None = None, epoch: int | None = None) -> bytes:
        """All bytes of the object; for a large one iterate over `get` instead."""
        with self.get(transform_id, seed=seed, epoch=epoch) as reader:
            return reader.read()

    def get_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the object's end.

        Raises:
            RangeNotSatisfiable: `start` is at or behind the end.
        """
        if not 0 <= start <= stop:
            raise BadRequest(f"range [{start}, {stop}) is not 0 <= start <= stop")
        if start == stop:
            return b""
        headers = {"Range": str(ByteRange(start, stop))}
        with self._transport.request("GET", object_path(self.ref), headers=headers) as answer:
            if answer.status != 206:
                raise TruncatedBody(f"the node answered a range of {self.uri} with {answer.status}")
            return answer.read_all()

    def put(
        self,
        body: Body,
        *,
        meta: Mapping[str, str] | None = None,
        if_absent: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Stored:
        """Store the object; when this returns, the node has it as durably as its bucket promises.

        Args:
            body: Bytes, a path, an open binary file, or an iterable of bytes.
            meta: User metadata, at most 2 KiB; names in lower case.
            if_absent: Leave an existing object alone.
            progress: Called with the size of every piece before it is sent.

        Raises:
            PreconditionFailed: With `if_absent`: there is an object of that key.
            BucketReadOnly: The bucket cannot be written.
            CorruptObject: What the node stored is not what was sent.
        """
        headers = {f"Shardmill-Meta-{name}": value for name, value in (meta or {}).items()}
        if if_absent:
            headers["If-None-Match"] = "*"
        with contextlib.ExitStack() as stack:
            sent = _Sent(_upload_of(body, stack), progress)
            with self._transport.request("PUT", object_path(self.ref), headers=headers, body=sent.upload) as answer:
                answer.read_all()
                stored = Stored(
                    sent.size,
                    _etag(answer.headers),
                    answer.headers.get("Shardmill-Checksum"),
                    created=answer.status == 201,
                )
        self._verify(sent, stored)
        return stored

    def head(
        self,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
    ) -> ObjectMeta:
        """What is known of the object; with a transform, whether it could be run, its size being unknown (-1)."""
        path = build_path(self.ref, transform_id, seed, epoch, start, count)
        try:
            with self._transport.request("HEAD", path) as answer:
                return _meta_of(self.ref, answer)
        except FileNotFoundError as error:
            # A HEAD has no body, so what is missing can only be told in general.
            what = self.uri if transform_id is None else f"{self.uri} or transform {transform_id}"
            raise ObjectNotFound(f"{what} does not exist", request_id=getattr(error, "request_id", None)) from None

    def delete(self) -> None:
        """Remove the object; raises ObjectNotFound."""
        self._transport.request("DELETE", object_path(self.ref)).close()

    def _verify(self, sent: "_Sent", stored: Stored) -> None:
        digest = sent.checksum()
        if digest is not None and stored.checksum is not None:
            intact = digest == stored.checksum
        else:
            meta = self.head()
            # A newer object than ours is someone else's write, not damage.
            intact = meta.etag != stored.etag or meta.size == sent.size
        if not intact:
            raise CorruptObject(f"{self.uri} was stored with other bytes than were sent; put it again")


class ObjectReader(io.BufferedIOBase):
    """An open body: a binary file, and an iterable of chunks. Resources: whoever opened it closes it.

    *Recovery:* a plain object whose connection breaks is continued by range as long as its ETag stays the same.
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
        self.meta: ObjectMeta = _meta_of(ref, self._answer)
        """As of this answer; a transformed object's size is -1."""

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
        return self._with_resume(lambda answer: answer.read_some(limit), len)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")[:BLOCK]
        return self._with_resume(lambda answer: answer.read_into(view), int)

    readinto1 = readinto

    def skip_to(self, position: int) -> None:
        """Leave out what comes before that byte of a plain object, by a range of the same version.

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
        """Continue a plain object where it was cut; anything else cannot be continued and raises."""
        if self._path.startswith("/t/"):
            raise self._explained(error) from error
        if self.meta.etag is None or self._resumes >= MAX_RESUMES:
            raise error
        self._resumes += 1
        self._continue()

    def _continue(self) -> None:
        headers = {"Range": str(ByteRange(self._received, None)), "If-Range": f'"{self.meta.etag}"'}
        answer = self._transport.request("GET", self._path, headers=headers)
        if answer.status != 206:
            answer.close()
            raise Conflict(f"{self._ref} changed while it was being read; read it again")
        self._answer = answer

    def _explained(self, error: TruncatedBody) -> Exception:
        """Why a transformed body was cut, as the node recorded it."""
        query = {"request": self.request_id or ""}
        try:
            with self._transport.request("GET", "/api/transforms/errors", query=query) as answer:
                failures = msgspec.json.decode(answer.read_all(), type=Failures).failures
        except (NodeUnreachable, TruncatedBody):
            return TruncatedBody(f"the node stopped while it was sending {self._ref}")
        except ShardmillError:
            return error
        if not failures:
            return TruncatedBody(f"{self._ref}, transformed: {error} (request {self.request_id})")
        last = failures[-1]
        place = f"sample {last.sample!r} of {last.bucket}/{last.object}" if last.sample else str(self._ref)
        return TransformFailed(
            f"transform {last.transform} failed at {place}: {last.message}",
            traceback=last.traceback,
            request_id=self.request_id,
        )


class _Sent:
    """Counts and hashes what goes out with an upload."""

    def __init__(self, upload: Upload, progress: Callable[[int], None] | None) -> None:
        self.size = 0
        self._progress = progress
        self._hash = new_hash()
        self.upload = Upload(self._watch(upload.pieces), upload.size)

    def checksum(self) -> str | None:
        """`xxh3:HEX` of what was sent; None where the xxhash library is missing."""
        return None if self._hash is None else f"xxh3:{self._hash.hexdigest()}"

    def _watch(self, pieces: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
        for piece in pieces:
            count = memoryview(piece).nbytes
            self.size += count
            if self._progress is not None:
                self._progress(count)
            if self._hash is not None:
                self._hash.update(piece)
            yield piece


def new_hash() -> Any:
    """An xxh3-128 hasher, or None: the bare client does without the library."""
    try:
        return importlib.import_module("xxhash").xxh3_128()
    except ImportError:
        return None


def build_path(
    ref: ObjectRef,
    transform_id: str | None,
    seed: int | None = None,
    epoch: int | None = None,
    start: int | None = None,
    count: int | None = None,
) -> str:
    """The URL path of an object, transformed if a version is named.

    Raises:
        BadRequest: A bare name or no spec at all, options without a transform, or a last segment that is too long.
    """
    if transform_id is None:
        given = {"seed": seed, "epoch": epoch, "start": start, "count": count}
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise BadRequest(f"{', '.join(named)} without transform_id: a plain object has no such option")
        return object_path(ref)
    spec = Spec.parse(transform_id).with_options(seed=seed, epoch=epoch, start=start, count=count)
    return transformed_path(ref, spec)


def _upload_of(body: Body, stack: contextlib.ExitStack) -> Upload:
    if isinstance(body, bytes | bytearray | memoryview):
        return Upload((body,), memoryview(body).nbytes)
    if isinstance(body, str | os.PathLike):
        file = Path(body).open("rb", buffering=0)  # noqa: SIM115  # the stack closes it
        stack.callback(file.close)
        return Upload(_blocks(file), os.fstat(file.fileno()).st_size)
    if isinstance(body, ObjectReader) and body.meta.size >= 0:
        return Upload(body, body.meta.size)
    if hasattr(body, "read"):
        return Upload(_blocks(body), None)
    return Upload(body, None)


def _blocks(file: Any) -> Iterator[bytes]:  # anything with read(n)
    while block := file.read(BLOCK):
        if not isinstance(block, bytes):
            raise TypeError(f"the file gives {type(block).__name__}; open it in binary mode")
        yield block


def _meta_of(ref: ObjectRef, answer: Answer) -> ObjectMeta:
    headers = answer.headers
    size = answer.size
    etag = _etag(headers)
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


def _etag(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag.strip('"')


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
