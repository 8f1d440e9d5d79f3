"""Small objects through the log: one flush makes a group of them durable, their files are made behind the answers.

What is in the log is stored. Until it has a file an object is known here: who opens it has its file made first
(`make_file`), who lists has the index told first (`tell_index`). A checkpoint makes the files of all that one file of
the log has, tells the index, lets the disk have both, and only then forgets the records. What the log cannot take is
stored as large objects are: it makes writes faster and decides nothing.
"""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from shardmill.core.conditions import Conditions
from shardmill.core.errors import Busy, InsufficientStorage, PreconditionFailed, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import Bucket
from shardmill.storage.files import disk_errors, sync_file_system
from shardmill.storage.index import Index
from shardmill.storage.log import Key, LogFile, Record, logged_size

logger = logging.getLogger(__name__)

MOST = 256  # objects of one group
MOST_LOGGED = 8192  # objects that one file of the log may have: each takes about a kilobyte of memory
PATIENCE = 2.0  # seconds that a group waits for room in the log
IDLE = 2.0  # seconds without a write before files are made of what is logged
_BLOCK = 4096  # bytes of disk that a file takes at least, and so much again for its name
_SPARE = 1 << 20  # bytes of disk for the index


class Owner(Protocol):
    """The bucket of small objects; its calls block and raise ShardmillError."""

    bucket: Bucket
    identity: str
    is_durable: bool
    is_removed: bool

    @property
    def index(self) -> Index: ...

    def look_up(self, key: str) -> ObjectMeta | None:
        """What is stored of a key of which the log has nothing."""
        ...

    def make_file(self, key: str, content: bytes) -> None:
        """Make an object's file; it need not be durable."""
        ...

    def remove_file(self, key: str) -> None:
        """Leave no file of an object, durably if the bucket promises it."""
        ...

    def sync_file(self, key: str) -> None:
        """Make an object's file and its name durable."""
        ...


@dataclass(slots=True, eq=False)
class SmallWrite:
    """One object on its way into the log."""

    owner: Owner
    key: str
    meta: ObjectMeta
    content: bytes
    """Of its file."""
    conditions: Conditions
    done: Callable[["SmallWrite", BaseException | None], None]
    """Called on the loop; with an error nothing was changed."""
    is_new: bool = True
    """There was no such object."""
    is_logged: bool = False
    """False when it is done without an error: the log cannot take it."""


@dataclass(slots=True, eq=False)
class Logged:
    """An object that the log has."""

    owner: Owner
    key: str
    meta: ObjectMeta
    file: LogFile
    start: int
    length: int
    has_file: bool = False
    is_gone: bool = False
    """It is being removed, so no file is made of it any more."""

    def content(self) -> bytes:
        return self.file.read(self.start, self.length)


