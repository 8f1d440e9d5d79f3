"""Finished outputs of runs: files of their own under a quota, the least used leaving first.

A result is a cache entry: nothing is synced, a torn file is swept at the next start, and its blocks are verified like
those of any stored object. What is open is never evicted. The file of a scratch result that nobody has opened may
become that of the next run (see `reuse`).
"""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shardmill.core.errors import CorruptObject, InsufficientStorage
from shardmill.core.kept import Kept
from shardmill.core.meta import ObjectMeta
from shardmill.core.sources import ResultEntry, ResultStatistics
from shardmill.storage.files import disk_errors, write_all_at
from shardmill.storage.pool import PoolSource, VerifiedBlocks
from shardmill.storage.reuse import UNREAD, Unread
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import Hasher, Trailer, pack, read_trailer

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_TEMPORARY = "tmp"
_SCRATCH = "scratch"  # fact of results that are kept for a while only
_LABEL = "results"
_THREADS = 4
_FREE = 0.05, 1 << 30  # of the file system, bytes at most: what results leave to others
_FREE_SECONDS = 0.5  # between looks at the disk; what others take meanwhile fails the write, and nothing else
_LOOK_SECONDS = 30.0  # between looks for scratch results that are past their time


@dataclass(slots=True)
class _Entry:
    trailer: Trailer
    used: float
    is_scratch: bool
    leases: int = 0
    was_opened: bool = False
    """By a reader, since it was made."""
    kept: list[Kept] = field(default_factory=list)
    """Open, though nobody may be reading."""

    @property
    def size(self) -> int:
        return self.trailer.size


def choose_victims(entries: Iterable[tuple[str, int]], need: int) -> list[str]:
    """Which results to give up for `need` bytes.

    Args:
        entries: `(key, size)` of those that may go, the first to go first; asked for no further than needed.
        need: Bytes.

    Returns:
        Keys whose sizes add up to `need`; [] if all together do not.
    """
    chosen: list[str] = []
    freed = 0
    for key, size in entries:
        if freed >= need:
            break
        chosen.append(key)
        freed += size
    return chosen if freed >= need else []


