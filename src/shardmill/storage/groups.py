"""Small objects, committed in groups by one thread: their files, one flush of the log, their names, the index.

A group is what has come together while the one before was committed. What is in the log is durable; the disk has its
file some time later, and the checkpoint that makes sure of it runs in the background. Whatever the log cannot take is
flushed file by file: it makes writes faster and decides nothing.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from shardmill.core.errors import InsufficientStorage, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.storage.files import disk_errors, sync_directory, sync_file_system
from shardmill.storage.index import Index
from shardmill.storage.log import Key, LogFile, Record, logged_size

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

MOST = 256  # objects of one group


class SmallWrite(Protocol):
    """One object on its way; its calls block and raise ShardmillError."""

    key: str

    @property
    def store(self) -> str: ...

    @property
    def index(self) -> Index: ...

    @property
    def is_durable(self) -> bool: ...

    @property
    def path(self) -> Path:
        """Of the object's file."""
        ...

    @property
    def meta(self) -> ObjectMeta:
        """Known once it is written."""
        ...

    def write(self) -> bytes | bytearray:
        """Make its file under another name; the file's bytes."""
        ...

    def note(self) -> None:
        """Note in the journal that it is on its way, until `close`: the log does not tell."""
        ...

    def sync(self) -> None:
        """Make the file's bytes durable, and the note."""
        ...

    def publish(self) -> None:
        """Give the file its name."""
        ...

    def restore(self) -> None:
        """Put back what was there before `publish`."""
        ...

    def close(self) -> None: ...