class Groups:
    """The log and the thread that fills it; used from the loop's thread, but for what says that it blocks.

    Args:
        objects: A directory of the file system that all objects lie on; the log may lie on another.
        files: Two, cleared.
    """

    def __init__(self, objects: Path, files: Sequence[LogFile]) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.open(objects, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # What comes later has the later turn.
        self._files = sorted(files, key=lambda file: file.turn)
        self._current = self._files[0]
        self._spare: queue.SimpleQueue[LogFile] = queue.SimpleQueue()
        self._spare.put(self._files[1])
        self._logged: dict[LogFile, dict[Key, Logged]] = {file: {} for file in files}
        self._unlisted: dict[Key, Logged] = {}
        """What the index does not have yet."""
        self._doubtful: set[Key] = set()
        """What the log may have although writing it failed."""
        self._turn = max(file.turn for file in files)
        self._is_broken = False
        self._full: LogFile | None = None
        """The one that is being checkpointed, or could not be."""
        self._is_checkpointing = False
        self._turning = threading.Lock()
        """Held while a checkpoint begins or ends, which is one step for whoever looks."""
        self._making = threading.Lock()
        """Held while a file is made."""
        self._telling = threading.Lock()
        """Held while the index is told."""
        self._waiting: list[SmallWrite] = []
        self._is_running = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="small-writes")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="log-checkpoint")
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        """When the last group was done."""

    def add(self, write: SmallWrite) -> None:
        """Log it; what is there when its `done` is called has what its bucket promises."""
        self._waiting.append(write)
        if not self._is_running:
            self._is_running = True
            self._is_idle.clear()
            # What else has come to the loop by now belongs to the same group.
            self._loop.call_soon(self._start)

    def find(self, store: str, key: str) -> Logged | None:
        """The object as the log has it; from any thread."""
        for objects in self._logged.values():
            found = objects.get((store, key))
            if found is not None:
                return found
        return None

    def has(self, store: str, key: str) -> bool:
        """What the log says of the key might be taken for newer than what another way of writing does."""
        return self.find(store, key) is not None or (store, key) in self._doubtful

    def make_file(self, logged: Logged) -> None:
        """Make the file of an object that is logged, if it has none; blocking."""
        with self._making:
            if logged.has_file or logged.is_gone or logged.owner.is_removed:
                return
            if self.find(logged.owner.identity, logged.key) is logged:
                logged.owner.make_file(logged.key, logged.content())
                logged.has_file = True

    def wait_made(self) -> None:
        """Return when a file that may be half there is whole; blocking."""
        with self._making:
            pass

    async def tell_index(self, store: str) -> Sequence[ObjectMeta]:
        """Let the index have all that is stored; what of a bucket a full disk kept out of it."""
        if not self._unlisted:
            return ()
        try:
            await self._loop.run_in_executor(self._thread, lambda: self._tell_index(list(self._unlisted.values())))
        except InsufficientStorage:
            return [logged.meta for (of, _), logged in list(self._unlisted.items()) if of == store]
        return ()

    async def settle(self, owner: Owner, key: str) -> None:
        """Make a key's file durable as it is, and forget what was logged of it: it is about to be changed otherwise."""
        await self._loop.run_in_executor(self._thread, self._settle, owner, key)

    async def remove(self, owner: Owner, key: str) -> bool:
        """Remove an object if it is logged; the index is not told. False: it is not logged any more."""
        return await self._loop.run_in_executor(self._thread, self._remove, owner, key)

    async def make_files(self) -> None:
        """Let the disk have files of all that is logged now."""
        await self._loop.run_in_executor(self._thread, self._rotate_used)
        await self._loop.run_in_executor(self._background, lambda: None)

    async def close(self) -> None:
        """Leave an empty log; nothing more may come."""
        await self._is_idle.wait()
        if self._timer is not None:
            self._timer.cancel()
        await self._loop.run_in_executor(None, self._thread.shutdown)
        self._background.submit(self._checkpoint_all)
        await self._loop.run_in_executor(None, self._background.shutdown)
        os.close(self._descriptor)

    # Groups.

    def _start(self) -> None:
        batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        running = self._loop.run_in_executor(self._thread, self._commit, batch)
        running.add_done_callback(partial(self._ended, batch))

    def _ended(self, writes: Sequence[SmallWrite], running: "asyncio.Future[Sequence[ShardmillError | None]]") -> None:
        self._is_running = bool(self._waiting)
        if self._waiting:
            self._start()
        else:
            self._is_idle.set()
        self._last = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE, self._rest)
        defect = running.exception()
        outcomes = [defect] * len(writes) if defect is not None else running.result()
        for write, outcome in zip(writes, outcomes, strict=True):
            write.done(write, outcome)

    def _rest(self) -> None:
        """Some time after the last write: no memory is needed for what can have files."""
        self._timer = None
        left = self._last + IDLE - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._rest)
        else:
            self._loop.run_in_executor(self._thread, self._rotate_used)

    def _commit(self, writes: Sequence[SmallWrite]) -> Sequence[ShardmillError | None]:
        """One group; what became of each."""
        outcomes: dict[SmallWrite, ShardmillError] = {}
        for write in writes:
            try:
                self._judge(write)
            except ShardmillError as error:
                outcomes[write] = error
        left = [write for write in writes if write not in outcomes]
        while left:
            some = self._fitting(left)
            if not some or not self._log(some):
                break
            left = left[len(some) :]
        return [outcomes.get(write) for write in writes]

    def _judge(self, write: SmallWrite) -> None:
        logged = self.find(write.owner.identity, write.key)
        current = write.owner.look_up(write.key) if logged is None else logged.meta
        write.is_new = current is None
        etag, modified = (current.etag, current.modified) if current else (None, None)
        if write.conditions.judge_write(etag, modified) == "failed":
            raise PreconditionFailed(f"{write.owner.bucket}/{write.key} does not meet the conditions; it is unchanged")

    def _fitting(self, writes: Sequence[SmallWrite]) -> Sequence[SmallWrite]:
        """As many of the first ones as the log has room for."""
        if self._is_broken or not self._has_disk():
            return []
        count = self._count_fitting(writes)
        if not count and self._rotate():
            count = self._count_fitting(writes)
        return writes[:count]

    def _count_fitting(self, writes: Sequence[SmallWrite]) -> int:
        room = self._current.room(keep=self._current.reserve)
        most = MOST_LOGGED - len(self._logged[self._current])
        for count, write in enumerate(writes):
            room -= logged_size(write.key, len(write.content))
            if room < 0 or count >= most:
                return count
        return len(writes)

    def _has_disk(self) -> bool:
        """There is space for files of all that is logged, so that what is answered can be kept for good."""
        disk = os.fstatvfs(self._descriptor)
        sizes = sum(file.size + 2 * _BLOCK * len(objects) for file, objects in self._logged.items())
        return disk.f_bavail * disk.f_frsize > sizes + 2 * _BLOCK * MOST + _SPARE

    def _log(self, writes: Sequence[SmallWrite]) -> bool:
        """Log them; False: the log is not to be used any more."""
        file = self._current
        records = [Record(write.owner.identity, write.key, write.content) for write in writes]
        try:
            starts = file.append(records, flush=any(write.owner.is_durable for write in writes))
        except ShardmillError as error:
            logger.warning("the log is not used any more before the next start: %s", error)
            self._doubtful.update((write.owner.identity, write.key) for write in writes)
            self._is_broken = True
            return False
        for write, start in zip(writes, starts, strict=True):
            key = (write.owner.identity, write.key)
            logged = Logged(write.owner, write.key, write.meta, file, start, len(write.content))
            self._unlisted[key] = self._logged[file][key] = logged
            for other, objects in self._logged.items():
                # After: whoever looks for the key must not miss both.
                if other is not file:
                    objects.pop(key, None)
            write.is_logged = True
        return True

    # What is logged and is to be changed otherwise.

    def _settle(self, owner: Owner, key: str) -> None:
        logged = self.find(owner.identity, key)
        if logged is not None:
            self.make_file(logged)
            self._tell_index([logged])
        owner.sync_file(key)
        self._forget(owner, key)

    def _remove(self, owner: Owner, key: str) -> bool:
        """The file goes first: until the log forgets the object, it is what the next start makes of it."""
        with self._making:
            logged = self.find(owner.identity, key)
            if logged is None:
                return False
            logged.is_gone = True
        try:
            owner.remove_file(key)
            self._forget(owner, key)
        except ShardmillError:
            logged.is_gone = logged.has_file = False
            raise
        return True

    def _forget(self, owner: Owner, key: str) -> None:
        """Note in the log that its records of a key do not count."""
        if logged_size(key, 0) > self._current.room(keep=0) and not self._rotate():
            raise InsufficientStorage("the log is full and the disk does not take what is in it; nothing was changed")
        self._current.append([Record(owner.identity, key, None)], flush=owner.is_durable)
        name = owner.identity, key
        with self._making, self._telling:
            self._unlisted.pop(name, None)
            for objects in self._logged.values():
                objects.pop(name, None)
        self._doubtful.discard(name)

    # What is logged and is to have files.

    def _tell_index(self, objects: Sequence[Logged]) -> None:
        with self._telling:
            names = {(logged.owner.identity, logged.key): logged for logged in objects}
            news = {name: logged for name, logged in names.items() if self._unlisted.get(name) is logged}
            for index in {logged.owner.index for logged in news.values()}:
                some = [
                    (name[0], logged.meta)
                    for name, logged in sorted(news.items(), key=lambda item: item[0])
                    if logged.owner.index is index and not logged.owner.is_removed
                ]
                error = index.put_now(some)
                if error is not None:
                    raise error
            for name, logged in news.items():
                # Unless it was replaced meanwhile.
                if self._unlisted.get(name) is logged:
                    del self._unlisted[name]

    def _rotate(self) -> bool:
        """Go on in the other file, as soon as the disk has all that was in it."""
        with self._turning:
            failed = self._full if not (self._is_checkpointing or self._is_broken) else None
            is_coming = self._is_checkpointing or failed is not None
        if failed is not None:
            self._begin_checkpoint(failed)
        try:
            spare = self._spare.get(timeout=PATIENCE) if is_coming else self._spare.get_nowait()
        except queue.Empty:
            return False
        full, self._current = self._current, spare
        self._begin_checkpoint(full)
        return True

    def _rotate_used(self) -> None:
        if self._current.is_used:
            self._rotate()

    def _begin_checkpoint(self, full: LogFile) -> None:
        with self._turning:
            self._full, self._is_checkpointing = full, True
        self._background.submit(self._checkpoint, full)

    def _checkpoint(self, full: LogFile) -> None:
        """Let the disk have the files of what is logged, then forget that."""
        is_clear = False
        try:
            self._save(list(self._logged[full].values()))
            with self._making:
                # A copy: what is replaced meanwhile leaves it.
                self._check_saved(list(self._logged[full].values()))
                with disk_errors("the log"):
                    full.clear(self._turn + 1)
                self._turn += 1
                self._logged[full] = {}
            is_clear = True
        except ShardmillError as error:
            logger.error("what is logged stays so for now: %s", error)
        finally:
            with self._turning:
                self._is_checkpointing = False
                if is_clear:
                    self._full = None
                    self._spare.put(full)

    def _save(self, objects: Sequence[Logged]) -> None:
        for logged in objects:
            self.make_file(logged)
        self._tell_index(objects)
        try:
            with disk_errors("the log"):
                sync_file_system(self._descriptor)
        except ShardmillError:
            # An error is told once, so a second try would tell nothing: the next start looks at each file.
            self._is_broken = True
            raise

    @staticmethod
    def _check_saved(objects: Iterable[Logged]) -> None:
        if any(not logged.has_file or logged.is_gone for logged in objects if not logged.owner.is_removed):
            raise Busy("an object is just being removed", retry_after=1)

    def _checkpoint_all(self) -> None:
        """The older file first, and the newer one only behind it: what it says of a key stands against the older's."""
        is_behind = True
        for file in sorted(self._files, key=lambda file: file.turn):
            if file.is_used and is_behind and not self._is_broken:
                self._checkpoint(file)
            is_behind = not file.is_used
            file.close()
            if not file.is_used:
                file.remove()