class ResultStore:
    """Results of one node. Use `ResultStore.open_directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        capacity: int,
        most: int,
        scratch_seconds: float,
        unread: int,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._directory = directory
        self._capacity = capacity
        self._most = most
        self._scratch_seconds = scratch_seconds
        self._threads = threads
        self._entries: dict[str, _Entry] = {}
        self._scratch: OrderedDict[str, _Entry] = OrderedDict()
        self._lasting: OrderedDict[str, _Entry] = OrderedDict()
        """Both in order of use, so that the first to leave are found without looking at all."""
        self._unread = Unread(unread)
        self._moving = asyncio.Lock()
        """Held while a file gets the name of a result, or loses it to a spool."""
        self._verified = VerifiedBlocks()
        self._kept = 0
        self._spooling = 0
        self._evicted = 0
        self._free = 0
        """Of the disk, as of the last look, without what was taken since."""
        self._free_until = 0.0

    @classmethod
    @asynccontextmanager
    async def open_directory(
        cls, directory: Path, *, capacity: int, most: int, scratch_seconds: float, unread: int = UNREAD
    ) -> AsyncIterator["ResultStore"]:
        """Find what an earlier process kept; torn files and spools are removed.

        Args:
            directory: Made if it is not there.
            capacity: Bytes of all results and spools together.
            most: Results at most, whatever their size.
            scratch_seconds: How long a scratch result that nobody opens is kept.
            unread: Bytes of those that nobody has opened, beyond which the oldest gives its file to the next spool.
        """
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="results") as threads:
            store = cls(
                directory,
                capacity=capacity,
                most=most,
                scratch_seconds=scratch_seconds,
                unread=unread,
                threads=threads,
            )
            await store.in_thread(store._load)
            await store._keep_to_capacity()
            expiring = asyncio.create_task(store._expire())
            try:
                yield store
            finally:
                expiring.cancel()
                await asyncio.wait([expiring])
                for kept in [kept for entry in store._entries.values() for kept in entry.kept]:
                    kept.leave()

    def _load(self) -> None:
        (self._directory / _TEMPORARY).mkdir(parents=True, exist_ok=True)
        for path in (self._directory / _TEMPORARY).iterdir():
            path.unlink(missing_ok=True)
        found = [(path.stat().st_mtime, path) for path in self._directory.iterdir() if path.is_file()]
        for used, path in sorted(found):
            if not self._load_file(path, used):
                path.unlink(missing_ok=True)

    def _load_file(self, path: Path, used: float) -> bool:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            trailer = read_trailer(descriptor)
        except CorruptObject:
            return False
        finally:
            os.close(descriptor)
        if trailer.key != path.name:
            return False
        self._add(_Entry(trailer, used, is_scratch=_SCRATCH in trailer.user))
        return True

    async def _keep_to_capacity(self) -> None:
        """It may have been made smaller since."""
        excess = self._kept - self._capacity
        if excess > 0:
            await self.remove(self._victims(excess))
        await self.unlink(self._take_out_surplus())

    async def begin(self, key: str) -> "ResultSpool":
        """See `core.sources.ResultFiles`."""
        path = self._directory / _TEMPORARY / secrets.token_hex(8)
        # The file of a key is that of its entry, and of no spool that is just becoming one.
        async with self._moving:
            descriptor, size = await self._make(key, path)
        return ResultSpool(self, key, path, descriptor, size)

    async def _make(self, key: str, path: Path) -> tuple[int, int]:
        """The file of a spool and the bytes of the quota that it has."""
        chosen = self._unread.choose(key)
        given = self._take_out(chosen) if chosen is not None else None
        size = 0 if given is None else given.size
        self._spooling += size
        make = (_create, path) if given is None else (_take_over, self._directory / given.trailer.key, path)
        creating = asyncio.ensure_future(self.in_thread(*make))

        def discard(descriptor: int) -> None:
            os.close(descriptor)
            path.unlink(missing_ok=True)

        try:
            descriptor = await opened(creating, discard)
        except BaseException:
            self._spooling -= size
            raise
        return descriptor, size

    async def open(self, key: str) -> "ResultSource | None":
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.leases += 1
        entry.was_opened = True
        self._unread.discard(key)
        self._use(key, entry)
        try:
            opening = asyncio.ensure_future(self.in_thread(_open, self._directory / key))
            descriptor = await opened(opening, _close)
        except BaseException:
            entry.leases -= 1
            raise
        if descriptor is None:
            if self._entries.get(key) is entry:
                self._take_out(key)
            return None
        if self._entries.get(key) is not entry:
            # Removed meanwhile; what was opened may be another result of that key, whose blocks nobody has verified.
            os.close(descriptor)
            return None
        source = PoolSource(descriptor, entry.trailer, self._verified.of(entry.trailer), self._threads)
        return ResultSource(source, lambda: self._release(entry), lambda: self._distrust(key, entry))

    async def keep_open(self, key: str) -> Kept | None:
        source = await self.open(key)
        if source is None:
            return None
        # Nothing was awaited since it was seen there.
        entry = self._entries[key]

        def on_read(*_: int) -> None:
            self._use(key, entry)

        def hold(change: int) -> None:
            entry.leases += change
            self._use(key, entry)

        kept = Kept(source, is_ready=source.is_ready, on_read=on_read, hold=hold)
        entry.kept.append(kept)
        # What is merely open may leave; then it is closed.
        source.keep(lambda: entry.kept.remove(kept))
        return kept

    def has(self, key: str) -> bool:
        return key in self._entries

    def keep(self, key: str) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.is_scratch:
            entry.is_scratch = False
            self._unread.discard(key)
            self._lasting[key] = self._scratch.pop(key)

    def list(self) -> Sequence[ResultEntry]:
        return [
            ResultEntry(
                key,
                entry.size,
                entry.trailer.checksum,
                entry.trailer.modified,
                entry.used,
                entry.is_scratch,
                entry.leases,
                entry.trailer.user,
            )
            for key, entry in list(self._entries.items())
        ]

    async def remove(self, keys: Sequence[str]) -> int:
        gone = self._take_out_all(keys)
        await self.unlink(gone)
        return sum(gone.values())

    async def _expire(self) -> None:
        """Remove scratch results that nobody has opened for a while."""
        while True:
            await asyncio.sleep(min(self._scratch_seconds / 4, _LOOK_SECONDS))
            limit = time.time() - self._scratch_seconds
            old = [key for key, entry in self._scratch.items() if not entry.leases and entry.used < limit]
            await self.remove(old)

    def statistics(self) -> ResultStatistics:
        return ResultStatistics(
            len(self._entries), len(self._scratch), self._kept, self._spooling, self._capacity, self._evicted
        )

    async def count_free(self, size: int) -> int:
        """Bytes of the disk that results may still take; negative: they should give some back.

        Args:
            size: What is needed. Where the last look does not tell that there is as much, another is taken.
        """
        now = time.monotonic()
        if now > self._free_until or self._free < size:
            self._free = await self.in_thread(_free_space, self._directory)
            self._free_until = now + _FREE_SECONDS
        return self._free

    def take_room(self, size: int, free: int) -> Sequence[str]:
        """Take `size` bytes of the quota for a spool; returns evicted results, to be unlinked.

        Args:
            size: Bytes.
            free: Of the disk, see `count_free`. A disk that is nearly full is a smaller quota.

        Raises:
            InsufficientStorage: What is left is in use.
        """
        need = max(self._kept + self._spooling + size - self._capacity, size - free)
        victims: Sequence[str] = ()
        if need > 0:
            victims = self._victims(need)
            if not victims:
                raise InsufficientStorage("the results' quota, or the disk, is full of what is in use")
            self._take_out_all(victims)
            self._evicted += len(victims)
        self._spooling += size
        self._free -= size
        return victims

    def _victims(self, need: int) -> Sequence[str]:
        return choose_victims(self._idle(), need)

    def _idle(self) -> Iterator[tuple[str, int]]:
        """Those that may leave: scratch first, then the least recently used."""
        for key, entry in itertools.chain(self._scratch.items(), self._lasting.items()):
            if not entry.leases:
                yield key, entry.size

    def _take_out_surplus(self) -> Sequence[str]:
        """Those that are too many; they are to be unlinked."""
        surplus = [key for key, _ in itertools.islice(self._idle(), max(0, len(self._entries) - self._most))]
        self._take_out_all(surplus)
        self._evicted += len(surplus)
        return surplus

    def give_back(self, size: int) -> None:
        """A spool needs so much of the quota no more."""
        self._spooling -= size

    async def adopt(self, spool: "ResultSpool", trailer: Trailer, *, is_scratch: bool) -> _Entry:
        """A spool has become a result; when nobody uses it as a spool any more, `let_go` is called."""
        async with self._moving:
            await self.in_thread(os.rename, spool.path, self._directory / trailer.key)
            self._spooling -= spool.size
            self._take_out(trailer.key)
            entry = _Entry(trailer, time.time(), is_scratch)
            self._add(entry)
        await self.unlink(self._take_out_surplus())
        return entry

    def let_go(self, entry: _Entry) -> None:
        """Nobody reads what was a spool by the spool's own descriptor."""
        if entry.is_scratch and not entry.was_opened and self._entries.get(entry.trailer.key) is entry:
            self._unread.add(entry.trailer.key, entry.size)

    def _add(self, entry: _Entry) -> None:
        key = entry.trailer.key
        self._entries[key] = self._of_its_kind(entry)[key] = entry
        self._kept += entry.size

    def _of_its_kind(self, entry: _Entry) -> OrderedDict[str, _Entry]:
        return self._scratch if entry.is_scratch else self._lasting

    def _use(self, key: str, entry: _Entry) -> None:
        """It is used now, so it leaves last."""
        entry.used = time.time()
        if self._entries.get(key) is entry:
            self._of_its_kind(entry).move_to_end(key)

    def _take_out_all(self, keys: Sequence[str]) -> dict[str, int]:
        """Key → bytes of those that were there."""
        return {key: entry.size for key in keys if (entry := self._take_out(key)) is not None}

    async def unlink(self, keys: Iterable[str]) -> None:
        """Remove the files of results that are no longer listed."""
        paths = [self._directory / key for key in keys]
        if paths:
            await self.in_thread(_unlink_all, paths)

    def _take_out(self, key: str) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._of_its_kind(entry)[key]
            self._unread.discard(key)
            self._kept -= entry.size
            for kept in list(entry.kept):
                kept.leave()
        return entry

    def _release(self, entry: _Entry) -> None:
        entry.leases -= 1
        self._use(entry.trailer.key, entry)

    def _distrust(self, key: str, entry: _Entry) -> None:
        """A block of it failed its checksum: it must not be served again."""
        if self._entries.get(key) is entry:
            self._take_out(key)
            logger.warning("result %s is corrupt and is removed", key[:12])
            with contextlib.suppress(OSError):
                os.unlink(self._directory / key)

    async def in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        """A blocking disk call; its errors are those of a node."""
        with disk_errors(_LABEL):
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


