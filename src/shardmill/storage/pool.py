"""A bucket on our own disk: one file an object, its trailer behind its bytes.

A PUT is committed at one point, `_commit`: temporary file, bytes and trailer, fdatasync, rename, fsync of the
directory, index. What is acknowledged survives a kill, and a power cut too unless the store promises less; what is not
leaves the old object as it was, which is kept by a second name until the index has the new one.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar

from shardmill.core.conditions import Conditions
from shardmill.core.errors import (
    BucketNotFound,
    CorruptObject,
    ObjectNotFound,
    PreconditionFailed,
    ServerError,
    ShardmillError,
)
from shardmill.core.kept import Kept
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.refs import Bucket
from shardmill.storage.files import disk_errors, reserve, sync_directory, write_all
from shardmill.storage.index import Index
from shardmill.storage.journal import Journal
from shardmill.storage.kept import KeptKeys, Shelf
from shardmill.storage.locks import KeyLocks
from shardmill.storage.scan import scan
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK, Hasher, Trailer, pack, read_trailer
from shardmill.storage.uploads import receive

Durability = Literal["power", "kill"]
Value = TypeVar("Value")

_VERIFIED_OBJECTS = 10_000  # whose verified blocks are remembered
_TEMPORARY = "tmp"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a PUT did."""

    meta: ObjectMeta
    created: bool


class PoolSource:
    """One opened object."""

    def __init__(self, descriptor: int, trailer: Trailer, verified: bytearray, threads: ThreadPoolExecutor) -> None:
        self.descriptor = descriptor
        self.meta = trailer.meta
        self._trailer = trailer
        self._verified = verified
        self._threads = threads
        self._is_closed = False

    @property
    def is_whole(self) -> bool:
        return True

    def is_ready(self, start: int, stop: int) -> bool:
        """All blocks of [start, stop) were verified since boot."""
        return self._verified.find(0, start // BLOCK, -(-min(stop, self.meta.size) // BLOCK)) < 0

    async def ensure(self, start: int, stop: int) -> None:
        """Verify the blocks of [start, stop) that no one has verified since boot."""
        first, last = start // BLOCK, -(-min(stop, self.meta.size) // BLOCK)
        missing = [number for number in range(first, last) if not self._verified[number]]
        if missing:
            loop = asyncio.get_running_loop()
            await finish(loop.run_in_executor(self._threads, self._verify, missing))

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        await self.ensure(start, stop)
        return stop

    def release(self, position: int) -> None:
        """All of it stays."""

    async def check_unchanged(self) -> None:
        """A file of the pool is never written again, only replaced."""

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self.descriptor)

    def _verify(self, numbers: list[int]) -> None:
        with disk_errors(f"{self._trailer.bucket}/{self.meta.key}"):
            for number in numbers:
                size = min(BLOCK, self.meta.size - number * BLOCK)
                data = os.pread(self.descriptor, size, number * BLOCK)
                if len(data) != size or not self._trailer.is_block_right(number, data):
                    raise CorruptObject(
                        f"{self._trailer.bucket}/{self.meta.key}: block {number} fails its checksum; put it again"
                    )
                self._verified[number] = 1


