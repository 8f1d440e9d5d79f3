"""The file of one version of one object: what of it is there, the room that it takes, and who has it open."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from shardmill.core.errors import InsufficientStorage, ShardmillError
from shardmill.storage.cache import files
from shardmill.storage.cache.blocks import ABSENT, THERE, WANTED, Blocks
from shardmill.storage.cache.pieces import allocate, punch
from shardmill.storage.cache.record import CacheRecord
from shardmill.storage.cache.upstream import Stream, Upstream
from shardmill.storage.cache.window import Window
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK

logger = logging.getLogger(__name__)

_TOUCH_SECONDS = 60.0  # between notes on the disk of the last use


class Holding:
    """`lease` it before anything is read.

    Args:
        upstream: Of its bucket.
        record: What version it is.
        path: Its file; None: it passes through memory and is private to one reader.
        log: Beside a file that has holes.
        blocks: None: all are there, and their hashes are in the file.
        is_made: Its file is there.
        is_pinned: It is never evicted.
        window: Of one that passes through.
    """

    def __init__(
        self,
        upstream: Upstream,
        record: CacheRecord,
        *,
        path: Path | None,
        log: Path | None,
        blocks: Blocks | None,
        is_made: bool,
        is_pinned: bool,
        window: Window | None,
    ) -> None:
        self.record = record
        self.meta = record.meta
        self.path = path
        self.log = log
        self.taken = 0
        self.used = time.time()
        self.leases = 0
        self.lost: ShardmillError | None = None
        """Why what is not there will not come."""
        self.is_pinned = is_pinned
        self._upstream = upstream
        self._blocks = blocks
        self._file: files.Opened | None = None
        self._is_made = is_made
        self._opening = asyncio.Lock()
        self._reserving = asyncio.Lock()
        self._streams: list[Stream] = []
        """Reads of the origin that go on; whoever brings them adds and removes them."""
        self._torn: set[int] = set()
        """Blocks of which some came, as somebody may have been told, and the rest did not."""
        self._is_gone = False
        self._touched = 0.0
        self._window = window

    # What it is.

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def version(self) -> str:
        return self.record.version

    @property
    def descriptor(self) -> int:
        assert self._file is not None
        return self._file.descriptor

    @property
    def blocks(self) -> Blocks:
        assert self._blocks is not None
        return self._blocks

    @property
    def is_complete(self) -> bool:
        """All bytes are there."""
        return self._blocks is None or self._blocks.is_complete

    @property
    def is_passing(self) -> bool:
        """It is in memory, as much as is being read."""
        return self.path is None

    @property
    def is_arriving(self) -> bool:
        """A read of the origin goes on, which confirms the version."""
        return bool(self._streams)

    @property
    def may_leave(self) -> bool:
        return not (self.leases or self._streams or self.is_pinned)

    @property
    def bytes_there(self) -> int:
        return self.meta.size if self._blocks is None else sum(stop - start for start, stop in self._blocks.ranges())

    def next_absent(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first bytes of a range, in whole blocks, that are neither there nor arriving."""
        run = self.blocks.next_run(ABSENT, *self.blocks.span(start, stop), self.blocks.count)
        return None if run is None else (run[0] * BLOCK, run[1] * BLOCK)

    def has(self, start: int, stop: int | None) -> bool:
        """Whether all of a range is there."""
        stop = self.meta.size if stop is None else min(stop, self.meta.size)
        return self._blocks is None or start >= stop or self._blocks.reach(start, stop) >= stop

    # Who has it.

    async def lease(self) -> None:
        """Have it open; `unlease` follows.

        Raises:
            FileNotFoundError: Somebody removed its file.
            InsufficientStorage: There is no room for one.
        """
        self.leases += 1
        try:
            async with self._opening:
                if self._file is None:
                    try:
                        self._file = await self._open()
                    except InsufficientStorage:
                        # A name takes little, but there may be nothing.
                        await self._upstream.disk.make_room(BLOCK)
                        self._file = await self._open()
                    self._is_made = True
                    if self._blocks is None:
                        self._blocks = Blocks(self.meta.size, self._file.hashes)
            if self.blocks.is_complete and self.log is not None:
                await self._publish()
        except BaseException:
            self.unlease()
            raise

    def unlease(self) -> None:
        self.leases -= 1
        self.used = time.time()
        self._close_if_idle()

    def leave(self) -> Sequence[Path]:
        """See `disk.Evictable`."""
        self._upstream.counters.evicted += 1
        self._upstream.forget(self)
        return self.drop()

    def drop(self) -> Sequence[Path]:
        """It is to be found no more: its room is given back as soon as nobody has it. Returns its files."""
        self._is_gone = True
        self._upstream.disk.forget(self)
        paths = [path for path in (self.path, self.log) if path is not None]
        self._close_if_idle()
        return paths

    def _close_if_idle(self) -> None:
        if self.leases or self._streams or self._opening.locked():
            return
        if self._blocks is not None:
            self._give_up_wanted()
            if not self._is_gone and not self.is_passing and not self._blocks.there and not self.is_complete:
                # Nothing came of it.
                self._upstream.forget(self)
                self._upstream.start(self._upstream.disk.unlink(self.drop()))
                return
        if self._file is not None:
            self._punch_torn(self._file.descriptor)
            self.touch(self._file.descriptor)
            self._file.close()
            self._file = None
        if self._is_gone:
            self._upstream.disk.give_back(self.taken)
            self.taken = 0
        window, self._window = self._window, None
        if window is not None:
            window.close()

    def _punch(self, state: int, first: int, last: int) -> None:
        """Give back what the disk holds of blocks of that state, but not of those that somebody may be reading."""
        for start, stop in self.blocks.runs(state, first, last, without=self._torn) if self._file is not None else ():
            punch(self.descriptor, start, stop)

    def _punch_torn(self, descriptor: int) -> None:
        """Give back what came of blocks that did not come whole: it takes room that is not counted.

        Only once nobody has it open: whoever was told of those bytes may be about to read them.
        """
        if self.log is not None:
            for block in self._torn:
                if self.blocks.state(block) != THERE:
                    punch(descriptor, block * BLOCK, (block + 1) * BLOCK)
        self._torn.clear()

    def touch(self, descriptor: int) -> None:
        """Note the last use on the disk, for the next process."""
        if not self._is_gone and self.path is not None and self.used - self._touched > _TOUCH_SECONDS:
            self._touched = self.used
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    async def _open(self) -> files.Opened:
        opening = asyncio.ensure_future(self._upstream.in_thread(self._open_file))
        return await opened(opening, files.Opened.close)

    def _open_file(self) -> files.Opened:
        if self.path is None:
            return files.open_passing(self.meta.size)
        if self.log is None:
            return files.open_finished(self.path, self.meta.size, needs_hashes=self._blocks is None)
        return files.open_part(self.path, self.log, self.record, is_new=not self._is_made)

    # Its room, and its bytes.

    async def reserve(self, first: int, last: int) -> None:
        """Take the room of what is not there of blocks [first, last).

        Raises:
            InsufficientStorage: There is none.
        """
        blocks = self.blocks
        if self.is_passing:
            blocks.turn(first, last, ABSENT, WANTED)
            return
        async with self._reserving:
            size = blocks.room(first, last, ABSENT)
            if not size:
                return
            try:
                await self._take(size, first, last)
            except InsufficientStorage:
                # Others have taken what was free a moment ago.
                await self._upstream.disk.make_room(size)
                await self._take(size, first, last)
            # What was lost meanwhile is not wanted twice.
            wanted = blocks.room(first, last, ABSENT)
            blocks.turn(first, last, ABSENT, WANTED)
            self.taken += wanted
            self._upstream.disk.give_back(size - wanted)

    async def _take(self, size: int, first: int, last: int) -> None:
        """Take `size` bytes for what is absent of blocks [first, last), of the disk, too, which others may fill."""
        disk = self._upstream.disk
        await disk.take(size)
        try:
            await finish(disk.in_thread(allocate, self.descriptor, self.blocks.runs(ABSENT, first, last)))
        except BaseException:
            disk.give_back(size)
            self._punch(ABSENT, first, last)
            raise

    async def verify(self, start: int, stop: int) -> bool:
        """Look at what an earlier process left; False: some of it is damaged and will be fetched again."""
        numbers = self.blocks.unverified(start, stop)
        if not numbers:
            return True
        wrong = await finish(self._upstream.in_thread(files.find_wrong, self.descriptor, self.blocks, numbers))
        for number in numbers:
            if number in wrong:
                # Its room stays taken.
                if self.blocks.state(number) == THERE:
                    self.blocks.drop(number, into=WANTED)
                    self._upstream.counters.repaired += 1
            else:
                self.blocks.verify(number)
        if wrong:
            logger.warning("%s: %d blocks are damaged on the disk and are fetched again", self._label, len(wrong))
        return not wrong

    def release(self, position: int) -> None:
        """Of one that passes through: bytes before `position` are not read again."""
        gone = None if self._window is None else self._window.move(position)
        if gone is None:
            return
        for block in range(*gone):
            if self.blocks.state(block) == THERE:
                self.blocks.drop(block)
        punch(self.descriptor, gone[0] * BLOCK, gone[1] * BLOCK)

    def _give_up_wanted(self) -> None:
        """Give back the room of what will not be fetched."""
        if self.is_passing:
            return
        size = self.blocks.room(0, self.blocks.count, WANTED)
        if size:
            self._punch(WANTED, 0, self.blocks.count)
            self.blocks.turn(0, self.blocks.count, WANTED, ABSENT)
            self.taken -= size
            self._upstream.disk.give_back(size)

    async def _publish(self) -> None:
        """All blocks are there: it becomes a finished file."""
        log, path = self.log, self.path
        if log is None or path is None or self._is_gone:
            return
        self.log = None

        async def publish() -> None:
            hashes = bytes(self.blocks.hashes)
            try:
                self.path = await self._upstream.disk.in_thread(
                    files.publish, self.descriptor, path, log, self.record, hashes
                )
            except InsufficientStorage:
                # All can be read; what is missing is what it would be known by after a reboot.
                self.log = log
            except ShardmillError:
                if not self._is_gone:
                    raise
                # Its file was removed before it had its name.
                self.log = log
            if self._is_gone:
                await self._upstream.disk.unlink([found for found in (self.path, self.log) if found is not None])

        await finish(publish())

    @property
    def _label(self) -> str:
        return f"{self._upstream.bucket}/{self.key}"
