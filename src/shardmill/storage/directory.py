"""A bucket that is a directory, served as it stands: nothing is imported, nothing outside the tree is reached.

A file has no version of its own, so four stat fields stand for one, and a file that changes under its reader ends that
answer. Keys that a file system cannot hold are refused, never rewritten.
"""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import stat
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar

from shardmill.core.conditions import Conditions
from shardmill.core.errors import (
    BadRequest,
    Conflict,
    ObjectNotFound,
    PreconditionFailed,
    ServerError,
    ShardmillError,
)
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.refs import Bucket
from shardmill.storage.files import disk_errors, reserve, sync_directory, write_all
from shardmill.storage.locks import KeyLocks
from shardmill.storage.paging import list_page
from shardmill.storage.pool import Stored
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK, Hasher
from shardmill.storage.uploads import receive

Links = Literal["refuse", "follow"]
Value = TypeVar("Value")

TEMPORARY = ".shardmill-"
"""Start of the names of uploads in progress; never listed."""

_USER = "user.shardmill.meta"  # extended attribute with user metadata, JSON
_KEPT_LISTINGS = 64  # sorted directories remembered between pages
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class _Version:
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    links: int

    @classmethod
    def of(cls, status: os.stat_result) -> "_Version":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_nlink)

    def __str__(self) -> str:
        return f"{self.size:x}-{self.mtime_ns:x}-{self.ctime_ns:x}-{self.inode:x}"

    def is_same(self, now: "_Version") -> bool:
        """Whether the bytes are still those; another name for the file, or its removal, changes ctime alone."""
        if (self.size, self.mtime_ns, self.inode) != (now.size, now.mtime_ns, now.inode):
            return False
        return self.ctime_ns == now.ctime_ns or self.links != now.links

    def meta(self, key: str, user: Mapping[str, str]) -> ObjectMeta:
        etag = blake2b(str(self).encode(), digest_size=16).hexdigest()
        return ObjectMeta(key, self.size, etag, str(self), self.mtime_ns / 1e9, None, user)


class DirectorySource:
    """One opened file."""

    def __init__(self, bucket: Bucket, key: str, descriptor: int) -> None:
        self.descriptor = descriptor
        self._label = f"{bucket}/{key}"
        self._version = _Version.of(os.fstat(descriptor))
        self.meta = self._version.meta(key, _read_user(descriptor))
        self._is_closed = False

    async def ensure(self, start: int, stop: int) -> None:
        """The bytes are there; there is no checksum to verify them by."""

    async def check_unchanged(self) -> None:
        if not self._version.is_same(_Version.of(os.fstat(self.descriptor))):
            raise Conflict(f"{self._label} changed while it was read; read it again")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self.descriptor)