class VerifiedBlocks:
    """Which blocks were found right since boot, shared by all readers of a version."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, bytearray] = OrderedDict()

    def of(self, trailer: Trailer) -> bytearray:
        """One byte a block; 1: found right."""
        known = self._known.get(trailer.version)
        if known is None:
            known = self._known[trailer.version] = bytearray(-(-trailer.size // BLOCK))
            if len(self._known) > _VERIFIED_OBJECTS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(trailer.version)
        return known


class PoolStore:
    """One pool bucket.

    Args:
        directory: Its own; made by `prepare`.
        identity: 16 hex digits, never used for another bucket.
    """

    def __init__(
        self,
        bucket: Bucket,
        directory: Path,
        identity: str,
        *,
        index: Callable[[], Index],
        journal: Journal,
        threads: ThreadPoolExecutor,
        durability: Durability,
        shelf: Shelf,
    ) -> None:
        self.bucket = bucket
        self.identity = identity
        self.directory = directory
        self._index = index
        self._journal = journal
        self._threads = threads
        self._is_durable = durability == "power"
        self._locks = KeyLocks()
        self._verified = VerifiedBlocks()
        self._kept = KeptKeys(shelf)
        self._made: set[Path] = set()
        self.is_removed = False

    def prepare(self) -> None:
        """Make its directories and sweep what uploads left behind; blocking."""
        temporary = self.directory / _TEMPORARY
        temporary.mkdir(parents=True, exist_ok=True)
        for path in temporary.iterdir():
            path.unlink()

    async def open(self, key: str, *, expected: tuple[int, int | None] | None = None) -> PoolSource:
        opening = asyncio.get_running_loop().run_in_executor(self._threads, self._open, key)
        descriptor, trailer = await opened(opening, lambda found: os.close(found[0]))
        return PoolSource(descriptor, trailer, self._verified.of(trailer), self._threads)

    def kept(self, key: str) -> Kept | None:
        """What is kept open of an object."""
        return self._kept.get(key)

    async def keep(self, key: str) -> Kept | None:
        """Open an object to be kept; None: it is being changed."""
        return await self._kept.open(key, self.open(key), lambda source: source.is_ready)

    def forget_kept(self) -> None:
        """The bucket is gone: nothing of it is read any more but by those who do."""
        self._kept.close()

    async def head(self, key: str) -> ObjectMeta:
        return (await self._in_thread(self._look, key)).meta

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        return await self._index().list(self.identity, prefix=prefix, delimiter=delimiter, after=after, limit=limit)

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
        upload = PoolUpload(self.directory / _TEMPORARY / secrets.token_hex(8), f"{self.bucket}/{key}")
        self._check_there()
        try:
            await receive(upload, body, size=size, checksum=checksum, threads=self._threads)
            # Whoever asked may leave, but a commit that has begun is seen through.
            return await finish(self._replace(upload, key, dict(user), conditions))
        except ServerError:
            self._check_there()  # a bucket that is removed takes its uploads along
            raise
        finally:
            if not upload.is_clean:
                await finish(self._in_thread(upload.discard))

    async def delete(self, key: str, *, conditions: Conditions) -> None:
        """See `core.sources.DeleteObject`."""
        await finish(self._remove(key, conditions))

    def quiet(self) -> AbstractAsyncContextManager[None]:
        """No object is being committed or removed for the block; whoever would waits."""
        return self._locks.hold_all()

    def look(self, key: str) -> ObjectMeta | None:
        """What the object's file says now; None: there is none. Blocking."""
        try:
            return self._look(key).meta
        except (ObjectNotFound, CorruptObject):
            return None

    def scan(self) -> Iterator[ObjectMeta]:
        """Metadata of every object, from the files; blocking. Torn ones are left out."""
        return scan(self.directory, hidden=_TEMPORARY)

    async def _replace(self, upload: "PoolUpload", key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        async with self._locks.hold(key):
            self._check_there()
            note = self._journal.note(self.identity, key)
            with self._kept.changing(key):
                try:
                    stored = await self._in_thread(self._commit, upload, key, user, conditions)
                    await self._index().put(self.identity, stored.meta)
                except ShardmillError:
                    if upload.has_replaced:
                        await self._in_thread(self._restore, upload, key)
                    self._journal.done(note)
                    raise
            self._journal.done(note)
            return stored

    async def _remove(self, key: str, conditions: Conditions) -> None:
        async with self._locks.hold(key):
            self._check_there()
            etag, modified = await self._in_thread(self._removable, key)
            if conditions.judge_write(etag, modified) == "failed":
                raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
            note = self._journal.note(self.identity, key)
            try:
                with self._kept.changing(key):
                    await self._in_thread(self._unlink, key)
            except ShardmillError:
                self._journal.done(note)
                raise
            # If this fails, the note stays: the next start takes the entry out, if no change does before.
            await self._index().remove(self.identity, key)
            self._journal.done(note)
            if self._is_durable:
                await self._in_thread(self._sync, key)

    def _check_there(self) -> None:
        if self.is_removed:
            raise BucketNotFound(f"bucket {self.bucket} was removed")

    def _removable(self, key: str) -> tuple[str | None, float]:
        """ETag and time of what is there; an object whose file is torn can be removed too."""
        try:
            trailer = self._look(key)
        except CorruptObject:
            return None, 0.0
        return trailer.meta.etag, trailer.modified

    def _commit(self, upload: "PoolUpload", key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        current = self.look(key)
        etag, modified = (current.etag, current.modified) if current else (None, None)
        if conditions.judge_write(etag, modified) == "failed":
            raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
        hasher = upload.hasher
        trailer = Trailer(
            str(self.bucket),
            key,
            hasher.size,
            hasher.checksum,
            hasher.blocks(),
            f"{time.time_ns():x}{secrets.token_hex(3)}",
            time.time(),
            user,
        )
        path = self._path(key)
        with disk_errors(f"{self.bucket}/{key}"):
            upload.end(pack(trailer), sync=self._is_durable)
            if path.parent not in self._made:
                path.parent.mkdir(exist_ok=True)
                if self._is_durable:
                    sync_directory(self.directory)
                self._made.add(path.parent)
            upload.replace(path)
            if self._is_durable:
                sync_directory(path.parent)
            upload.close()
        return Stored(trailer.meta, created=current is None)

    def _restore(self, upload: "PoolUpload", key: str) -> None:
        """Put back what was there before a commit that failed."""
        path = self._path(key)
        with disk_errors(f"{self.bucket}/{key}"):
            upload.restore(path)
            if self._is_durable:
                with contextlib.suppress(FileNotFoundError):
                    sync_directory(path.parent)

    def _unlink(self, key: str) -> None:
        with disk_errors(f"{self.bucket}/{key}"):
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                raise ObjectNotFound(f"no object {self.bucket}/{key}") from None

    def _sync(self, key: str) -> None:
        with disk_errors(f"{self.bucket}/{key}"):
            sync_directory(self._path(key).parent)

    def _open(self, key: str) -> tuple[int, Trailer]:
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ObjectNotFound(f"no object {self.bucket}/{key}") from None
        except OSError:
            with disk_errors(f"{self.bucket}/{key}"):
                raise
        try:
            with disk_errors(f"{self.bucket}/{key}"):
                trailer = read_trailer(descriptor)
            if trailer.key != key:
                raise CorruptObject(f"{self.bucket}/{key}: its file is that of another object")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, trailer

    def _look(self, key: str) -> Trailer:
        descriptor, trailer = self._open(key)
        os.close(descriptor)
        return trailer

    def _path(self, key: str) -> Path:
        name = blake2b(key.encode(), digest_size=20).hexdigest()
        return self.directory / name[:2] / name[2:]

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


class PoolUpload:
    """A temporary file that becomes an object, or nothing."""

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.hasher = Hasher()
        self._is_there = False
        self._old = path.with_suffix(".old")
        """Where the object that is replaced keeps a name until the commit is through."""
        self._state: Literal["new", "over_nothing", "over_kept", "over_lost"] = "new"
        self._label = label
        self._held: bytes | bytearray = b""
        self._is_reserved = False
        self._descriptor: int | None = None

    @property
    def has_replaced(self) -> bool:
        """It stands in the place of the object, or of nothing."""
        return self._state != "new"

    @property
    def is_clean(self) -> bool:
        """There is nothing to discard."""
        return self._descriptor is None and not self._is_there and self._state != "over_kept"

    def begin(self, size: int | None) -> None:
        with disk_errors(self._label):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._is_there = True
            # Small ones fit or fail at once; the call would cost them more than it saves.
            if size is not None and size > BLOCK:
                self._is_reserved = True
                reserve(self._descriptor, size)

    def append(self, data: bytes | bytearray) -> None:
        assert self._descriptor is not None
        with disk_errors(self._label):
            self.hasher.update(data)
            write_all(self._descriptor, data)

    def hold(self, data: bytes | bytearray) -> None:
        self._held = data

    def end(self, trailer: bytes, *, sync: bool) -> None:
        """Write the trailer, and before it what is held."""
        if self._descriptor is None:
            self.begin(None)
        assert self._descriptor is not None
        write_all(self._descriptor, self._held + trailer)
        if self._is_reserved:
            # What was reserved beyond the end would stand behind the trailer.
            os.ftruncate(self._descriptor, self.hasher.size + len(trailer))
        if sync:
            os.fdatasync(self._descriptor)

    def replace(self, path: Path) -> None:
        """Become the object at `path`."""
        state: Literal["over_nothing", "over_kept", "over_lost"] = "over_kept"
        try:
            os.link(path, self._old)
        except FileNotFoundError:
            state = "over_nothing"
        except OSError:
            # A file system without second names: what is replaced cannot be put back.
            state = "over_lost"
        os.rename(self.path, path)
        self._is_there = False
        self._state = state

    def restore(self, path: Path) -> None:
        """Undo `replace`."""
        if self._state == "over_kept":
            os.rename(self._old, path)
        elif self._state == "over_nothing":
            path.unlink(missing_ok=True)
        self._state = "new"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        """Close it, and leave nothing but the object that it may have become."""
        self.close()
        if self._is_there:
            self.path.unlink(missing_ok=True)
            self._is_there = False
        self._old.unlink(missing_ok=True)
