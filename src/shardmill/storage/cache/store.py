"""A bucket that is somebody else's, read through the disk: `Source`s over what is there and what is being brought.

What is on the disk of a version is valid for that version only, so an object that changes is another entry. What the
current version is, is asked of the origin by the bucket's policy, by one request for all who wait for the answer.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from shardmill.core.conditions import Conditions
from shardmill.core.errors import (
    BucketReadOnly,
    Conflict,
    InsufficientStorage,
    ObjectNotFound,
    RangeNotSatisfiable,
    ShardmillError,
)
from shardmill.core.kept import Kept
from shardmill.core.meta import ObjectMeta
from shardmill.core.origins import OriginFacts, OriginRead, ReadOrigin
from shardmill.core.refs import Bucket
from shardmill.core.sources import CacheStatistics, Source
from shardmill.storage.cache.absent import Absent
from shardmill.storage.cache.blocks import Blocks
from shardmill.storage.cache.copying import Copy, keeping
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.entry import SINGLE, Entry
from shardmill.storage.cache.keeping import KeptEntry, open_kept
from shardmill.storage.cache.listed import Listed
from shardmill.storage.cache.loading import find_kept
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.cache.record import CacheRecord
from shardmill.storage.cache.source import CachedSource
from shardmill.storage.cache.unsized import take_whole
from shardmill.storage.cache.upstream import Counters, Version
from shardmill.storage.cache.versions import Known, facts_of, facts_version
from shardmill.storage.cache.width import Width
from shardmill.storage.cache.window import Memory, Window
from shardmill.storage.cache.writing import OpenToWriting, Writes, checked, copy_through, delete_through, put_through
from shardmill.storage.kept import KeptKeys, Shelf
from shardmill.storage.locks import KeyLocks
from shardmill.storage.pool import Stored
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_PARTS = "part"
_KNOWN = 100_000  # versions remembered
_READS = 64  # of the origin at once


class CachedBucket(Listed):
    """Use `CachedBucket.open_directory`.

    Args:
        bucket: Its name.
        origin: Where the bytes come from; opened and closed by the caller.
        directory: Its own.
    """

    def __init__(
        self,
        bucket: Bucket,
        origin: ReadOrigin,
        directory: Path,
        disk: CacheDisk,
        policy: CachePolicy,
        threads: ThreadPoolExecutor,
        shelf: Shelf,
    ) -> None:
        super().__init__(bucket, origin, policy.list_seconds)
        self.disk = disk
        self.policy = policy
        self.width = Width()
        self.counters = Counters()
        self.reads = asyncio.Semaphore(_READS)
        self._directory = directory
        self._threads = threads
        self._absent = Absent(policy.absent_seconds)
        self._locks = KeyLocks()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writes = Writes()
        self._memory = Memory()
        self.is_keeping = policy.revalidate != "always"
        """Else the origin is asked at each opening, which takes more than a look."""
        self._kept = KeptKeys(shelf, self._is_there)

    @classmethod
    @asynccontextmanager
    async def open_directory(
        cls,
        bucket: Bucket,
        origin: ReadOrigin,
        directory: Path,
        *,
        disk: CacheDisk,
        policy: CachePolicy,
        threads: ThreadPoolExecutor,
        shelf: Shelf,
    ) -> AsyncIterator["CachedBucket"]:
        """Find what an earlier process kept; on exit no read goes on."""
        store = cls(bucket, origin, directory, disk, policy, threads, shelf)
        await store.in_thread(store._load)
        try:
            yield store
        finally:
            await store._close()

    # Reading.

    async def open(self, key: str, *, expected: tuple[int, int | None] | None = None) -> CachedSource:
        """Open the current version.

        Args:
            key: Of the object.
            expected: Bytes [start, stop) that will be read now, stop None: to the end; None: perhaps none. They are
                asked for at once, together with the version.
        """
        arrived = time.monotonic()
        while True:
            entry, known = await self._find(key, arrived, expected)
            if entry is not None:
                entry.joining += 1
                try:
                    await entry.lease()
                except (FileNotFoundError, InsufficientStorage):
                    # Somebody tidied up by hand.
                    await self._remove(entry)
                    continue
                finally:
                    entry.joined()
            break

        async def attach() -> Entry:
            # Whoever asks for the version just now brings bytes with it.
            async with self._locks.hold(key):
                found = self._entries.get(key)
                newest = self._known.get(key, known)
                if newest.record.version != known.record.version:
                    raise Conflict(f"{self.bucket}/{key} was replaced at its origin; read it again")
                while True:
                    if found is None or found.version != known.record.version:
                        found = self._new_entry(known)
                    try:
                        await found.lease()
                    except (FileNotFoundError, InsufficientStorage) as error:
                        await self._remove(found)
                        if isinstance(error, InsufficientStorage):
                            raise
                        found = None
                    else:
                        return found

        async def passing(start: int) -> Entry:
            window = await Window.open(start, self._memory, f"{self.bucket}/{key}")
            self.counters.passed += 1
            made = self._build(known, None, None, window=window)
            await made.lease()  # gives the window back if it fails
            return made

        return CachedSource(known.record.meta, entry, expected, attach=attach, passing=passing, counters=self.counters)

    def kept(self, key: str) -> Kept | None:
        """What is kept open of an object."""
        return self._kept.get(key)

    async def keep(self, key: str) -> Kept | None:
        """Open an object to be kept; None: not all of it is there, or its origin has to be asked."""
        entry = self._whole(key)
        if entry is None:
            return None
        opening = open_kept(entry, self.counters)
        return await self._kept.open(
            key, opening, lambda source: source.is_ready, on_read=KeptEntry.on_read, hold=KeptEntry.hold
        )

    def _is_there(self, key: str, source: Source | None) -> Callable[[], bool]:
        """The look that tells whether what was opened is current, as far as the policy asks."""
        entry = self._entries.get(key)
        return lambda: source is not None and entry is not None and self._whole(key) is entry

    def _whole(self, key: str) -> Entry | None:
        """The entry of the current version, if nothing has to be asked for to read it."""
        known, entry = self._known.get(key), self._entries.get(key)
        if known is None or entry is None or entry.version != known.record.version:
            return None
        return entry if entry.is_complete and self.policy.is_current(known.asked, time.monotonic()) else None

    async def head(self, key: str) -> ObjectMeta:
        _, known = await self._find(key, time.monotonic(), None)
        return known.record.meta

    # Writing.

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
        """Store at the origin, which judges the conditions; what came of it is then what is cached."""
        origin = self._writable_origin()
        path, _ = self._paths(key)
        with self._writes.begin(key) as write:
            async with keeping(path, self.disk, size) as copy:
                body = copy.passed(checked(body, size=size, checksum=checksum))
                facts, created = await put_through(
                    origin, f"{self.bucket}/{key}", key, body, size=size, user=user, conditions=conditions
                )
                await finish(self._replace(key, facts if write.is_alone else None, copy))
        if facts.size is None or facts.validator == "none":
            return Stored(await self.head(key), created=created)
        record = CacheRecord.of(self.bucket, facts, facts.size, facts.version, time.time())
        return Stored(record.meta, created=created)

    async def copy(self, key: str, target: str) -> Stored:
        """Copy at the origin; what is cached of the old version of `target` goes, whatever becomes of the copy."""
        facts: OriginFacts | None = None
        with self._writes.begin(target) as write:
            try:
                facts, created = await copy_through(self._writable_origin(), key, target)
            finally:
                # An origin that fails, or is not waited for, may have made the copy.
                await finish(self._replace(target, facts if write.is_alone else None, None))
        return Stored(await self.head(target), created=created)

    async def delete(self, key: str, *, conditions: Conditions) -> None:
        """Remove it at the origin, then here."""
        with self._writes.begin(key):
            await delete_through(self._writable_origin(), f"{self.bucket}/{key}", key, conditions)
            await finish(self._replace(key, None, None))

    def _writable_origin(self) -> OpenToWriting:
        if not isinstance(self.origin, OpenToWriting):
            raise BucketReadOnly(f"{self.bucket}: its origin cannot be written to")
        return self.origin

    async def _replace(self, key: str, facts: OriginFacts | None, copy: Copy | None) -> None:
        """The origin has this version now, and `copy` may be of it; None: another one, or none."""
        async with self._locks.hold(key):
            self._listings.clear()
            self._absent.forget(key)
            self._known.pop(key, None)
            if facts is None or copy is None or not facts.is_confirmed or facts.validator == "none":
                await self._drop(key)
                return
            whole = await copy.take(facts)
            if whole is None:
                await self._learn(key, facts, time.monotonic())
                return
            await self._drop(key)
            record = CacheRecord.of(self.bucket, facts, whole.size, facts.version, time.time())
            entry = self._give_whole(record, copy.path, whole.blocks, whole.taken, is_versioned=True)
            self._remember(key, Known(record, facts, True, time.monotonic()))
            await self._publish(entry)

    async def _publish(self, entry: Entry) -> None:
        """Keep it for the next process, too."""
        try:
            await entry.lease()
        except (ShardmillError, OSError):
            # It is at the origin, and is fetched again.
            await self._remove(entry)
        else:
            entry.unlease()

    # What it has.

    async def evict(self, keys: Collection[str]) -> int:
        """Remove objects from the disk, pinned ones, too; who reads them goes on. Returns the bytes given back."""
        freed = 0
        paths: list[Path] = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                freed += entry.taken
                self.forget(entry)
                paths += entry.drop()
        await self.disk.unlink(paths)
        return freed

    def statistics(self) -> CacheStatistics:
        counters = self.counters
        return CacheStatistics(
            objects=len(self._entries),
            bytes=sum(entry.taken for entry in self._entries.values()),
            hits=counters.hits,
            misses=counters.misses,
            revalidated=counters.revalidated,
            served=counters.served,
            fetched=counters.fetched,
            fetches=counters.fetches,
            fetch_seconds=counters.fetch_seconds,
            filling=sum(entry.is_arriving for entry in self._entries.values()),
            evicted=counters.evicted,
            passed=counters.passed,
            repaired=counters.repaired,
            reads=self.width.reads,
            origin=self.origin.statistics(),
        )

    # What entries need.

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def forget(self, entry: Version) -> None:
        self._kept.changed(entry.key)
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        if entry.lost is not None:
            self._known.pop(entry.key, None)

    async def in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    # The current version of a key.

    async def _find(
        self, key: str, arrived: float, expected: tuple[int, int | None] | None
    ) -> tuple[Entry | None, Known]:
        """What is known to be current, and its entry if there is one."""
        found = self._fresh(key, arrived, expected)
        if found is None:
            async with self._locks.hold(key):
                found = self._fresh(key, arrived, expected)
                if found is None:
                    await self._ask(key, expected)
                    found = self._current(key)
        return found

    def _fresh(
        self, key: str, arrived: float, expected: tuple[int, int | None] | None
    ) -> tuple[Entry | None, Known] | None:
        """What need not be asked for."""
        if self._absent.has(key, arrived):
            raise ObjectNotFound(f"no object {self.bucket}/{key}")
        known = self._known.get(key)
        if known is None or not self.policy.is_current(known.asked, arrived):
            return None
        entry, known = self._current(key)
        if expected is None:
            return entry, known
        if entry is None:
            return None
        # Bytes that have to be fetched are asked for with the version that is current then.
        is_needless = entry.has(*expected) or entry.is_arriving or known.asked >= arrived
        return (entry, known) if is_needless else None

    def _current(self, key: str) -> tuple[Entry | None, Known]:
        known = self._known[key]
        entry = self._entries.get(key)
        return (entry if entry is not None and entry.version == known.record.version else None), known

    async def _ask(self, key: str, expected: tuple[int, int | None] | None) -> None:
        """Ask the origin for the current version; with the bytes that are expected, if they are not there."""
        entry = self._entries.get(key)
        if entry is not None and self.policy.revalidate == "never" and key not in self._known:
            # From before this process began; nobody is to be asked.
            self._remember(key, Known(entry.record, facts_of(entry.record), entry.is_versioned, time.monotonic()))
            if expected is None or entry.has(*expected):
                return
        try:
            if expected is None or (entry is not None and entry.has(*expected)):
                await self._ask_version(key)
            else:
                await self._ask_bytes(key, expected)
        except ObjectNotFound:
            self._absent.add(key, time.monotonic())
            self._known.pop(key, None)
            await self._drop(key)
            raise

    async def _ask_version(self, key: str) -> None:
        asked = time.monotonic()
        facts = await self.origin.head(key)
        if facts.size is None or facts.validator == "none":
            # There is nothing to know it by but its bytes.
            await self._ask_bytes(key, (0, None))
            return
        await self._learn(key, facts, asked)

    async def _learn(self, key: str, facts: OriginFacts, asked: float) -> None:
        """The origin has told what is current."""
        self._remember(key, await self._compare(key, facts, asked))

    async def _compare(self, key: str, facts: OriginFacts, asked: float) -> Known:
        """What the origin told, with what is there of that version; what is there of another one goes."""
        version, is_versioned = facts_version(facts)
        assert facts.size is not None
        entry = self._entries.get(key)
        if entry is not None and entry.version == version:
            self.counters.revalidated += 1
            record = entry.record
        else:
            record = CacheRecord.of(self.bucket, facts, facts.size, version, time.time())
            await self._drop(key)
        return Known(record, facts, is_versioned, asked)

    def _remember(self, key: str, known: Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        self._absent.forget(key)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    async def _ask_bytes(self, key: str, expected: tuple[int, int | None]) -> None:
        """Begin to read; returns when the version is known, while the bytes still arrive."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self.start(self._read_first(key, expected, begun))
        try:
            await begun
        except asyncio.CancelledError:
            task.cancel()
            raise
        except RangeNotSatisfiable:
            # Nothing lies there; the size tells whoever asked so.
            await self._ask_version(key)

    async def _read_first(self, key: str, expected: tuple[int, int | None], begun: "asyncio.Future[None]") -> None:
        """A task: the read that tells the version, and its bytes into the entry."""
        start, stop = expected
        start -= start % BLOCK
        stop = start + SINGLE if stop is None else -(-stop // BLOCK) * BLOCK
        entry = self._entries.get(key)
        if entry is not None and not entry.is_complete:
            # What is there of it need not come again.
            start, stop = entry.next_absent(start, stop) or (start, stop)
        stop = min(stop, start + SINGLE)
        asked = time.monotonic()
        holding = contextlib.ExitStack()
        if entry is not None and not entry.is_complete:
            entry.hold_reads()
            holding.callback(entry.allow_reads)
        try:
            async with self.reads, self.origin.read(key, start=start, stop=stop) as read:
                self.counters.fetches += 1
                self.counters.fetch_seconds += time.monotonic() - asked
                if read.facts.size is None:
                    await self._take_unsized(key, read if start == 0 else None, stop, asked)
                    begun.set_result(None)
                    return
                known = await self._compare(key, read.facts, asked)
                await self._take_first(known, read, start, stop, begun, holding)
        except BaseException as error:
            if begun.done():
                raise
            if isinstance(error, asyncio.CancelledError):
                begun.cancel()
                raise
            begun.set_exception(error)
        finally:
            holding.close()

    async def _take_first(
        self,
        known: Known,
        read: OriginRead,
        start: int,
        stop: int,
        begun: "asyncio.Future[None]",
        holding: contextlib.ExitStack,
    ) -> None:
        """Into the entry what there is room for; without room whoever asked brings it through memory."""
        key = known.record.key
        entry = self._entries.get(key) or self._build_entry(known)
        try:
            await entry.lease()
        except (FileNotFoundError, InsufficientStorage):
            # Somebody tidied up by hand, or there is no room even for a name: whoever asked finds another way.
            await self._remove(entry)
            self._remember(key, known)
            begun.set_result(None)
            return
        try:
            with contextlib.suppress(InsufficientStorage):
                await entry.reserve(*entry.blocks.span(start, stop))
            stream = entry.begin(start, stop)
            holding.close()
            # Nobody finds it before its blocks are known to be on their way, or they would be fetched twice.
            self._give(entry)
            self._remember(key, known)
            entry.joining += 1
            begun.set_result(None)
            # Whoever waits for it is called next, and joins before others can leave.
            asyncio.get_running_loop().call_soon(entry.joined)
            await entry.bring(stream, read)
        finally:
            entry.unlease()

    async def _take_unsized(self, key: str, read: OriginRead | None, stop: int, asked: float) -> None:
        """An object whose size shows at its end: all of it comes first. `read` is of its bytes up to `stop`, if any."""
        path, _ = self._paths(key)
        whole = None if read is None else await take_whole(read, path, self.disk, self.counters, stop=stop)
        if read is None or whole is None:
            async with self.origin.read(key) as read:
                self.counters.fetches += 1
                whole = await take_whole(read, path, self.disk, self.counters, stop=None)
        assert whole is not None
        facts, size = read.facts, whole.size
        version, is_versioned = facts_version(facts)
        record = CacheRecord.of(self.bucket, facts, size, version, time.time())
        await self._drop(key)
        if whole.taken is not None:
            self._give_whole(record, path, Blocks(size, whole.hashes), whole.taken, is_versioned=is_versioned)
        self._remember(key, Known(record, facts, is_versioned, asked))

    async def _drop(self, key: str) -> None:
        """What is there of a key is of the past; who reads it goes on."""
        entry = self._entries.get(key)
        if entry is not None:
            await self._remove(entry)

    async def _remove(self, entry: Entry) -> None:
        self.forget(entry)
        await self.disk.unlink(entry.drop())

    # Entries.

    def _new_entry(self, known: Known) -> Entry:
        entry = self._build_entry(known)
        self._give(entry)
        return entry

    def _build_entry(self, known: Known) -> Entry:
        path, log = self._paths(known.record.key)
        return self._build(known, path, log, is_pinned=self.policy.pin)

    def _build(
        self,
        known: Known,
        path: Path | None,
        log: Path | None,
        *,
        is_pinned: bool = False,
        window: Window | None = None,
    ) -> Entry:
        return Entry(
            self,
            known.record,
            path=path,
            log=log,
            blocks=Blocks(known.record.size),
            takes_ranges=known.facts.takes_ranges,
            is_versioned=known.is_versioned,
            is_pinned=is_pinned,
            window=window,
        )

    def _give(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self.disk.add(entry)

    def _give_whole(self, record: CacheRecord, path: Path, blocks: Blocks, taken: int, *, is_versioned: bool) -> Entry:
        """Of a file that has all bytes, which is published by whoever leases it first."""
        log, is_pinned = path.with_suffix(".log"), self.policy.pin
        entry = Entry(self, record, path=path, log=log, blocks=blocks, is_made=True, is_pinned=is_pinned)
        entry.taken = taken
        entry.is_versioned = is_versioned
        self._give(entry)
        return entry

    def _paths(self, key: str) -> tuple[Path, Path]:
        """A name of its own for each file, so that one that is being removed is never that of another."""
        name = f"{blake2b(key.encode(), digest_size=12).hexdigest()}-{secrets.token_hex(6)}"
        path = self._directory / _PARTS / name
        return path, path.with_suffix(".log")

    # From one process to the next.

    def _load(self) -> None:
        """Blocking: find what is on the disk."""
        for found in find_kept(self._directory, self._directory / _PARTS):
            blocks, is_pinned = found.blocks, self.policy.pin
            entry = Entry(
                self, found.record, path=found.path, log=found.log, blocks=blocks, is_made=True, is_pinned=is_pinned
            )
            entry.used = found.used
            entry.taken = found.taken
            other = self._entries.get(entry.key)
            if other is not None:
                # A kill between the new version and the removal of the old.
                older = min(entry, other, key=lambda item: item.used)
                self.forget(older)
                for path in older.drop():
                    path.unlink(missing_ok=True)
                if older is entry:
                    continue
            self.disk.found(entry.taken)
            self._give(entry)

    async def _close(self) -> None:
        self._kept.close()
        # A task that is cancelled before its first step never cleans up.
        await asyncio.sleep(0)
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await finish(asyncio.wait(set(self._tasks)))