class Groups:
    """The log and the thread that fills it; used from the loop's thread.

    Args:
        objects: A directory of the file system that all objects lie on; the log may lie on another.
        files: Two, cleared.
    """

    def __init__(self, objects: Path, files: Sequence[LogFile]) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.open(objects, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = files
        self._current, self._spare = files[0], [files[1]]
        self._logged: dict[LogFile, set[Key]] = {file: set() for file in files}
        self._turn = max(file.turn for file in files)
        self._is_broken = False
        self._waiting: list[tuple[SmallWrite, asyncio.Future[None]]] = []
        self._is_running = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="small-writes")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="log-checkpoint")

    async def commit(self, write: SmallWrite) -> None:
        """Store it; it has what its bucket promises when this returns.

        Raises:
            ShardmillError: It is not stored, and what was there before still is.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((write, future))
        if not self._is_running:
            self._start()
        await future

    def has(self, store: str, key: str) -> bool:
        """What the log says of the key might be taken for newer than what another way of writing does."""
        return any((store, key) in keys for keys in self._logged.values())

    async def settle(self, store: str, key: str, path: Path) -> None:
        """Make a key's file durable as it is, and forget what was logged of it: it is about to be changed otherwise."""
        await self._loop.run_in_executor(self._thread, self._settle, store, key, path)

    async def close(self) -> None:
        """Leave an empty log; nothing may be on its way."""
        await self._loop.run_in_executor(None, self._thread.shutdown)
        self._background.submit(self._checkpoint_all)
        await self._loop.run_in_executor(None, self._background.shutdown)
        os.close(self._descriptor)

    def _start(self) -> None:
        batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        self._is_running = True
        running = self._loop.run_in_executor(self._thread, self._commit, [write for write, _ in batch])
        running.add_done_callback(partial(self._ended, [future for _, future in batch]))

    def _ended(
        self,
        futures: Sequence["asyncio.Future[None]"],
        running: "asyncio.Future[Sequence[ShardmillError | None]]",
    ) -> None:
        self._is_running = False
        if self._waiting:
            self._start()
        defect = running.exception()
        outcomes = [defect] * len(futures) if defect is not None else running.result()
        for future, outcome in zip(futures, outcomes, strict=True):
            if future.done():
                continue
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)

    def _commit(self, writes: Sequence[SmallWrite]) -> Sequence[ShardmillError | None]:
        """One group; what became of each."""
        group = _Group(writes)
        contents = group.each(lambda write: write.write())
        logged = self._log([(write, contents[write]) for write in group.alive if write.is_durable])
        unlogged = [write for write in group.alive if write.is_durable and write not in logged]
        group.each(lambda write: write.note(), unlogged)
        group.each(self._sync, unlogged)
        group.each(lambda write: write.publish())
        group.each(lambda write: _sync_name(write.path), unlogged)
        for index in {write.index for write in group.alive}:
            changed = [write for write in group.alive if write.index is index]
            error = index.put_now([(write.store, write.meta) for write in changed])
            if error is not None:
                for write in changed:
                    group.fail(write, error)
        for write in group.failed:
            self._undo(write, is_logged=write in logged)
        for write in writes:
            write.close()
        return [group.outcomes.get(write) for write in writes]

    def _log(self, writes: Sequence[tuple[SmallWrite, bytes | bytearray]]) -> set[SmallWrite]:
        """Log what there is room for; the ones that are durable by it."""
        if not writes or self._is_broken:
            return set()
        size = sum(logged_size(write.key, len(content)) for write, content in writes)
        if size > self._current.room(keep=self._current.reserve) and not self._rotate():
            return set()
        if size > self._current.room(keep=self._current.reserve):
            return set()
        keys = self._logged[self._current]
        # Before: whoever asks whether a key is logged must not miss one.
        keys.update((write.store, write.key) for write, _ in writes)
        try:
            self._current.append([Record(write.store, write.key, content) for write, content in writes])
        except ShardmillError as error:
            logger.warning("the log is not used any more before the next start: %s", error)
            self._is_broken = True
            return set()
        return {write for write, _ in writes}

    def _sync(self, write: SmallWrite) -> None:
        if self.has(write.store, write.key):
            self._settle(write.store, write.key, write.path)
        write.sync()

    def _undo(self, write: SmallWrite, *, is_logged: bool) -> None:
        try:
            write.restore()
            if is_logged:
                self._settle(write.store, write.key, write.path)
        except ShardmillError as error:
            logger.warning("a write that failed cannot be undone: %s", error)

    def _settle(self, store: str, key: str, path: Path) -> None:
        with disk_errors("the log"):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            _sync_name(path)
        record = Record(store, key, None)
        if logged_size(key, 0) > self._current.room(keep=0) and not self._rotate():
            raise InsufficientStorage("the log is full and the disk does not take what is in it; nothing was changed")
        self._current.append([record])
        for keys in self._logged.values():
            keys.discard((store, key))

    def _rotate(self) -> bool:
        """Go on in the other file, if the disk has all that is in it."""
        if not self._spare:
            return False
        full, self._current = self._current, self._spare.pop()
        self._background.submit(self._checkpoint, full)
        return True

    def _checkpoint(self, full: LogFile) -> None:
        """Let the disk have the files of what is logged, then forget that."""
        try:
            with disk_errors("the log"):
                sync_file_system(self._descriptor)
            self._turn += 1
            full.clear(self._turn)
        except ShardmillError as error:
            # An error is told once, so a second try would tell nothing: the next start looks at each file.
            logger.error("what is logged stays so until the next start: %s", error)
            self._is_broken = True
            return
        self._logged[full] = set()
        self._spare.append(full)

    def _checkpoint_all(self) -> None:
        for file in self._files:
            if file.is_used and not self._is_broken:
                self._checkpoint(file)
            file.close()
            if not file.is_used:
                file.remove()


class _Group:
    """Writes of a group and what has become of them."""

    def __init__(self, writes: Sequence[SmallWrite]) -> None:
        self._writes = writes
        self.outcomes: dict[SmallWrite, ShardmillError] = {}

    @property
    def alive(self) -> Sequence[SmallWrite]:
        return [write for write in self._writes if write not in self.outcomes]

    @property
    def failed(self) -> Sequence[SmallWrite]:
        return list(self.outcomes)

    def fail(self, write: SmallWrite, error: ShardmillError) -> None:
        self.outcomes[write] = error

    def each(
        self, call: Callable[[SmallWrite], Value], writes: Sequence[SmallWrite] | None = None
    ) -> dict[SmallWrite, Value]:
        """Call for all, or these, that have not failed; who raises has."""
        results: dict[SmallWrite, Value] = {}
        for write in self.alive if writes is None else writes:
            if write in self.outcomes:
                continue
            try:
                results[write] = call(write)
            except ShardmillError as error:
                self.fail(write, error)
        return results


def _sync_name(path: Path) -> None:
    with disk_errors("a new name"), contextlib.suppress(FileNotFoundError):
        sync_directory(path.parent)