class ResultSource:
    """An opened result: the source of a stored object, with a lease against eviction."""

    def __init__(self, source: PoolSource, release: Callable[[], None], distrust: Callable[[], None]) -> None:
        self.meta = source.meta
        self.descriptor = source.descriptor
        self._source = source
        self._release: Callable[[], None] | None = release
        self._distrust = distrust

    @property
    def is_whole(self) -> bool:
        return True

    def is_ready(self, start: int, stop: int) -> bool:
        """All blocks of [start, stop) were verified since boot."""
        return self._source.is_ready(start, stop)

    def keep(self, on_close: Callable[[], None]) -> None:
        """Give the lease back now, and stay open until it is closed."""
        release, self._release = self._release, on_close
        if release is not None:
            release()

    async def ensure(self, start: int, stop: int) -> None:
        try:
            await self._source.ensure(start, stop)
        except CorruptObject:
            self._distrust()
            raise

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        await self.ensure(start, stop)
        return stop

    def release(self, position: int) -> None:
        """All of it stays."""

    async def check_unchanged(self) -> None:
        await self._source.check_unchanged()

    def close(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            self._source.close()
            release()


@dataclass(slots=True)
class ResultSpool:
    """See `core.sources.Spool`."""

    store: ResultStore
    key: str
    path: Path
    descriptor: int
    size: int
    """Bytes taken of the quota: at first those of the result whose file it has."""
    _hasher: Hasher = field(default_factory=Hasher)
    _is_there: bool = True
    _entry: _Entry | None = None

    async def append(self, pieces: Sequence[memoryview | bytes]) -> None:
        stop = self._hasher.size + sum(map(len, pieces))
        if (more := stop - self.size) > 0:
            evicted = self.store.take_room(more, await self.store.count_free(more))
            self.size = stop
            if evicted:
                await finish(self.store.unlink(evicted))
        await finish(self.store.in_thread(self._write, pieces))

    async def publish(self, facts: Mapping[str, str], *, is_scratch: bool) -> ObjectMeta:
        user = {**facts, _SCRATCH: "1"} if is_scratch else dict(facts)
        hasher = self._hasher
        trailer = Trailer(
            _LABEL,
            self.key,
            hasher.size,
            hasher.checksum,
            hasher.blocks(),
            f"{time.time_ns():x}{secrets.token_hex(3)}",
            time.time(),
            user,
        )

        async def commit() -> None:
            await self.store.in_thread(_end, self.descriptor, pack(trailer), hasher.size)
            self._entry = await self.store.adopt(self, trailer, is_scratch=is_scratch)
            self._is_there = False

        await finish(commit())
        return trailer.meta

    async def abandon(self) -> None:
        if self._is_there:
            self._is_there = False
            self.store.give_back(self.size)
            await finish(self.store.in_thread(_unlink_all, [self.path]))

    def close(self) -> None:
        os.close(self.descriptor)
        if self._entry is not None:
            self.store.let_go(self._entry)

    def _write(self, pieces: Sequence[memoryview | bytes]) -> None:
        offset = self._hasher.size
        for piece in pieces:
            # One call for all costs ext4 three times as much, as it then copies in small steps.
            write_all_at(self.descriptor, piece, offset)
            offset += len(piece)
        # Only what is written whole counts, so that a full disk leaves a consistent prefix.
        for piece in pieces:
            self._hasher.update(piece)


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _take_over(path: Path, new: Path) -> int:
    """The file of a result for a spool; a fresh one where somebody has tidied up by hand."""
    try:
        os.rename(path, new)
    except FileNotFoundError:
        return _create(new)
    try:
        return os.open(new, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        new.unlink()
        raise


def _open(path: Path) -> int | None:
    """None: it was removed meanwhile, or somebody tidied up by hand."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _free_space(path: Path) -> int:
    """Bytes that results may still take of the file system; negative: they should give some back."""
    status = os.statvfs(path)
    share, most = _FREE
    return status.f_bavail * status.f_frsize - min(int(share * status.f_blocks * status.f_frsize), most)


def _end(descriptor: int, trailer: bytes, offset: int) -> None:
    """Write what stands behind the payload, and cut off what an earlier result had there."""
    write_all_at(descriptor, trailer, offset)
    os.ftruncate(descriptor, offset + len(trailer))


def _unlink_all(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
