"""Indexes of shards' members: made once for each version of a shard, kept on disk, the used ones in memory.

An index says which object and version it is of, and is never taken for another's. It is a cache entry like a result:
nothing is synced, what is damaged or of another version is made again, the least used leave first. One file an object,
so an index of an older version goes when one of a newer is kept.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from shardmill.core.errors import BadShard, ObjectChanged
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.shards.members import BadIndex, IndexBuilder, MemberIndex
from shardmill.shards.tar import TarError
from shardmill.storage.files import write_all
from shardmill.storage.steps import finish

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

IN_MEMORY = 128 << 20  # bytes of indexes in memory; the last one that was used stays in any case
_THREADS = 2  # shards indexed at once; a third would only take the interpreter from the other two
_STEP = 2048  # members read in one visit to a thread; a cancellation waits for no more
_AHEAD = 1 << 20  # bytes of the shard made sure of at a time, from a header on
_BAD = 1000  # damaged shards remembered, so that they are not read through again for each request
_TEMPORARY = ".new"

OpenSource = Callable[[], Awaitable[Source]]


class _NotThere(Exception):
    """Bytes [start, stop) have to be made sure of first."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.start = start
        self.stop = stop


@dataclass(slots=True)
class _Build:
    """One index in the making; it ends when its last reader leaves."""

    task: "asyncio.Task[MemberIndex]"
    readers: int = 0


@dataclass(slots=True)
class MemberStatistics:
    """What indexes took and gave since the start."""

    built: int = 0
    loaded: int = 0
    """From disk."""
    in_memory: int = 0
    """Bytes."""
    on_disk: int = 0
    """Bytes."""


@dataclass(slots=True)
class _Shelf:
    """Values of some bytes each, in the order of use."""

    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    total: int = 0

    def put(self, name: str, size: int) -> None:
        self.drop(name)
        self.sizes[name] = size
        self.total += size

    def drop(self, name: str) -> None:
        self.total -= self.sizes.pop(name, 0)


