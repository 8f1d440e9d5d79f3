"""The reads that bring what is missing of one version of one object, and who waits for it.

At most one read at a time brings a block, whoever wants it. Nobody reads a byte that is not there: `wait` first. A
version that the origin no longer has is lost: what is there of it can be read on, the rest is never mixed in.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shardmill.core.errors import Conflict, ObjectChanged, ObjectNotFound, ServerError, ShardmillError
from shardmill.core.origins import DrawnRead, OriginRead
from shardmill.storage.cache.blocks import ARRIVING, WANTED, Blocks
from shardmill.storage.cache.holding import Holding
from shardmill.storage.cache.pieces import PieceWriter, Queue, Taker, copy, cut
from shardmill.storage.cache.record import CacheRecord
from shardmill.storage.cache.upstream import Reader, Stream, Upstream, Waiter
from shardmill.storage.cache.window import Window
from shardmill.storage.files import disk_error
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK

PIECE = 32 << 20  # bytes of one read of a large object
SINGLE = 80 << 20  # bytes; what is no larger comes with one read: a shard of 64 MiB with its headers does
WORTH_A_VISIT = 2 << 20  # bytes; fewer are not written at once while more arrive
A_VISIT = 4 << 20  # bytes that a thread receives and writes before readers are told
NEARLY = 0.8  # share that is there, from which on a fill without readers is finished


class Entry(Holding):
    """One version of one object on the disk, and its fill.

    Args:
        upstream: Of its bucket.
        record: What version it is.
        path: See `Holding`, as `log`, `blocks`, `is_made`, `is_pinned` and `window`.
        takes_ranges: False: its origin gives it from the beginning only.
        is_versioned: Pieces of two reads may be put together.
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
        super().__init__(
            upstream, record, path=path, log=log, blocks=blocks, is_made=is_made, is_pinned=is_pinned, window=window
        )
        self.joining = 0
        """Who is opening it, and has not come so far as to say what it wants."""
        self.takes_ranges = takes_ranges
        self.is_versioned = is_versioned
        self._readers: list[Reader] = []
        self._waiters: list[Waiter] = []
        self._held = 0
        """Reads that were begun elsewhere and will say what they bring of it."""
        self._is_careful = False
        """A read failed: what nobody waits for is not fetched."""

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
                await self._window.reach(start, need)
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
                if isinstance(read, DrawnRead) and read.is_drawn:
                    await self._draw(stream, read)
                else:
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

    async def _draw(self, stream: Stream, read: DrawnRead) -> None:
        """What threads receive and write, and word of it to who waits."""
        assert self._file is not None
        writer = PieceWriter(self.descriptor, self._file.log, self.meta.size, stream.first * BLOCK)
        taker = Taker(writer, frozenset(stream.owned), owns_all=len(stream.owned) == stream.last - stream.first)
        while stream.owned:
            room = A_VISIT if self._window is None else await self._window.wait_for(writer.position)
            size = await read.draw(taker.take, min(A_VISIT, room), self._upstream.in_thread)
            if not size:
                return
            self._upstream.counters.fetched += size
            self._add(stream, taker.found())
            self._tell(stream, writer.position)
            self._upstream.width.add(size, time.monotonic(), len(self._streams))

    async def _write(self, stream: Stream, queue: Queue) -> None:
        """A task: pieces to the disk, and word of them to who waits."""
        assert self._file is not None
        writer = PieceWriter(self.descriptor, self._file.log, self.meta.size, stream.first * BLOCK)
        least = 1
        while pieces := await queue.take(least):
            # The first bytes at once, then as many as are worth a visit to a thread.
            least = WORTH_A_VISIT
            size = sum(map(len, pieces))
            self._upstream.counters.fetched += size
            for batch in cut(
                pieces, writer.position, stream.owned, owns_all=len(stream.owned) == stream.last - stream.next
            ):
                if batch.is_owned:
                    if self._window is not None:
                        await self._window.wait_for(writer.position)
                    # The thread uses the descriptor, so it is waited for.
                    found = await finish(self._upstream.in_thread(writer.write, batch.pieces))
                    self._add(stream, found)
                else:
                    writer.position += batch.size
                self._tell(stream, writer.position)
            self._upstream.width.add(size, time.monotonic(), len(self._streams))

    def _tell(self, stream: Stream, position: int) -> None:
        """A read has come so far."""
        block = stream.next = position // BLOCK
        if position % BLOCK and block in stream.owned:
            self.blocks.begin(block, position % BLOCK)
        self._wake()

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
