"""The run of a function over the samples of one shard: reads its headers, hands out batches, takes results in order."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from shardmill.core.errors import BadShard, SampleOutOfRange, ShardmillError
from shardmill.core.sources import Source
from shardmill.etl.runs.run import Order, Run
from shardmill.etl.runs.run_state import RunState
from shardmill.etl.runs.statistics import Counters
from shardmill.etl.workers.batches import Batch, Dropped, Failed, Loss, Out, Result, StageSeconds
from shardmill.shards.grouping import Sample
from shardmill.shards.index import ShardIndex
from shardmill.shards.tar import TarError

_AHEAD = 8 << 20  # bytes of the shard made sure of at a time, before headers are read there
_INDEX_STEP = 64  # samples indexed in one visit to a thread


class ShardReader:
    """Reads a shard's headers in threads, through a source that may still be arriving."""

    def __init__(self, source: Source, threads: ThreadPoolExecutor) -> None:
        self.source = source
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._index = ShardIndex(self._read, source.meta.size)
        self._ensured = 0
        self._step: asyncio.Future[list[Sample]] | None = None

    async def advance(self, limit: int) -> list[Sample]:
        """The next samples, with all their payload bytes in place; [] at the end.

        Raises:
            BadShard: It is not a good tar from here on.
        """
        self._step = self._loop.run_in_executor(self._threads, self._index.advance, limit)
        try:
            # Shielded, since the thread goes on using the descriptor; `close` waits for it.
            samples = await asyncio.shield(self._step)
        except TarError as error:
            raise BadShard(f"{self.source.meta.key}: {error}") from None
        if samples:
            stop = max(field.member.offset + field.member.size for field in samples[-1].fields)
            await self._ensure(stop)
        return samples

    async def close(self) -> None:
        """Return when no thread uses the descriptor any more."""
        if self._step is not None and not self._step.done():
            await asyncio.wait([self._step])

    def _read(self, offset: int, length: int) -> bytes:
        if offset + length > self._ensured:
            asyncio.run_coroutine_threadsafe(self._ensure(offset + length), self._loop).result()
        return os.pread(self.source.descriptor, length, offset)

    async def _ensure(self, stop: int) -> None:
        if stop > self._ensured:
            ahead = min(self.source.meta.size, stop + _AHEAD)
            # A header further on may be asked for meanwhile by the thread.
            while (ensured := self._ensured) < min(stop, ahead):
                self._ensured = max(self._ensured, await self.source.ensure_some(ensured, ahead))


class SampleRun(Run):
    """One spec over the samples of one opened shard.

    Args:
        order: What is to be done.
        state: Fresh.
        threads: For reading headers.
    """

    state: RunState

    def __init__(self, order: Order, state: RunState, threads: ThreadPoolExecutor) -> None:
        super().__init__(order, state)
        self._reader = ShardReader(order.source, threads)
        self._index_wanted = asyncio.Event()

    @property
    def fraction_done(self) -> float:
        """How much of the samples is done, 0 to 1; by their place in the shard where their number is not known."""
        count, size = self._spec.count, self._source.meta.size
        return self.state.processed / count if count else self.state.offset / size if size else 1.0

    @property
    def is_at_work(self) -> bool:
        return self.state.is_at_work

    @property
    def is_starved(self) -> bool:
        return self.state.is_starved

    def has_batch(self, *, queued: bool = False) -> bool:
        return self.state.has_batch() and not (queued and self.state.is_ending)

    def next_batch(self) -> Batch | None:
        batch = self.state.next_batch()
        if self.state.wants_index():
            self._index_wanted.set()
        self._mark()
        return batch

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        self._count(_counted(results, seconds))
        self.state.add_results(batch, results, seconds.read + seconds.decode + seconds.user + seconds.encode)
        # What is done in order is not read again, whatever becomes of a worker.
        self._source.release(self.state.offset)
        self._settle()

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        self.state.lose(batch, loss)
        self._settle()

    # Its own steps.

    async def _feed(self) -> None:
        """Read the shard's headers a little ahead of the workers."""
        error: ShardmillError | None = None
        try:
            start, count = self._spec.start, self._spec.count
            await self._skip(start)
            given = 0
            step = 2 * self._pool.lanes
            while count is None or given < count:
                samples = await self._reader.advance(step if count is None else min(step, count - given))
                if not samples:
                    break
                given += len(samples)
                step = _INDEX_STEP
                if not self.counters.decoded:
                    self.counters.decoded = self._counters.decoded = _largest_field(samples[0])
                self.state.add_samples(samples)
                self._mark()
                self._pool.kick()
                while not self.state.wants_index() and self.state.phase == "running":
                    self._index_wanted.clear()
                    await self._index_wanted.wait()
        except ShardmillError as problem:
            error = problem
        except OSError as problem:
            error = BadShard(f"{self.source_key}: it cannot be read: {problem.strerror}")
        self.state.end_index(error)
        self._settle()

    async def _skip(self, start: int) -> None:
        left = start
        while left:
            samples = await self._reader.advance(min(left, _INDEX_STEP))
            if not samples:
                raise SampleOutOfRange(f"{self.source_key} has {start - left} samples; start={start} is past its end")
            left -= len(samples)
            self._source.release(samples[-1].fields[-1].member.offset)

    async def _end_feeding(self) -> None:
        await self._reader.close()

    def _settle(self) -> None:
        super()._settle()
        if self.state.phase != "running":
            self._index_wanted.set()


def _counted(results: list[tuple[int, Result]], seconds: StageSeconds) -> Counters:
    """What results add to counts."""
    counted = Counters()
    for _, result in results:
        match result:
            case Out():
                counted.samples += 1
                counted.bytes_in += result.bytes_in
                counted.bytes_out += sum(piece.size for piece in result.pieces)
            case Dropped():
                counted.dropped += 1
                counted.bytes_in += result.bytes_in
            case Failed():
                counted.failures += 1
    counted.add_seconds(seconds)
    return counted


def _largest_field(sample: Sample) -> str:
    """The extension of the field that has most bytes: what decoding is mostly of."""
    fields = {field.name: field.member.size for field in sample.fields}
    return max(fields, key=lambda name: fields[name]).rpartition(".")[2] if fields else ""
