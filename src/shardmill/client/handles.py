"""Handles of buckets and objects: names bound to a node. Making one costs no request.

What is read is every byte of one version of the object, or an exception.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shardmill.client.batch import Missing, open_batch
from shardmill.client.batches import MemberBatch
from shardmill.client.downloading import CONNECTIONS, Download, read_into
from shardmill.client.http import Transport
from shardmill.client.reading import ObjectReader, PlainBody, check_range, meta_of, strong_etag
from shardmill.client.uploads import Body, BytesUpload, FileUpload, PiecesUpload, Watching, blocks_of, regular_file
from shardmill.core.api import (
    BatchEntry,
    CachedDetails,
    CachedInfo,
    CachedPage,
    CopyRequest,
    MemberInfo,
    MemberPage,
    ObjectInfo,
    ObjectPage,
)
from shardmill.core.errors import BadRequest, Conflict, CorruptObject, MemberNotFound, ObjectNotFound
from shardmill.core.meta import ObjectMeta
from shardmill.core.paths import member_path, object_path, transformed_path
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.specs import Spec

PAGE = 1000  # keys asked for at once


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
        self, prefix: str = "", delimiter: str = "", *, after: str = "", limit: int = PAGE, stale: bool = False
    ) -> Iterator[ObjectPage]:
        """The listing's pages; with a delimiter they also carry the common prefixes.

        Args:
            prefix: What the keys start with.
            delimiter: Rolls up what has it behind the prefix.
            after: Key or common prefix to begin behind.
            limit: Of objects and prefixes on a page.
            stale: While the store behind the bucket cannot be reached, give what the node knows of it instead of an
                error; such pages are marked `stale`, and those that may leave objects out not `complete`.
        """
        while True:
            query = {"bucket": self.uri, "prefix": prefix, "delimiter": delimiter, "after": after, "limit": str(limit)}
            query["stale"] = "true" if stale else ""
            query = {name: value for name, value in query.items() if value}
            with self._transport.request("GET", "/api/objects", query=query) as answer:
                page = msgspec.json.decode(answer.read_all(), type=ObjectPage)
            yield page
            if page.next is None:
                return
            after = page.next

    def cached(self, prefix: str = "") -> Iterator[CachedInfo]:
        """Objects of which something is on the node's disk, in key order, page by page.

        Raises:
            BadRequest: There is no store behind the bucket.
        """
        query = {"bucket": self.uri, "limit": str(PAGE)}
        if prefix:
            query["prefix"] = prefix
        while True:
            with self._transport.request("GET", "/api/cache/objects", query=query) as answer:
                page = msgspec.json.decode(answer.read_all(), type=CachedPage)
            yield from page.objects
            if page.next is None:
                return
            query["after"] = page.next

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
    ) -> ObjectReader:
        """Open the object for reading; its first byte has been asked for when this returns.

        Raises:
            ObjectNotFound, BucketNotFound, TransformNotFound: Something named does not exist.
            TransformFailed: The user's code failed before the first byte.
        """
        return ObjectReader(self._transport, self.ref, build_path(self.ref, transform_id, seed, epoch, start, count))

    def read(
        self,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
    ) -> bytes:
        """All bytes of the object; for a large one iterate over `get` instead."""
        if transform_id is None:
            path = build_path(self.ref, None, seed, epoch, start, count)
            return PlainBody(self._transport, self.ref, path, self._transport.request("GET", path)).read_all()
        with self.get(transform_id, seed=seed, epoch=epoch, start=start, count=count) as reader:
            return reader.read()

    def read_into(
        self,
        buffer: Any,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
        connections: int = CONNECTIONS,
    ) -> int:
        """Receive the object straight into memory; returns its size.

        Args:
            buffer: Any that is contiguous and can be written to: a bytearray, an array, a shared memory. After an
                exception what is in it is worth nothing.
            transform_id: A spec, as `WDTransform.uuid`; the options below are its.
            seed: As in `Client.object_url`.
            epoch: As in `Client.object_url`.
            start: As in `Client.object_url`.
            count: As in `Client.object_url`.
            connections: At most, for an object of 32 MiB or more; all bytes are of one version.

        Raises:
            BadRequest: (A ValueError.) It does not fit.
            Conflict: The object was replaced while it was read.
        """
        with self.get(transform_id, seed=seed, epoch=epoch, start=start, count=count) as reader:
            return read_into(reader, memoryview(buffer).cast("B"), connections=connections)

    def download(
        self,
        target: str | os.PathLike[str],
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
        connections: int = CONNECTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectMeta:
        """Read the object into a file, which appears under its name when it is whole and has the node's checksum.

        *Recovery:* what a call that failed has left beside the file is gone on with by the next one.

        Args:
            target: The file; what it was before is replaced, folders are made.
            transform_id: A spec, as `WDTransform.uuid`; the options below are its.
            seed: As in `Client.object_url`.
            epoch: As in `Client.object_url`.
            start: As in `Client.object_url`.
            count: As in `Client.object_url`.
            connections: At most, for an object of 32 MiB or more; all bytes are of one version.
            progress: Called with the size of every piece, by one thread at a time.

        Returns:
            What is known of the object, its size always.

        Raises:
            Conflict: The object was replaced while it was read.
            CorruptObject: Other bytes arrived than the node has.
        """
        with self.get(transform_id, seed=seed, epoch=epoch, start=start, count=count) as reader:
            size = Download(reader, Path(target), connections=connections, progress=progress).run()
            return msgspec.structs.replace(reader.meta, size=size)

    def get_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the object's end.

        Raises:
            RangeNotSatisfiable: `start` is at or behind the end.
        """
        return _get_range(self._transport, object_path(self.ref), self.ref, start, stop)

    def cached(self) -> CachedDetails:
        """What of it is on the node's disk, if there is a store behind its bucket."""
        with self._transport.request("GET", "/api/cache/object", query={"object": self.uri}) as answer:
            return msgspec.json.decode(answer.read_all(), type=CachedDetails)

    def member(self, name: str) -> "MemberHandle":
        """One member of the shard that the object is, by its name in the tar; whether it exists is not asked."""
        return MemberHandle(self._transport, self.ref, name)

    def members(self) -> Iterator[MemberInfo]:
        """The shard's members in its order, page by page, from an index that the node keeps.

        Raises:
            BadShard: It is no good tar.
            Conflict: It was replaced between two pages.
        """
        query, first = {"object": self.uri, "limit": str(PAGE)}, True
        etag = None
        while True:
            with self._transport.request("GET", "/api/members", query=query) as answer:
                page = msgspec.json.decode(answer.read_all(), type=MemberPage)
            if not first and page.etag != etag:
                raise Conflict(f"{self.uri} was replaced while its members were listed; list them again")
            yield from page.members
            if page.next is None:
                return
            query["after"], etag, first = page.next, page.etag, False

    def read_members(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Members of the shard that the object is, with their names, in the order of these.

        They are asked for ahead on one connection, so that many small ones cost hardly more than their bytes; all are
        of one version of the shard. Whoever leaves the iteration ends it.

        Args:
            names: As in the tar; taken as they are needed, so they may come from `members`.

        Raises:
            ObjectNotFound, BucketNotFound, MemberNotFound: Something named does not exist.
            BadShard: The object is no good tar.
            Conflict: It was replaced meanwhile.
        """
        batch = MemberBatch(self._transport, self.ref, names)
        try:
            yield from batch
        finally:
            batch.close()

    def open_members(self, names: Sequence[str], *, missing: Missing = "fail") -> io.BufferedReader:
        """A tar of members of the shard that the object is, in the order of their names: a smaller shard.

        Args:
            names: As in the tar, at most 10,000.
            missing: What becomes of members that do not exist: `fail`, or `skip`, which leaves them out.

        Returns:
            An open file; the caller closes it. A read of it raises TruncatedBody where it is cut.

        Raises:
            ObjectNotFound, BucketNotFound, MemberNotFound: Something named does not exist.
            BadShard: The object is no good tar.
            TooLarge: There are too many names.
        """
        return open_batch(self._transport, [BatchEntry(self.uri, list(names))], missing=missing, naming="member")

    def put(
        self,
        body: Body,
        *,
        meta: Mapping[str, str] | None = None,
        if_absent: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Stored:
        """Store the object; when this returns, the node has it as durably as its bucket promises.

        It is sent once: whether a PUT that broke off was stored is not known, and asking again may undo another's.

        Args:
            body: Bytes, a path, an open binary file (from where it stands), or an iterable of bytes. Files go out by
                the kernel; what has no length is sent in chunks.
            meta: User metadata, at most 2 KiB; names in lower case.
            if_absent: Leave an existing object alone.
            progress: Called with the size of every piece, in turn.

        Raises:
            PreconditionFailed: With `if_absent`: there is an object of that key.
            BucketReadOnly: The bucket cannot be written.
            CorruptObject: What the node stored is not what was sent.
        """
        headers = {f"Shardmill-Meta-{name}": value for name, value in meta.items()} if meta else {}
        if if_absent:
            headers["If-None-Match"] = "*"
        with contextlib.ExitStack() as stack:
            sent = _upload_of(body, progress, stack)
            with self._transport.request("PUT", object_path(self.ref), headers=headers, body=sent) as answer:
                answer.read_all()
                stored = Stored(
                    sent.sent,
                    strong_etag(answer.headers),
                    answer.headers.get("shardmill-checksum"),
                    created=answer.status == 201,
                )
        self._verify(sent, stored)
        return stored

    def copy_to(self, target: "ObjectHandle | str", *, if_absent: bool = False) -> Stored:
        """Have the node copy the object, its user metadata included; no byte of it comes here.

        Within one bucket of a cloud the store itself copies what has at most 1 GiB. It is asked for once, as a put is.

        Args:
            target: At the same node, `provider://bucket/key` or a handle; replaced if there is one.
            if_absent: Leave an existing object alone.

        Raises:
            ObjectNotFound, BucketNotFound: There is no such object to copy, or no such bucket.
            PreconditionFailed: With `if_absent`: there is an object of that key.
            BucketReadOnly: The bucket of `target` cannot be written.
            NodeUnreachable: The copy took more than 5 minutes; get and put what is that large.
        """
        if isinstance(target, ObjectHandle) and target._transport.endpoint != self._transport.endpoint:
            raise BadRequest(f"{target.uri} is of another node; put what {self.uri} gives there")
        destination = target.uri if isinstance(target, ObjectHandle) else target
        body = msgspec.json.encode(CopyRequest(self.uri, destination, if_absent))
        headers = {"Content-Type": "application/json"}
        with self._transport.request("POST", "/api/objects/copy", headers=headers, body=body) as answer:
            info = msgspec.json.decode(answer.read_all(), type=ObjectInfo)
            return Stored(info.size, info.etag, info.checksum, created=answer.status == 201)

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
                return meta_of(self.ref, answer)
        except FileNotFoundError as error:
            # A HEAD has no body, so what is missing can only be told in general.
            what = self.uri if transform_id is None else f"{self.uri} or transform {transform_id}"
            raise ObjectNotFound(f"{what} does not exist", request_id=getattr(error, "request_id", None)) from None

    def delete(self) -> None:
        """Remove the object; raises ObjectNotFound."""
        self._transport.request("DELETE", object_path(self.ref)).close()

    def _verify(self, sent: Watching, stored: Stored) -> None:
        digest = sent.checksum()
        if digest is not None and stored.checksum is not None:
            intact = digest == stored.checksum
        else:
            meta = self.head()
            # A newer object than ours is someone else's write, not damage.
            intact = meta.etag != stored.etag or meta.size == sent.sent
        if not intact:
            raise CorruptObject(f"{self.uri} was stored with other bytes than were sent; put it again")


class MemberHandle:
    """One member of a shard: it is read as an object is, and cannot be written alone."""

    def __init__(self, transport: Transport, ref: ObjectRef, name: str) -> None:
        self._transport = transport
        self.ref = ref
        """The shard."""
        self.name = name
        self._path = member_path(ref, name)

    def __repr__(self) -> str:
        return f"MemberHandle({str(self.ref)!r}, {self.name!r})"

    def url(self) -> str:
        """The URL under which any HTTP client gets the member."""
        return self._transport.endpoint + self._path

    def get(self) -> ObjectReader:
        """Open the member for reading; its `meta` is the member's, under the shard's key.

        Raises:
            ObjectNotFound, BucketNotFound, MemberNotFound: Something named does not exist.
            BadShard: The object is no good tar.
        """
        return ObjectReader(self._transport, self.ref, self._path)

    def read(self) -> bytes:
        """All bytes of the member."""
        return PlainBody(self._transport, self, self._path, self._transport.request("GET", self._path)).read_all()

    def get_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the member, fewer at its end; as `ObjectHandle.get_range`."""
        return _get_range(self._transport, self._path, self, start, stop)

    def head(self) -> ObjectMeta:
        """What is known of the member: its size, and an ETag that it has for itself."""
        try:
            with self._transport.request("HEAD", self._path) as answer:
                return meta_of(self.ref, answer)
        except FileNotFoundError as error:
            # A HEAD has no body, so what is missing can only be told in general.
            request_id = getattr(error, "request_id", None)
            raise MemberNotFound(
                f"{self.ref} or its member {self.name!r} does not exist", request_id=request_id
            ) from None


def _get_range(transport: Transport, path: str, what: object, start: int, stop: int) -> bytes:
    if not 0 <= start <= stop:
        raise BadRequest(f"range [{start}, {stop}) is not 0 <= start <= stop")
    if start == stop:
        return b""
    wanted = ByteRange(start, stop)
    answer = transport.request("GET", path, headers={"Range": str(wanted)})
    check_range(answer, wanted, what)
    return PlainBody(transport, what, path, answer, start, stop).read_all()


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


def _upload_of(body: Body, progress: Callable[[int], None] | None, stack: contextlib.ExitStack) -> Watching:
    if isinstance(body, bytes | bytearray | memoryview):
        return BytesUpload(body, progress)
    if isinstance(body, str | os.PathLike):
        body = stack.enter_context(io.FileIO(body))
    if (regular := regular_file(body)) is not None:
        upload = FileUpload(*regular, progress)
        if isinstance(body, io.BufferedReader):
            # It was read behind the back of its buffer.
            stack.callback(lambda file, start: file.seek(start + upload.sent), body, regular[1])
        return upload
    if isinstance(body, ObjectReader) and body.meta.size >= 0:
        return PiecesUpload(body, body.meta.size, progress)
    if hasattr(body, "read"):
        return PiecesUpload(blocks_of(body), None, progress)
    return PiecesUpload(body, None, progress)
