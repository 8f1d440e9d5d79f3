"""The driver of one run: feeds its state machine from the shard and the workers, and its output from the machine."""

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shardmill.core.errors import BadShard, SampleOutOfRange, ShardmillError, TransformFailed
from shardmill.core.sources import Source, Spool
from shardmill.core.specs import Spec
from shardmill.etl.batches import Batch, Dropped, Failed, Loss, Out, Result, StageSeconds
from shardmill.etl.environments import Environment
from shardmill.etl.run_state import RunState, SampleFailed
from shardmill.etl.spool import RunOutput, release_views
from shardmill.etl.statistics import VersionCounters
from shardmill.etl.versions import Version
from shardmill.etl.workers import WorkerPool
from shardmill.shards.grouping import Sample
from shardmill.shards.index import ShardIndex
from shardmill.shards.tar import TarError

logger = logging.getLogger(__name__)

_AHEAD = 8 << 20  # bytes of the shard made sure of at a time, before headers are read there
_INDEX_STEP = 64  # samples indexed in one visit to a thread
_WRITE = 8 << 20  # bytes written to the spool in one visit to a thread

_numbers = itertools.count(1)


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
            await self.source.ensure(self._ensured, ahead)
            self._ensured = max(self._ensured, ahead)


class Run:
    """One spec over one opened shard. `work` does it; what it gives stands in `output`.

    Args:
        source: Closed by whoever opened it, after `work` has returned.
        spec: Resolved; its options decide what is done.
        seed: The spec's seed, or the one drawn for this run.
        spool_window: Bytes that it may be ahead of its fastest reader while it is spooled.
        on_failure: Told of each failed sample and of the run's own failure.
    """

    probing = False

    def __init__(
        self,
        version: Version,
        environment: Environment,
        source: Source,
        spec: Spec,
        *,
        seed: int,
        url: str,
        state: RunState,
        pool: WorkerPool,
        threads: ThreadPoolExecutor,
        counters: VersionCounters,
        object_timeout: float,
        spool_window: int,
        on_failure: Callable[[SampleFailed], None],
    ) -> None:
        self.number = next(_numbers)
        self.version = version
        self.environment = environment
        self.seed = seed
        self.epoch = spec.epoch
        self.source_key = source.meta.key
        self.source_url = url
        self.state = state
        self.output = RunOutput(window=state.window, give_back=state.give_back, on_progress=self._on_progress)
        self._source = source
        self._spec = spec
        self._pool = pool
        self._reader = ShardReader(source, threads)
        self._counters = counters
        self._object_timeout = object_timeout
        self._spool_window = spool_window
        self._on_failure = on_failure
        self._ended = asyncio.Event()
        self._index_wanted = asyncio.Event()
        self._worked = 0.0
        self._reported: str | None = None

    @property
    def source_descriptor(self) -> int:
        return self._source.descriptor

    @property
    def fraction_done(self) -> float:
        """How much of the samples is done, 0 to 1; by their place in the shard where their number is not known."""
        count, size = self._spec.count, self._source.meta.size
        return self.state.processed / count if count else self.state.offset / size if size else 1.0

    async def work(self, spool: Spool | None) -> None:
        """Transform the shard into `output`, which is complete or failed afterwards; cancelling stops all work.

        Args:
            spool: Where the bytes go too, as far as it has room; left to be published or abandoned.
        """
        if spool is not None:
            self.output.spool_to(spool.descriptor)
        self._counters.runs += 1
        self._pool.attach(self)
        indexing = asyncio.create_task(self._index())
        writing = asyncio.create_task(self._write(spool)) if spool is not None else None
        self._on_progress()
        try:
            await self._ended.wait()
            # Workers are free for others before the last bytes are on their way.
            self._pool.detach(self)
            await self._end()
            if writing is not None:
                await writing
        finally:
            self.state.abandon()
            self._pool.detach(self)
            tasks = [task for task in (indexing, writing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._reader.close()
            self._settle()

    # What the pool asks and tells.

    def has_batch(self) -> bool:
        return self.state.has_batch()

    def next_batch(self) -> Batch | None:
        batch = self.state.next_batch()
        if self.state.wants_index():
            self._index_wanted.set()
        return batch

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        self._count(results, seconds)
        self.state.add_results(batch, results, seconds.read + seconds.decode + seconds.user + seconds.encode)
        self._settle()

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        self.state.lose(batch, loss)
        self._settle()

    def on_load_failed(self, failure: Failed) -> None:
        self.fail(TransformFailed(failure.message, traceback=failure.traceback))

    def on_no_worker(self, error: Exception) -> None:
        if isinstance(error, ShardmillError):
            self.fail(error)
        else:
            self.fail(TransformFailed(f"no worker could be started: {error or 'the function takes too long to load'}"))

    def on_tick(self, seconds: float, busy: bool) -> None:
        if busy:
            self._worked += seconds
            if self._worked > self._object_timeout:
                self.fail(TransformFailed(f"the object took longer than {self._object_timeout:g} s (object_timeout)"))

    def fail(self, error: ShardmillError) -> None:
        """End it with an error."""
        self.state.fail(error)
        self._settle()

    # Its own steps.

    async def _index(self) -> None:
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
                self.state.add_samples(samples)
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

    async def _write(self, spool: Spool) -> None:
        """Bring the output into its file, until that is complete or can take no more."""
        output = self.output
        while output.is_spooling and not (output.is_complete and output.spooled == output.published):
            taken = output.take_unspooled(_WRITE)
            if not taken:
                if output.error is not None:
                    return
                await output.wait_changed()
                continue
            is_written = False
            pieces = [held.chunk.data for held in taken]
            try:
                await spool.append(pieces)
                is_written = True
            except ShardmillError as error:
                logger.info("the result of run %d is not kept: %s", self.number, error)
            finally:
                release_views(pieces)
                output.end_spooling(taken, is_written=is_written)
            self._on_progress()
        if not output.is_spooling:
            # Its space is worth more to others once the slowest reader is past it.
            while output.slowest < output.spooled:
                await output.wait_changed()
            output.drop_file()
            await spool.abandon()

    async def _end(self) -> None:
        """The last bytes are published only if all were of one version of the source."""
        error = self.state.error
        if error is None:
            try:
                await self._source.check_unchanged()
            except ShardmillError as problem:
                error = problem
                self._on_failure(SampleFailed(None, error.message, None, ended_run=True))
        if error is not None:
            self.output.fail(error)
            return
        self._publish()
        self.output.finish()

    def _publish(self) -> None:
        while (chunk := self.state.take_chunk()) is not None:
            self.output.extend(chunk)

    def _settle(self) -> None:
        """Hand on failures and bytes, and see whether this is the end."""
        failures, self.state.failures = self.state.failures, []
        for failure in failures:
            self._on_failure(failure)
            self._reported = failure.message
        error = self.state.error
        if error is not None and self._reported != error.message:
            self._reported = error.message
            self._on_failure(SampleFailed(None, error.message, error.traceback, ended_run=True))
        if self.state.phase != "ended":
            self._publish()
        if self.state.phase != "running":
            self._index_wanted.set()
            self._ended.set()

    def _on_progress(self) -> None:
        """Readers went on, or what they have not read is safe in the file: more may be framed."""
        output = self.output
        self.state.limit = output.fastest + self._spool_window if output.is_spooling else math.inf
        self._pool.kick()

    def _count(self, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        counters = self._counters
        for _, result in results:
            match result:
                case Out():
                    counters.samples += 1
                    counters.bytes_in += result.bytes_in
                    counters.bytes_out += sum(piece.size for piece in result.pieces)
                case Dropped():
                    counters.dropped += 1
                    counters.bytes_in += result.bytes_in
                case Failed():
                    counters.failures += 1
        for position, value in enumerate((seconds.read, seconds.decode, seconds.user, seconds.encode)):
            counters.seconds[position] += value