class DirectoryStore:
    """A directory as a bucket; `writable` decides who asks for `put` and `delete` at all."""

    def __init__(
        self, bucket: Bucket, path: Path, *, links: Links, threads: ThreadPoolExecutor, is_durable: bool
    ) -> None:
        self.bucket = bucket
        self.path = path
        self._root = os.fsencode(path)
        self._follows = links == "follow"
        self._threads = threads
        self._is_durable = is_durable
        self._locks = KeyLocks()
        self._listings: OrderedDict[bytes, tuple[tuple[int, int], list[bytes]]] = OrderedDict()

    async def open(self, key: str) -> DirectorySource:
        opening = asyncio.get_running_loop().run_in_executor(self._threads, self._open, key)
        return await opened(opening, DirectorySource.close)

    async def head(self, key: str) -> ObjectMeta:
        return await self._in_thread(self._head, key)

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        def read() -> ListPage:
            with disk_errors(str(self.bucket)):
                return list_page(self._seek, prefix=prefix, delimiter=delimiter, after=after, limit=limit)

        return await self._in_thread(read)

    async def put(
        self,
        key: str,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
    ) -> Stored:
        """See `core.sources.PutObject`."""
        segments = self._segments(key)
        upload = _FileUpload(self._root, segments, f"{self.bucket}/{key}")
        try:
            await receive(upload, body, size=size, checksum=checksum, threads=self._threads)
            return await finish(self._replace(upload, key, dict(user), conditions))
        finally:
            await finish(self._in_thread(upload.discard))

    async def delete(self, key: str, *, conditions: Conditions) -> None:
        async def remove() -> None:
            async with self._locks.hold(key):
                current = await self.head(key)
                if conditions.judge_write(current.etag, current.modified) == "failed":
                    raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
                await self._in_thread(self._unlink, key)

        await finish(remove())

    async def _replace(self, upload: "_FileUpload", key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        async with self._locks.hold(key):
            try:
                current: ObjectMeta | None = await self.head(key)
            except ObjectNotFound:
                current = None
            etag, modified = (current.etag, current.modified) if current else (None, None)
            if conditions.judge_write(etag, modified) == "failed":
                raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
            meta = await self._in_thread(upload.commit, key, user, self._is_durable)
            return Stored(replace(meta, checksum=f"xxh3:{upload.hasher.checksum}"), created=current is None)

    def _segments(self, key: str) -> Sequence[bytes]:
        """A key as names below the root.

        Raises:
            BadRequest: No file can have it; the message says why.
        """
        segments = key.encode().split(b"/")
        for segment in segments:
            if segment in (b"", b".", b".."):
                shown = segment.decode() or "an empty segment"
                raise BadRequest(f"{self.bucket} is a directory, which cannot hold the key {key!r} ({shown})")
            if len(segment) > 255:
                raise BadRequest(f"{self.bucket} is a directory, whose names have at most 255 bytes; {key!r} has more")
            if segment.startswith(TEMPORARY.encode()):
                raise BadRequest(f"names that start with {TEMPORARY!r} are kept for uploads in progress")
        return segments

    def _open(self, key: str) -> DirectorySource:
        segments = self._segments(key)
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        nofollow = 0 if self._follows else os.O_NOFOLLOW
        try:
            for segment in segments[:-1]:
                inner = os.open(segment, _OPEN | os.O_DIRECTORY | nofollow, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(segments[-1], _OPEN | nofollow, dir_fd=folder)
        except OSError as error:
            raise self._not_opened(error, key) from None
        finally:
            os.close(folder)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ObjectNotFound(f"no object {self.bucket}/{key}")
            return DirectorySource(self.bucket, key, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _not_opened(self, error: OSError, key: str) -> ShardmillError:
        if error.errno == errno.ELOOP:
            return ObjectNotFound(f"{self.bucket}/{key} is behind a symbolic link; serve it with links = follow")
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO):
            return ObjectNotFound(f"no object {self.bucket}/{key}")
        # A failure is not an absence: a reader who is told 404 would skip data that is there.
        return ServerError(f"{self.bucket}/{key}: the disk failed: {os.strerror(error.errno or 0)}")

    def _head(self, key: str) -> ObjectMeta:
        source = self._open(key)
        source.close()
        return source.meta

    def _unlink(self, key: str) -> None:
        segments = self._segments(key)
        with disk_errors(f"{self.bucket}/{key}"):
            path = b"/".join([self._root, *segments])
            os.unlink(path)
            if self._is_durable:
                sync_directory(Path(os.fsdecode(os.path.dirname(path))))
            # A directory without files is no prefix, and would stand in the way of a key of its name.
            for depth in range(len(segments) - 1, 0, -1):
                with contextlib.suppress(OSError):
                    os.rmdir(b"/".join([self._root, *segments[:depth]]))
                    continue
                break

    def _seek(self, bound: bytes) -> Iterator[tuple[bytes, Callable[[], ObjectMeta | None]]]:
        return self._walk(self._root, b"", bound)

    def _walk(
        self, folder: bytes, base: bytes, bound: bytes
    ) -> Iterator[tuple[bytes, Callable[[], ObjectMeta | None]]]:
        """Files below a folder in key order, from `bound` on; `base` is the folder's own key with its slash."""
        names = self._names(folder)
        rest = bound[len(base) :] if bound.startswith(base) else b""
        # The entry before the bound may be a directory that holds it.
        position = max(0, bisect_left(names, rest) - 1) if rest else 0
        for name in names[position:]:
            key = base + name
            if name.endswith(b"/"):
                if bound <= key or bound.startswith(key):
                    yield from self._walk(folder + b"/" + name[:-1], key, bound)
            elif key >= bound:
                yield key, lambda path=folder + b"/" + name, key=key: self._meta(path, key)  # type: ignore[misc]  # bound at once

    def _names(self, folder: bytes) -> Sequence[bytes]:
        """Names in a folder in key order, directories with their slash; a large folder is not sorted for each page."""
        try:
            status = os.stat(folder)
        except FileNotFoundError:
            return []
        identity = (status.st_ino, status.st_mtime_ns)
        known = self._listings.get(folder)
        if known is not None and known[0] == identity:
            return known[1]
        try:
            with os.scandir(folder) as entries:
                names = sorted(name for entry in entries if (name := self._key_name(entry)) is not None)
        except (FileNotFoundError, NotADirectoryError):
            return []
        self._listings[folder] = identity, names
        if len(self._listings) > _KEPT_LISTINGS:
            with contextlib.suppress(KeyError):
                self._listings.popitem(last=False)
        return names

    def _key_name(self, entry: "os.DirEntry[bytes]") -> bytes | None:
        """The entry's part of a key; None for what is no object."""
        name = entry.name
        if name.startswith(TEMPORARY.encode()) or any(byte < 0x20 or byte == 0x7F for byte in name):
            return None
        try:
            name.decode()
            if entry.is_dir(follow_symlinks=self._follows):
                return name + b"/"
            return name if entry.is_file(follow_symlinks=self._follows) else None
        except (UnicodeDecodeError, OSError):
            return None

    def _meta(self, path: bytes, key: bytes) -> ObjectMeta | None:
        try:
            status = os.stat(path, follow_symlinks=self._follows)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _Version.of(status).meta(key.decode(), {}) if stat.S_ISREG(status.st_mode) else None

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


class _FileUpload:
    """A temporary file beside its target."""

    def __init__(self, root: bytes, segments: Sequence[bytes], label: str) -> None:
        self.hasher = Hasher()
        self._root = root
        self._folder = b"/".join([root, *segments[:-1]])
        self._target = self._folder + b"/" + segments[-1]
        # In the root, where nobody removes it as an empty directory's content would be.
        self._path = root + b"/" + TEMPORARY.encode() + secrets.token_hex(8).encode()
        self._label = label
        self._descriptor: int | None = None
        self._is_there = False

    def begin(self, size: int | None) -> None:
        with disk_errors(self._label):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._is_there = True
            if size is not None and size > BLOCK:
                reserve(self._descriptor, size)

    def append(self, data: bytes | bytearray) -> None:
        assert self._descriptor is not None
        with disk_errors(self._label):
            self.hasher.update(data)
            write_all(self._descriptor, data)

    def commit(self, key: str, user: dict[str, str], is_durable: bool) -> ObjectMeta:
        assert self._descriptor is not None
        with disk_errors(self._label):
            if user:
                self._keep_user(user)
            os.ftruncate(self._descriptor, self.hasher.size)
            if is_durable:
                os.fsync(self._descriptor)
            try:
                self._rename()
            except (NotADirectoryError, IsADirectoryError, FileExistsError):
                raise Conflict(f"{self._label}: a directory cannot hold both this key and one below it") from None
            if is_durable:
                folder = self._folder
                sync_directory(Path(os.fsdecode(folder)))
                while folder != self._root:
                    folder = os.path.dirname(folder)
                    sync_directory(Path(os.fsdecode(folder)))
            self._is_there = False
            return _Version.of(os.fstat(self._descriptor)).meta(key, user)

    def _rename(self) -> None:
        """Into place; a folder that a deletion has just emptied away is made again."""
        for _ in range(3):
            os.makedirs(self._folder, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._path, self._target)
                return
        raise ServerError(f"{self._label}: its directory keeps disappearing")

    def _keep_user(self, user: dict[str, str]) -> None:
        assert self._descriptor is not None
        try:
            os.setxattr(self._descriptor, _USER, json.dumps(user).encode())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                raise BadRequest(f"{self._label}: this file system keeps no user metadata") from None
            raise

    def discard(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._is_there:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._is_there = False


def _read_user(descriptor: int) -> dict[str, str]:
    try:
        found = json.loads(os.getxattr(descriptor, _USER))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
