"""A bucket that is a directory, served as it stands: nothing is imported, nothing outside the tree is reached.

A file has no version of its own, so four stat fields stand for one, and a file that changes under its reader ends that
answer. Keys that a file system cannot hold are refused, never rewritten.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from shardmill.core.conditions import Conditions
from shardmill.core.errors import BadRequest, Conflict, ObjectNotFound, PreconditionFailed, ServerError, ShardmillError
from shardmill.core.kept import Kept
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.refs import Bucket
from shardmill.core.sources import Source
from shardmill.storage.files import disk_error, disk_errors, reserve, write_all
from shardmill.storage.kept import KeptKeys, Shelf
from shardmill.storage.locks import KeyLocks
from shardmill.storage.paging import list_page
from shardmill.storage.pool import Stored
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK, Hasher
from shardmill.storage.tree import Place, RootGone, Tree
from shardmill.storage.uploads import receive
from shardmill.storage.walk import Found, Walk

Links = Literal["refuse", "follow"]
Value = TypeVar("Value")

TEMPORARY = b".shardmill-"
"""Start of the names of uploads in progress; never listed."""

_USER = "user.shardmill.meta"  # extended attribute with user metadata, JSON


class _Version(NamedTuple):
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
        version = str(self)
        etag = blake2b(version.encode(), digest_size=16).hexdigest()
        return ObjectMeta(key, self.size, etag, version, self.mtime_ns / 1e9, None, user)


class DirectorySource:
    """One opened file."""

    def __init__(self, bucket: Bucket, key: str, descriptor: int) -> None:
        self.descriptor = descriptor
        self._label = f"{bucket}/{key}"
        status = os.fstat(descriptor)
        self._version, self._device = _Version.of(status), status.st_dev
        self.meta = self._version.meta(key, _read_user(descriptor))
        self._is_closed = False

    @property
    def is_whole(self) -> bool:
        return True

    def is_ready(self, start: int, stop: int) -> bool:
        return True

    def is_at(self, place: Place) -> bool:
        """Whether an opening there would find this very file, unchanged."""
        now = place.status()
        if now is None or now.st_dev != self._device:
            return False
        # As `_Version.of`, without making one for each request.
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_nlink) == self._version

    async def ensure(self, start: int, stop: int) -> None:
        """The bytes are there; there is no checksum to verify them by."""

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        await self.ensure(start, stop)
        return stop

    def release(self, position: int) -> None:
        """All of it stays."""

    async def check_unchanged(self) -> None:
        if not self._version.is_same(_Version.of(os.fstat(self.descriptor))):
            raise Conflict(f"{self._label} changed while it was read; read it again")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self.descriptor)


class DirectoryStore:
    """A directory as a bucket; `writable` decides who asks for `put` and `delete` at all.

    Args:
        is_far: A look at a name may have to wait for a network, so nothing is kept open that would be looked at.
        is_made_up: Times of folders need not tell of changes, so no names are remembered.
    """

    def __init__(
        self,
        bucket: Bucket,
        path: Path,
        *,
        links: Links,
        threads: ThreadPoolExecutor,
        is_durable: bool,
        shelf: Shelf,
        is_far: bool = False,
        is_made_up: bool = False,
    ) -> None:
        self.bucket = bucket
        self.is_keeping = not is_far
        self._kept = KeptKeys(shelf, self._is_there)
        self._tree = Tree(os.fsencode(path), follows=links == "follow")
        self._walk = Walk(self._tree, is_hidden=lambda name: name.startswith(TEMPORARY), remembers=not is_made_up)
        self._threads = threads
        self._is_durable = is_durable
        self._locks = KeyLocks()

    def sweep(self) -> None:
        """Remove what uploads of killed nodes left behind; those that go on are locked. Blocking."""
        with disk_errors(str(self.bucket)), self._tree.folder(()) as root:
            for name in os.listdir(root):
                if os.fsencode(name).startswith(TEMPORARY):
                    _sweep_upload(name, root)

    async def open(self, key: str, *, expected: tuple[int, int | None] | None = None) -> DirectorySource:
        opening = asyncio.get_running_loop().run_in_executor(self._threads, self._open, key)
        return await opened(opening, DirectorySource.close)

    def kept(self, key: str) -> Kept | None:
        """What is kept open of a file, or that there was none."""
        return self._kept.get(key)

    async def keep(self, key: str) -> Kept | None:
        """Open a file to be kept; None: it is being changed."""
        return await self._kept.open(key, self.open(key), lambda source: source.is_ready)

    def _is_there(self, key: str, source: Source | None) -> Callable[[], bool]:
        """The look that tells whether what was opened is what an opening would find now."""
        place = self._tree.place(self._names(key))
        return partial(source.is_at, place) if isinstance(source, DirectorySource) else place.is_empty

    async def head(self, key: str) -> ObjectMeta:
        return await self._in_thread(self._head, key)

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        def read() -> ListPage:
            with disk_errors(str(self.bucket)):
                return list_page(
                    self._walk.seek, self._listed, prefix=prefix, delimiter=delimiter, after=after, limit=limit
                )

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
        upload = _FileUpload(self._tree, self._names(key), f"{self.bucket}/{key}")
        try:
            await receive(upload, body, size=size, checksum=checksum, threads=self._threads)
            return await finish(self._replace(upload, key, dict(user), conditions))
        finally:
            if not upload.is_clean:
                await finish(self._in_thread(upload.discard))

    async def delete(self, key: str, *, conditions: Conditions) -> None:
        """See `core.sources.DeleteObject`."""

        async def remove() -> None:
            async with self._locks.hold(key):
                current = await self.head(key)
                if conditions.judge_write(current.etag, current.modified) == "failed":
                    raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
                await self._in_thread(self._unlink, key)

        await finish(remove())

    async def _replace(self, upload: "_FileUpload", key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        async with self._locks.hold(key):
            return await self._in_thread(self._commit, upload, key, user, conditions)

    def _commit(self, upload: "_FileUpload", key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        try:
            current: ObjectMeta | None = self._head(key)
        except ObjectNotFound:
            current = None
        etag, modified = (current.etag, current.modified) if current else (None, None)
        if conditions.judge_write(etag, modified) == "failed":
            raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
        meta = upload.commit(key, user, self._is_durable)
        checksum = f"xxh3:{upload.hasher.checksum}"
        return Stored(msgspec.structs.replace(meta, checksum=checksum), created=current is None)

    def _names(self, key: str) -> Sequence[bytes]:
        """A key as names below the root.

        Raises:
            BadRequest: No file can have it; the message says why.
        """
        names = key.encode().split(b"/")
        for name in names:
            if name in (b"", b".", b".."):
                shown = name.decode() or "an empty segment"
                raise BadRequest(f"{self.bucket} is a directory, which cannot hold the key {key!r} ({shown})")
            if len(name) > 255:
                raise BadRequest(f"{self.bucket} is a directory, whose names have at most 255 bytes; {key!r} has more")
            if name.startswith(TEMPORARY):
                raise BadRequest(f"names that start with {TEMPORARY.decode()!r} are kept for uploads in progress")
        return names

    def _open(self, key: str) -> DirectorySource:
        names = self._names(key)
        try:
            descriptor = self._tree.open(names)
        except OSError as error:
            raise self._not_opened(error, key) from None
        try:
            return DirectorySource(self.bucket, key, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _not_opened(self, error: OSError, key: str) -> ShardmillError:
        label = f"{self.bucket}/{key}"
        if error.errno == errno.ELOOP:
            return ObjectNotFound(f"{label} is a symbolic link; serve it with links = follow")
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return ObjectNotFound(f"no object {label}")
        # A failure is not an absence: a reader who is told 404 would skip data that is there.
        return disk_error(error, label)

    def _head(self, key: str) -> ObjectMeta:
        source = self._open(key)
        source.close()
        return source.meta

    def _listed(self, key: bytes, found: Found) -> ObjectMeta | None:
        """Metadata of a listed file; user metadata costs a call more and is left to HEAD."""
        status = self._walk.status(found)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        return _Version.of(status).meta(key.decode(), {})

    def _unlink(self, key: str) -> None:
        try:
            self._tree.unlink(self._names(key), sync=self._is_durable)
        except OSError as error:
            raise self._not_opened(error, key) from None

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


class _FileUpload:
    """A temporary file in the root, where no folder that is emptied meanwhile takes it along."""

    def __init__(self, tree: Tree, names: Sequence[bytes], label: str) -> None:
        self.hasher = Hasher()
        self._tree = tree
        self._names = names
        self._name = TEMPORARY + secrets.token_hex(8).encode()
        self._label = label
        self._held: bytes | bytearray = b""
        self._descriptor: int | None = None
        self._is_there = False

    @property
    def is_clean(self) -> bool:
        """There is nothing to discard."""
        return self._descriptor is None and not self._is_there

    def begin(self, size: int | None) -> None:
        with disk_errors(self._label), self._tree.folder(()) as root:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._name, flags, 0o666, dir_fd=root)
            self._is_there = True
            with contextlib.suppress(OSError):
                # Tells the sweep of another node on this directory that somebody writes it.
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if size is not None and size > BLOCK:
                reserve(self._descriptor, size)

    def append(self, data: bytes | bytearray | memoryview) -> None:
        assert self._descriptor is not None
        with disk_errors(self._label):
            self.hasher.update(data)
            write_all(self._descriptor, data)

    def hold(self, data: bytes | bytearray) -> None:
        self._held = data

    def commit(self, key: str, user: dict[str, str], is_durable: bool) -> ObjectMeta:
        """Into place, all at once."""
        if self._descriptor is None:
            self.begin(None)
        assert self._descriptor is not None
        with disk_errors(self._label):
            write_all(self._descriptor, self._held)
            if user:
                self._keep_user(user)
            os.ftruncate(self._descriptor, self.hasher.size)
            if is_durable:
                os.fsync(self._descriptor)
            self._rename()
            self._is_there = False
            if is_durable:
                self._tree.sync(self._names)
            meta = _Version.of(os.fstat(self._descriptor)).meta(key, user)
            self.close()
            return meta

    def _rename(self) -> None:
        *folders, name = self._names
        # A folder that a deletion empties away meanwhile is made again.
        for _ in range(3):
            try:
                with self._tree.folder(()) as root, self._tree.folder(folders, make=True) as folder:
                    self._check_target(name, folder)
                    os.rename(self._name, name, src_dir_fd=root, dst_dir_fd=folder)
                    return
            except RootGone:
                raise
            except FileNotFoundError:
                continue
            except (NotADirectoryError, IsADirectoryError):
                raise Conflict(f"{self._label}: a directory cannot hold both this key and one below it") from None
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                raise Conflict(f"{self._label}: its folder lies on another file system than the bucket") from None
        raise ServerError(f"{self._label}: its directory keeps disappearing")

    def _check_target(self, name: bytes, folder: int) -> None:
        kind = self._tree.kind(name, folder)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError
        if kind not in (None, stat.S_IFREG) and not (kind == stat.S_IFLNK and self._tree.follows):
            raise Conflict(f"{self._label}: what stands there is no file, and is left alone")

    def _keep_user(self, user: dict[str, str]) -> None:
        assert self._descriptor is not None
        try:
            os.setxattr(self._descriptor, _USER, json.dumps(user).encode())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                raise BadRequest(f"{self._label}: this file system keeps no user metadata") from None
            raise

    def discard(self) -> None:
        """Close it, and remove it unless it has become an object."""
        if self._is_there:
            with contextlib.suppress(OSError), self._tree.folder(()) as root:
                os.unlink(self._name, dir_fd=root)
            self._is_there = False
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _sweep_upload(name: str, root: int) -> None:
    """Remove an upload unless its node still runs."""
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=root)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=root)
        finally:
            os.close(descriptor)


def _read_user(descriptor: int) -> dict[str, str]:
    try:
        found = json.loads(os.getxattr(descriptor, _USER))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
