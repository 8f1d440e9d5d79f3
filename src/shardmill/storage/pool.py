"""A bucket on our own disk: one file an object, its trailer behind its bytes.

A PUT is committed at one point, `_commit`: temporary file, bytes and trailer, fdatasync, rename, fsync of the
directory, index. A small one goes through the log instead (`groups`), which is flushed once for many of them. What is
acknowledged survives a kill, and a power cut too unless the store promises less; what is not leaves the old object as
it was, which is kept by a second name until the index has the new one.
"""

import asyncio
import contextlib
import logging
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
from shardmill.storage.files import disk_errors, sync_directory, sync_file, write_all
from shardmill.storage.groups import Groups, Logged, SmallWrite
from shardmill.storage.index import Index
from shardmill.storage.journal import Generation, Journal
from shardmill.storage.kept import KeptKeys, Shelf
from shardmill.storage.locks import KeyLocks
from shardmill.storage.log import make, rewrite
from shardmill.storage.pool_upload import PoolUpload
from shardmill.storage.scan import scan
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK, Hasher, Trailer, pack, read_trailer
from shardmill.storage.uploads import receive

logger = logging.getLogger(__name__)

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
        groups: Callable[[], Groups],
        journal: Journal,
        threads: ThreadPoolExecutor,
        durability: Durability,
        shelf: Shelf,
    ) -> None:
        self.bucket = bucket
        self.identity = identity
        self.directory = directory
        self._root = str(directory)
        self._index = index
        self._groups = groups
        self._journal = journal
        self._threads = threads
        self.is_durable = durability == "power"
        self.is_keeping = True
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

    @property
    def index(self) -> Index:
        return self._index()

    async def open(self, key: str, *, expected: tuple[int, int | None] | None = None) -> PoolSource:
        logged = self._groups().find(self.identity, key)
        opening = (
            asyncio.get_running_loop().run_in_executor(self._threads, self._open, key)
            if logged is None
            else asyncio.get_running_loop().run_in_executor(self._threads, self._open_logged, logged)
        )
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
        logged = self._groups().find(self.identity, key)
        return logged.meta if logged is not None else (await self._in_thread(self._look, key)).meta

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        unlisted = await self._groups().tell_index(self.identity)
        return await self._index().list(
            self.identity, prefix=prefix, delimiter=delimiter, after=after, limit=limit, unlisted=unlisted
        )

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
            descriptor, trailer = self._open_once(key)
            os.close(descriptor)
            return trailer.meta
        except (ObjectNotFound, CorruptObject):
            return None

    def scan(self) -> Iterator[ObjectMeta]:
        """Metadata of every object, from the files; blocking. Torn ones are left out."""
        return scan(self.directory, hidden=_TEMPORARY)

    def restore(self, key: str, content: bytes) -> None:
        """Make an object's file what was logged of it; blocking, and not durable by itself."""
        with disk_errors(f"{self.bucket}/{key}"):
            rewrite(self.path(key), self.directory / _TEMPORARY / secrets.token_hex(8), content)

    def put_whole(
        self,
        key: str,
        body: bytes | bytearray | memoryview,
        *,
        user: Mapping[str, str],
        conditions: Conditions,
        checksum: str | None,
        done: Callable[[Stored | None, BaseException | None], None],
    ) -> bool:
        """See `core.sources.PutWhole`."""
        hasher = Hasher()
        hasher.update(body)
        is_right = checksum is None or checksum == f"xxh3:{hasher.checksum}"
        if not is_right or self.is_removed or not self._locks.take_nowait(key):
            return False
        changing = self._kept.changing(key)
        changing.__enter__()

        def end(write: SmallWrite, error: BaseException | None) -> None:
            changing.__exit__(None, None, None)
            self._locks.release(key)
            is_stored = error is None and write.is_logged
            done(Stored(write.meta, created=write.is_new) if is_stored else None, error)

        self._groups().add(self._small_write(key, body, self._trailer(key, hasher, dict(user)), conditions, end))
        return True

    async def _replace(self, upload: PoolUpload, key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        async with self._locks.hold(key):
            self._check_there()
            if upload.is_held:
                stored = await self._log(upload, key, user, conditions)
                if stored is not None:
                    return stored
            await self._settle(key)
            note = self._journal.note(self.identity, key)
            try:
                with self._kept.changing(key):
                    stored = await self._commit_large(upload, key, user, conditions, note)
            except ShardmillError:
                # What could not be undone stands there: the note stays, and the next start tells the index.
                if not upload.has_replaced:
                    self._journal.done(note)
                raise
            self._journal.done(note)
            return stored

    async def _log(self, upload: PoolUpload, key: str, user: dict[str, str], conditions: Conditions) -> Stored | None:
        """Store a small object by the log alone; None: it cannot take it."""
        ended: asyncio.Future[SmallWrite] = asyncio.get_running_loop().create_future()

        def end(write: SmallWrite, error: BaseException | None) -> None:
            if error is None:
                ended.set_result(write)
            else:
                ended.set_exception(error)

        trailer = self._trailer(key, upload.hasher, user)
        with self._kept.changing(key):
            self._groups().add(self._small_write(key, upload.held, trailer, conditions, end))
            write = await ended
        return Stored(write.meta, created=write.is_new) if write.is_logged else None

    def _small_write(
        self,
        key: str,
        body: bytes | bytearray | memoryview,
        trailer: Trailer,
        conditions: Conditions,
        done: Callable[[SmallWrite, BaseException | None], None],
    ) -> SmallWrite:
        return SmallWrite(self, key, trailer.meta, b"".join((body, pack(trailer))), conditions, done)

    async def _commit_large(
        self, upload: PoolUpload, key: str, user: dict[str, str], conditions: Conditions, note: Generation
    ) -> Stored:
        try:
            stored = await self._in_thread(self._commit, upload, key, user, conditions, note)
            await self._index().put(self.identity, stored.meta)
        except ShardmillError:
            if upload.has_replaced:
                await self._in_thread(self._restore, upload, key)
            raise
        return stored

    def note(self, key: str) -> Generation:
        """Note that a key is about to change; given back to `forget_note`."""
        return self._journal.note(self.identity, key)

    def forget_note(self, note: Generation) -> None:
        """The index has the change, or it was not made."""
        self._journal.done(note)

    async def _settle(self, key: str) -> None:
        """What the log has of a key must not be taken for newer than what is about to be written without it."""
        groups = self._groups()
        if groups.has(self.identity, key):
            await groups.settle(self, key)

    async def _remove(self, key: str, conditions: Conditions) -> None:
        async with self._locks.hold(key):
            self._check_there()
            etag, modified = await self._removable(key)
            if conditions.judge_write(etag, modified) == "failed":
                raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
            note = self._journal.note(self.identity, key)
            try:
                with self._kept.changing(key):
                    await self._remove_stored(key, note)
            except ShardmillError:
                self._journal.done(note)
                raise
            # If this fails, the note stays: the next start takes the entry out, if no change does before.
            await self._index().remove(self.identity, key)
            self._journal.done(note)

    async def _remove_stored(self, key: str, note: Generation) -> None:
        if self.is_durable:
            await self._in_thread(self._sync_note, note)
        groups = self._groups()
        if groups.find(self.identity, key) is not None and await groups.remove(self, key):
            return
        await self._settle(key)
        await self._in_thread(self._unlink, key)

    def _check_there(self) -> None:
        if self.is_removed:
            raise BucketNotFound(f"bucket {self.bucket} was removed")

    async def _removable(self, key: str) -> tuple[str | None, float]:
        """ETag and time of what is there; an object whose file is torn can be removed too."""
        try:
            meta = await self.head(key)
        except CorruptObject:
            return None, 0.0
        return meta.etag, meta.modified

    def _trailer(self, key: str, hasher: Hasher, user: dict[str, str]) -> Trailer:
        return Trailer(
            str(self.bucket),
            key,
            hasher.size,
            hasher.checksum,
            hasher.blocks(),
            f"{time.time_ns():x}{secrets.token_hex(3)}",
            time.time(),
            user,
        )

    def write(self, upload: PoolUpload, key: str, user: dict[str, str], conditions: Conditions) -> Stored:
        """Judge the conditions and write what stands behind the bytes; blocking. Returns what the commit will do."""
        current = self.look(key)
        etag, modified = (current.etag, current.modified) if current else (None, None)
        if conditions.judge_write(etag, modified) == "failed":
            raise PreconditionFailed(f"{self.bucket}/{key} does not meet the conditions; it is unchanged")
        trailer = self._trailer(key, upload.hasher, user)
        with disk_errors(f"{self.bucket}/{key}"):
            upload.end(pack(trailer))
        return Stored(trailer.meta, created=current is None)

    # What the log asks for; see `groups.Owner`.

    def look_up(self, key: str) -> ObjectMeta | None:
        return self.look(key) if self._index().may_have(self.identity, key) else None

    def make_file(self, key: str, content: bytes) -> None:
        with disk_errors(f"{self.bucket}/{key}"):
            # Text: as paths these cost as much as the file.
            make("/".join((self._root, *_folder_and_name(key))), self._temporary, content)

    def remove_file(self, key: str) -> None:
        path = self.path(key)
        with disk_errors(f"{self.bucket}/{key}"), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            if self.is_durable:
                sync_directory(path.parent)

    def sync_file(self, key: str) -> None:
        if not self.is_durable:
            return
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            with disk_errors(f"{self.bucket}/{key}"):
                sync_file(path)
            self.make_folder(path.parent)
            with disk_errors(f"{self.bucket}/{key}"):
                sync_directory(path.parent)

    def make_folder(self, folder: Path) -> None:
        """Of objects; blocking."""
        if folder not in self._made:
            with disk_errors(str(self.bucket)):
                folder.mkdir(exist_ok=True)
                if self.is_durable:
                    sync_directory(self.directory)
            self._made.add(folder)

    def _commit(
        self, upload: PoolUpload, key: str, user: dict[str, str], conditions: Conditions, note: Generation
    ) -> Stored:
        stored = self.write(upload, key, user, conditions)
        path = self.path(key)
        self.make_folder(path.parent)
        with disk_errors(f"{self.bucket}/{key}"):
            if self.is_durable:
                upload.sync()
                note.sync()
            upload.replace(path)
            if self.is_durable:
                sync_directory(path.parent)
            upload.close()
        return stored

    def _restore(self, upload: PoolUpload, key: str) -> None:
        """Put back what was there before a commit that failed."""
        path = self.path(key)
        with disk_errors(f"{self.bucket}/{key}"):
            upload.restore(path)
            if self.is_durable:
                with contextlib.suppress(FileNotFoundError):
                    sync_directory(path.parent)

    def _sync_note(self, note: Generation) -> None:
        with disk_errors(str(self.bucket)):
            note.sync()

    def _unlink(self, key: str) -> None:
        with disk_errors(f"{self.bucket}/{key}"):
            try:
                os.unlink(self.path(key))
            except FileNotFoundError:
                raise ObjectNotFound(f"no object {self.bucket}/{key}") from None
            if self.is_durable:
                sync_directory(self.path(key).parent)

    def _open_logged(self, logged: Logged) -> tuple[int, Trailer]:
        groups, newest = self._groups(), logged
        while True:
            try:
                groups.make_file(newest)
            except ShardmillError as error:
                content = newest.content()
                if groups.find(self.identity, logged.key) is newest:
                    # It is logged still, so the bytes were not those of a later turn.
                    logger.warning("an object is read from the log: %s", error)
                    return self._open_content(logged.key, content)
            found = groups.find(self.identity, logged.key)
            if found is None or found is newest:
                return self._open(logged.key)
            # It was replaced before its file was made, and what is there may be older than both.
            newest = found

    def _open_content(self, key: str, content: bytes) -> tuple[int, Trailer]:
        """The disk cannot take its file now."""
        with disk_errors(f"{self.bucket}/{key}"):
            descriptor = os.memfd_create("logged", os.MFD_CLOEXEC)
            try:
                write_all(descriptor, content)
                return descriptor, read_trailer(descriptor)
            except BaseException:
                os.close(descriptor)
                raise

    def _open(self, key: str) -> tuple[int, Trailer]:
        try:
            return self._open_once(key)
        except CorruptObject:
            # It may have been met while it was being made of what is logged.
            self._groups().wait_made()
            return self._open_once(key)

    def _open_once(self, key: str) -> tuple[int, Trailer]:
        try:
            descriptor = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
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

    def path(self, key: str) -> Path:
        """Of an object's file."""
        return self.directory.joinpath(*_folder_and_name(key))

    def _temporary(self) -> Path:
        return self.directory / _TEMPORARY / secrets.token_hex(8)

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def _folder_and_name(key: str) -> tuple[str, str]:
    name = blake2b(key.encode(), digest_size=20).hexdigest()
    return name[:2], name[2:]
