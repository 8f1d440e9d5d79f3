"""The driver of one run: feeds its state machine from the shard and the workers, and its reader from the machine."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from shardmill.core.errors import BadShard, SampleOutOfRange, ShardmillError, TransformFailed
from shardmill.core.sources import Source
from shardmill.core.specs import Spec
from shardmill.etl.batches import Batch, Dropped, Failed, Loss, Out, Result, StageSeconds
from shardmill.etl.environments import Environment
from shardmill.etl.run_state import RunState, SampleFailed
from shardmill.etl.statistics import VersionCounters
from shardmill.etl.versions import Version
from shardmill.etl.workers import WorkerPool
from shardmill.shards.grouping import Sample
from shardmill.shards.index import ShardIndex
from shardmill.shards.tar import TarError

logger = logging.getLogger(__name__)

_AHEAD = 8 << 20  # bytes of the shard made sure of at a time, before headers are read there
_INDEX_STEP = 64  # samples indexed in one visit to a thread

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
    """One spec over one opened shard, with one reader. Use as an async context manager: leaving it stops all work.

    Args:
        spec: Resolved; its options decide what is done.
        seed: The spec's seed, or the one drawn for this run.
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
        self._source = source
        self._spec = spec
        self._pool = pool
        self._reader = ShardReader(source, threads)
        self._counters = counters
        self._object_timeout = object_timeout
        self._on_failure = on_failure
        self._changed = asyncio.Event()
        self._index_wanted = asyncio.Event()
        self._indexing: asyncio.Task[None] | None = None
        self._worked = 0.0
        self._is_checked = False
        self._reported: str | None = None

    @property
    def source_descriptor(self) -> int:
        return self._source.descriptor

    async def __aenter__(self) -> "Run":
        self._counters.runs += 1
        self._indexing = asyncio.create_task(self._index())
        self._pool.attach(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.state.abandon()
        self._pool.detach(self)
        if self._indexing is not None:
            self._indexing.cancel()
            await asyncio.wait([self._indexing])
        await self._reader.close()
        self._settle()

    async def start(self) -> None:
        """Return when bytes may be sent.

        Raises:
            ShardmillError: The run failed before that.
        """
        while not self.state.has_chunk and self.state.phase == "running":
            await self._wait()
        if self.state.error is not None:
            raise self.state.error

    async def __aiter__(self) -> AsyncIterator[memoryview | bytes]:
        """The transformed shard's bytes; each chunk is valid until the next is asked for.

        Raises:
            ShardmillError: The run failed; what was given so far ends inside a payload.
        """
        while True:
            if self.state.phase == "ended":
                await self._check_source()
            chunk = self.state.take_chunk()
            if chunk is not None:
                try:
                    yield chunk.data
                finally:
                    self.state.sent(chunk)
                self._pool.kick()
            elif self.state.error is not None:
                raise self.state.error
            elif self.state.phase == "ended":
                return
            else:
                await self._wait()

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
        self._fail(TransformFailed(failure.message, traceback=failure.traceback))

    def on_no_worker(self, error: Exception) -> None:
        if isinstance(error, ShardmillError):
            self._fail(error)
        else:
            self._fail(TransformFailed(f"no worker could be started: {error or 'the function takes too long to load'}"))

    def on_tick(self, seconds: float, busy: bool) -> None:
        if busy:
            self._worked += seconds
            if self._worked > self._object_timeout:
                self._fail(TransformFailed(f"the object took longer than {self._object_timeout:g} s (object_timeout)"))

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

    async def _check_source(self) -> None:
        """The end is sent only if the bytes were of one version to the last."""
        if not self._is_checked:
            await self._source.check_unchanged()
            self._is_checked = True

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _fail(self, error: ShardmillError) -> None:
        self.state.fail(error)
        self._settle()

    def _settle(self) -> None:
        """Hand on failures and wake the reader."""
        failures, self.state.failures = self.state.failures, []
        for failure in failures:
            self._on_failure(failure)
            self._reported = failure.message
        error = self.state.error
        if error is not None and self._reported != error.message:
            self._reported = error.message
            self._on_failure(SampleFailed(None, error.message, error.traceback))
        if self.state.phase != "running":
            self._index_wanted.set()
        self._changed.set()

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
