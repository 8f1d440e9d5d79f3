"""One version of one object on the disk, the reads that bring what is missing, and who waits for it.

At most one read at a time brings a block, whoever wants it. Nobody reads a byte that is not there: `wait` first. A
version that the origin no longer has is lost: what is there of it can be read on, the rest is never mixed in.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shardmill.core.errors import (
    Conflict,
    InsufficientStorage,
    ObjectChanged,
    ObjectNotFound,
    ServerError,
    ShardmillError,
)
from shardmill.core.origins import OriginRead
from shardmill.storage.cache import files
from shardmill.storage.cache.blocks import ABSENT, ARRIVING, THERE, WANTED, Blocks
from shardmill.storage.cache.pieces import PieceWriter, Queue, allocate, copy, cut, punch
from shardmill.storage.cache.record import CacheRecord
from shardmill.storage.cache.upstream import Reader, Stream, Upstream, Waiter
from shardmill.storage.cache.window import Window
from shardmill.storage.files import disk_error
from shardmill.storage.steps import finish, opened
from shardmill.storage.trailer import BLOCK

logger = logging.getLogger(__name__)

PIECE = 32 << 20  # bytes of one read of a large object
SINGLE = 80 << 20  # bytes; what is no larger comes with one read: a shard of 64 MiB with its headers does
WORTH_A_VISIT = 2 << 20  # bytes; fewer are not written at once while more arrive
NEARLY = 0.8  # share that is there, from which on a fill without readers is finished

_TOUCH_SECONDS = 60.0  # between notes on the disk of the last use


class Entry:
    """Use `Entry.new` or `Entry.load…`; `lease` before anything is read.

    Args:
        upstream: Of its bucket.
        record: What version it is.
        facts: As the origin told them; None: as the record has them.
        path: Its file; None: it passes through memory and is private to one reader.
        log: Beside a file that has holes.
        blocks: None: all are there, and their hashes are in the file.
        takes_ranges: False: its origin gives it from the beginning only.
        is_versioned: Pieces of two reads may be put together.
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
        takes_ranges: bool = True,
        is_versioned: bool = True,
        is_made: bool = False,
        is_pinned: bool = False,
        window: Window | None = None,
    ) -> None:
        self.record = record
        self.meta = record.meta
        self.path = path
        self.log = log
        self.taken = 0
        self.used = time.time()
        self.leases = 0
        self.joining = 0
        """Who is opening it, and has not come so far as to say what it wants."""
        self.lost: ShardmillError | None = None
        """Why what is not there will not come."""
        self.is_pinned = is_pinned
        self.takes_ranges = takes_ranges
        self.is_versioned = is_versioned
        self._upstream = upstream
        self._blocks = blocks
        self._file: files.Opened | None = None
        self._is_made = is_made
        self._opening = asyncio.Lock()
        self._reserving = asyncio.Lock()
        self._readers: list[Reader] = []
        self._waiters: list[Waiter] = []
        self._streams: list[Stream] = []
        self._torn: set[int] = set()
        """Blocks of which some came, as somebody may have been told, and the rest did not."""
        self._held = 0
        """Reads that were begun elsewhere and will say what they bring of it."""
        self._is_careful = False
        """A read failed: what nobody waits for is not fetched."""
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
            self._touch(self._file.descriptor)
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

    def _touch(self, descriptor: int) -> None:
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

    # What is wanted of it.

    def join(self, reader: Reader) -> None:
        self._readers.append(reader)

    def joined(self) -> None:
        """Who was opening it has come so far, or has gone."""
        self.joining -= 1

    def part(self, reader: Reader) -> None:
        """A reader leaves: what nobody else wants is no longer fetched."""
        self._readers.remove(reader)
        if self.is_nearly_there and not self.is_passing:
            return
        if self.joining:
            return
        for stream in self._streams:
            if stream.last - stream.next <= 1:
                # The rest of one block costs less than to ask for it again; small ranges are read to be cached, too.
                continue
            if not any(other.first < stream.last and stream.next < other.last for other in self._readers):
                assert stream.task is not None
                # Not at once: a task that is cancelled before its first step never cleans up.
                asyncio.get_running_loop().call_soon(stream.task.cancel)

    @property
    def is_nearly_there(self) -> bool:
        """So much has come that the rest costs less than to bring it all again."""
        return self.blocks.there >= NEARLY * self.blocks.count

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

    async def wait(self, reader: Reader, start: int, need: int, stop: int) -> None:
        """Return when bytes [start, need) are there; bytes until `stop` are fetched, too.

        Raises:
            Conflict: The origin has another version now.
            BackendUnavailable, …: The origin failed; it may be asked again.
        """
        while self.blocks.reach(start, need) < need:
            if self.lost is not None:
                raise self.lost
            if self._window is not None:
                self._window.reach(start, need)
            first, last = self.blocks.span(start, stop)
            await self.reserve(first, last)
            reader.want(first, last)
            waiter = Waiter(reader, start, need, stop, asyncio.get_running_loop().create_future())
            self._waiters.append(waiter)
            try:
                self._kick()
                await waiter.future
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

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

    # How it comes.

    def begin(self, start: int, stop: int) -> Stream:
        """The current task has begun a read of [start, stop): what is wanted there comes by it. `bring` follows."""
        first, last = self.blocks.span(start, stop)
        stream = Stream(first, last, first, asyncio.current_task())
        self._begin(stream)
        return stream

    def hold_reads(self) -> None:
        """Begin none: one was begun to learn the version, and may bring what is wanted. `allow_reads` follows."""
        self._held += 1

    def allow_reads(self) -> None:
        self._held -= 1
        self._kick()

    def _kick(self) -> None:
        """Start what reads are needed and allowed."""
        while self.lost is None and not self._held and len(self._streams) < self._width:
            run = self._next_run()
            if run is None:
                return
            stream = Stream(*run, run[0])
            self._begin(stream)
            stream.task = self._upstream.start(self._fetch(stream))

    @property
    def _width(self) -> int:
        can_share = self.takes_ranges and self.is_versioned and not self.is_passing
        return self._upstream.width.reads if can_share and self.meta.size > SINGLE else 1 if not can_share else 2

    def _next_run(self) -> tuple[int, int] | None:
        """Blocks to be fetched next: what is waited for first."""
        most = PIECE // BLOCK if self.meta.size > SINGLE and self.takes_ranges else self.blocks.count
        for waiter in self._waiters:
            first, last = self.blocks.span(waiter.position, waiter.need)
            if self.blocks.next_run(WANTED, first, last, 1) is not None:
                far = last if self._is_careful else max(last, waiter.reader.last)
                return self.blocks.next_run(WANTED, first, far, most)
        if not self._is_careful:
            for reader in self._readers:
                run = self.blocks.next_run(WANTED, reader.first, reader.last, most)
                if run is not None:
                    return run
        return None

    def _begin(self, stream: Stream) -> None:
        for block in range(stream.first, stream.last):
            if self.blocks.state(block) == WANTED:
                stream.owned.add(block)
        self.blocks.turn(stream.first, stream.last, WANTED, ARRIVING)
        self._streams.append(stream)

    async def _fetch(self, stream: Stream) -> None:
        """A task: one read of the origin."""
        upstream = self._upstream
        start, stop = stream.first * BLOCK, min(self.meta.size, stream.last * BLOCK)
        limit = upstream.reads if not self.is_passing else contextlib.nullcontext()
        try:
            if not self.is_versioned and (stream.first or self.blocks.there):
                raise Conflict(f"{self._label}: its origin tells no version, so that what is missing cannot be fetched")
            async with limit:
                began = time.monotonic()
                async with upstream.origin.read(self.key, start=start, stop=stop, version=self._asked_version) as read:
                    upstream.counters.fetches += 1
                    upstream.counters.fetch_seconds += time.monotonic() - began
                    await self.bring(stream, read)
        except BaseException as error:
            self._end(stream, error)
            if not isinstance(error, ShardmillError | OSError):
                raise

    @property
    def _asked_version(self) -> str | None:
        return self.version if self.is_versioned else None

    async def bring(self, stream: Stream, read: OriginRead) -> None:
        """Write what a read gives; failures are told to who waits."""
        self.takes_ranges = self.takes_ranges and read.facts.takes_ranges
        try:
            if self.is_versioned and read.facts.version != self.version:
                raise ObjectChanged(f"{self._label} was replaced at its origin")
            if stream.owned:
                await copy(read, partial(self._write, stream))
            if stream.owned:
                raise ServerError(f"{self._label}: its origin gave fewer bytes than it announced")
            self._is_careful = False
            if self.blocks.is_complete and self.log is not None:
                await self._publish()
        except BaseException as error:
            self._end(stream, error)
            if not isinstance(error, ShardmillError | OSError):
                raise
        else:
            self._end(stream, None)

    async def _write(self, stream: Stream, queue: Queue) -> None:
        """A task: pieces to the disk, and word of them to who waits."""
        blocks, counters = self.blocks, self._upstream.counters
        assert self._file is not None
        writer = PieceWriter(self.descriptor, self._file.log, self.meta.size, stream.first * BLOCK)
        least = 1
        while pieces := await queue.take(least):
            # The first bytes at once, then as many as are worth a visit to a thread.
            least = WORTH_A_VISIT
            size = sum(map(len, pieces))
            counters.fetched += size
            for batch in cut(
                pieces, writer.position, stream.owned, owns_all=len(stream.owned) == stream.last - stream.next
            ):
                if batch.is_owned:
                    if self._window is not None:
                        await self._window.wait_for(writer.position)
                    # The thread uses the descriptor, so it is waited for.
                    found = await finish(self._upstream.in_thread(writer.write, batch.pieces))
                    self._add(stream, found)
                    if writer.position % BLOCK:
                        blocks.begin(writer.position // BLOCK, writer.position % BLOCK)
                else:
                    writer.position += batch.size
                stream.next = writer.position // BLOCK
                self._wake()
            self._upstream.width.add(size, time.monotonic(), len(self._streams))

    def _add(self, stream: Stream, found: Sequence[tuple[int, bytes]]) -> None:
        known = self.log is None and not self.is_passing
        for block, digest in found:
            if known and self.blocks.digest(block) != digest:
                raise ObjectChanged(f"{self._label}: its origin has other bytes now under the same version")
            stream.owned.discard(block)
            self.blocks.add(block, digest)

    def _wake(self) -> None:
        for waiter in list(self._waiters):
            if self.blocks.reach(waiter.position, waiter.need) >= waiter.need:
                self._waiters.remove(waiter)
                if not waiter.future.done():
                    waiter.future.set_result(None)

    def _end(self, stream: Stream, error: BaseException | None) -> None:
        """A read has ended, one way or another; the second call for a stream does nothing."""
        if stream not in self._streams:
            return
        self._streams.remove(stream)
        begun = [block for block in stream.owned if self.blocks.state(block) == ARRIVING]
        self._torn.update(block for block in begun if self.blocks.begun(block))
        for block in begun:
            self.blocks.drop(block, into=WANTED)
        if isinstance(error, ObjectChanged | ObjectNotFound):
            self._lose(Conflict(f"{self._label} was replaced at its origin while it was read; read it again"))
        elif isinstance(error, Conflict):
            self._lose(error)
        elif isinstance(error, Exception):
            # A defect is told, too: whoever waits would have the read begun again at once, and again.
            self._is_careful = True
            self._fail(self._told(error), stream)
        if not self._readers:
            self._give_up_wanted()
        self._kick()
        self._close_if_idle()

    def _told(self, error: Exception) -> ShardmillError:
        if isinstance(error, ShardmillError):
            return error
        if isinstance(error, OSError):
            return disk_error(error, self._label)
        return ServerError(f"{self._label}: internal error; the node's log has the story")

    def _fail(self, error: ShardmillError, stream: Stream) -> None:
        for waiter in list(self._waiters):
            first, last = self.blocks.span(waiter.position, waiter.need)
            if first < stream.last and stream.first < last:
                self._waiters.remove(waiter)
                if not waiter.future.done():
                    waiter.future.set_exception(error)

    def _lose(self, error: Conflict) -> None:
        """The rest of this version will not come."""
        if self.lost is None:
            self.lost = error
            self._upstream.forget(self)
            paths = self.drop()
            self._upstream.start(self._upstream.disk.unlink(paths))
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(self.lost)
        self._waiters.clear()

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
            if self._is_gone:
                await self._upstream.disk.unlink([found for found in (self.path, self.log) if found is not None])

        await finish(publish())

    @property
    def _label(self) -> str:
        return f"{self._upstream.bucket}/{self.key}"