class MemberIndexes:
    """Indexes of one node. Use `MemberIndexes.open_directory`."""

    def __init__(self, directory: Path, *, capacity: int, threads: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._capacity = capacity
        self._threads = threads
        self._builds: dict[tuple[ObjectRef, str], _Build] = {}
        self._bad: OrderedDict[tuple[ObjectRef, str], str] = OrderedDict()
        self._known: OrderedDict[ObjectRef, tuple[str, MemberIndex]] = OrderedDict()
        self._in_memory = 0
        self._files = _Shelf()
        self._built = 0
        self._loaded = 0

    @classmethod
    @asynccontextmanager
    async def open_directory(cls, directory: Path, *, capacity: int) -> AsyncIterator["MemberIndexes"]:
        """Find what an earlier process kept.

        Args:
            directory: Made if it is not there.
            capacity: Bytes of all files.
        """
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="members") as threads:
            indexes = cls(directory, capacity=capacity, threads=threads)
            await indexes._in_thread(indexes._find_files)
            try:
                yield indexes
            finally:
                tasks = [build.task for build in indexes._builds.values()]
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)

    def known(self, ref: ObjectRef, version: str) -> MemberIndex | None:
        """The index of a version, if it is in memory."""
        found = self._known.get(ref)
        if found is None or found[0] != version:
            return None
        self._known.move_to_end(ref)
        return found[1]

    async def get(self, ref: ObjectRef, version: str, open_source: OpenSource) -> MemberIndex:
        """The index of a version: from memory, from disk, or from the shard's headers. Whoever comes meanwhile joins.

        Args:
            ref: The shard.
            version: The source version that is meant.
            open_source: Opens the shard once more, for as long as its headers are read; a reader who leaves takes only
                its own source along.

        Raises:
            BadShard: It is no good tar.
            ObjectChanged: It has another version by now, so the caller opens it again.
            Conflict: It changed while its headers were read.
        """
        index = self.known(ref, version)
        if index is not None:
            return index
        key = ref, version
        if key in self._bad:
            raise BadShard(self._bad[key])
        build = self._builds.get(key)
        if build is None:
            build = self._builds[key] = _Build(asyncio.create_task(self._make(ref, version, open_source)))
            build.task.add_done_callback(partial(self._ended, key))
        build.readers += 1
        try:
            return await asyncio.shield(build.task)
        finally:
            build.readers -= 1
            if not build.readers and not build.task.done():
                build.task.cancel()
                # Whoever comes now begins another one.
                self._builds.pop(key, None)
                await asyncio.wait([build.task])

    async def forget(self, ref: ObjectRef) -> None:
        """Keep nothing of an object: it is gone, or what is kept is worth nothing."""
        self._drop(ref)
        name = _file_name(ref)
        if name in self._files.sizes:
            self._files.drop(name)
            await self._in_thread(_unlink, [self._directory / name])

    def statistics(self) -> MemberStatistics:
        return MemberStatistics(self._built, self._loaded, self._in_memory, self._files.total)

    def _ended(self, key: tuple[ObjectRef, str], task: "asyncio.Task[MemberIndex]") -> None:
        if not task.cancelled():
            task.exception()  # marks it retrieved: its readers may have gone
        build = self._builds.get(key)
        if build is not None and build.task is task:
            del self._builds[key]

    async def _make(self, ref: ObjectRef, version: str, open_source: OpenSource) -> MemberIndex:
        index = await self._load(ref, version)
        if index is None:
            source = await open_source()
            try:
                if source.meta.version != version:
                    raise ObjectChanged(f"{ref} was replaced while its members were looked up; ask again")
                index = await self._build(ref, version, source)
            finally:
                source.close()
            self._built += 1
            await self._save(ref, index)
        self._keep(ref, version, index)
        return index

    async def _build(self, ref: ObjectRef, version: str, source: Source) -> MemberIndex:
        reader = _Headers(source, self._threads)
        try:
            while await reader.advance():
                pass
            # What was read of a file that changed meanwhile is of no version.
            await source.check_unchanged()
            return await self._in_thread(reader.builder.finish, _identity(ref, version))
        except TarError as error:
            await source.check_unchanged()
            self._bad[ref, version] = f"{ref}: {error}"
            while len(self._bad) > _BAD:
                self._bad.popitem(last=False)
            raise BadShard(f"{ref}: {error}") from None

    async def _load(self, ref: ObjectRef, version: str) -> MemberIndex | None:
        name = _file_name(ref)
        if name not in self._files.sizes:
            return None
        try:
            index = await self._in_thread(_read, self._directory / name, _identity(ref, version))
        except (BadIndex, OSError) as error:
            logger.info("the index of the members of %s is made again: %s", ref, error)
            await self.forget(ref)
            return None
        self._loaded += 1
        if name in self._files.sizes:
            self._files.sizes.move_to_end(name)
        return index

    async def _save(self, ref: ObjectRef, index: MemberIndex) -> None:
        """Keep it on disk, in place of that of an older version; a disk that will not is no reason to fail a reader."""
        name, size = _file_name(ref), index.nbytes
        if size > self._capacity:
            return
        self._files.put(name, size)
        victims = []
        while self._files.total > self._capacity:
            victim = next(iter(self._files.sizes))
            self._files.drop(victim)
            victims.append(self._directory / victim)
        try:
            await self._in_thread(_unlink, victims)
            await self._in_thread(_write, self._directory / name, index.dump())
        except OSError as error:
            self._files.drop(name)
            logger.warning("the index of the members of %s cannot be kept: %s", ref, os.strerror(error.errno or 0))

    def _keep(self, ref: ObjectRef, version: str, index: MemberIndex) -> None:
        self._drop(ref)
        self._known[ref] = version, index
        self._in_memory += index.nbytes
        while self._in_memory > IN_MEMORY and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, ref: ObjectRef) -> None:
        found = self._known.pop(ref, None)
        if found is not None:
            self._in_memory -= found[1].nbytes

    def _find_files(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        found = []
        for entry in os.scandir(self._directory):
            if entry.name.endswith(_TEMPORARY):
                os.unlink(entry.path)
            elif entry.is_file(follow_symlinks=False):
                status = entry.stat()
                found.append((status.st_mtime_ns, entry.name, status.st_size))
        for _, name, size in sorted(found):
            self._files.put(name, size)
        victims = []
        while self._files.total > self._capacity:
            victims.append(self._directory / next(iter(self._files.sizes)))
            self._files.drop(victims[-1].name)
        _unlink(victims)

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


class _Headers:
    """Reads a shard's headers in threads, where the bytes are; elsewhere it has them brought first."""

    def __init__(self, source: Source, threads: ThreadPoolExecutor) -> None:
        self._source = source
        self._threads = threads
        self._there = 0, 0
        self.builder = IndexBuilder(self._read, source.meta.size)

    async def advance(self) -> bool:
        """Some members further; False: that was the last."""
        step = asyncio.get_running_loop().run_in_executor(self._threads, self.builder.advance, _STEP)
        try:
            # Seen through, since the thread uses the descriptor.
            return await finish(step)
        except _NotThere as missing:
            stop = min(self._source.meta.size, missing.stop + _AHEAD)
            # Headers are read once, in order.
            self._source.release(missing.start)
            await self._source.ensure(missing.start, stop)
            self._there = missing.start, stop
            return True

    def _read(self, offset: int, length: int) -> bytes:
        start, stop = self._there
        length = min(length, self._source.meta.size - offset)
        if not (start <= offset and offset + length <= stop):
            raise _NotThere(offset, offset + length)
        return os.pread(self._source.descriptor, length, offset)


def _file_name(ref: ObjectRef) -> str:
    return blake2b(str(ref).encode(), digest_size=20).hexdigest()


def _identity(ref: ObjectRef, version: str) -> bytes:
    return f"{ref}\0{version}".encode()


def _read(path: Path, identity: bytes) -> MemberIndex:
    index = MemberIndex.load(path.read_bytes(), identity)
    with contextlib.suppress(OSError):
        # So that the next process knows which were used last.
        os.utime(path)
    return index


def _write(path: Path, pieces: list[bytes]) -> None:
    temporary = path.with_name(f"{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        with open(temporary, "xb", buffering=0) as file:
            for piece in pieces:
                write_all(file.fileno(), piece)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
