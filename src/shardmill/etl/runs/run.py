"""The driver of one run: its output, the file behind it, deadlines, and how it ends."""

import asyncio
import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from shardmill.core.api import TransformStatistics
from shardmill.core.errors import ServerError, ShardmillError, TransformFailed
from shardmill.core.sources import Source, Spool
from shardmill.core.specs import Spec
from shardmill.etl.environments.environments import Environment
from shardmill.etl.runs import clock
from shardmill.etl.runs.run_state import OutputState, SampleFailed
from shardmill.etl.runs.spool import RunOutput, release_views
from shardmill.etl.runs.statistics import Counters
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Batch, Failed, Loss, Result, StageSeconds, Whole
from shardmill.etl.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_WRITE = 8 << 20  # bytes written to the spool in one visit to a thread
_WORTH_A_VISIT = 2 << 20  # bytes; fewer are waited for, but
_LINGER = 0.02  # seconds at most: memory that is not in the file is lent to nobody else

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Order:
    """What a run is to do, and what it works with."""

    version: Version
    environment: Environment
    environment_id: str
    source: Source
    """Closed by whoever opened it, after `Run.work` has returned."""
    spec: Spec
    """Resolved; its options decide what is done."""
    seed: int
    """The spec's seed, or the one drawn for this run."""
    url: str
    """`provider://bucket/key` of the object."""
    pool: WorkerPool
    counters: Counters
    """Of the version."""
    object_timeout: float
    spool_window: int
    """Bytes that it may be ahead of its fastest reader while it is spooled."""
    on_failure: Callable[[SampleFailed], None]
    """Told of each failed sample and of the run's own failure."""


class Run(ABC):
    """One spec over one opened object. `work` does it; what it gives stands in `output`.

    What all kinds have in common: output, its file, deadlines, failures and the end. What is handed to workers, and
    what is made of their results, is the subclass's.
    """

    probing = False
    whole: Whole | None = None

    def __init__(self, order: Order, state: OutputState) -> None:
        self.number = next(_numbers)
        self.version = order.version
        self.environment = order.environment
        self.environment_id = order.environment_id
        self.seed = order.seed
        self.epoch = order.spec.epoch
        self.source_key = order.source.meta.key
        self.source_url = order.url
        self.state = state
        self.output = RunOutput(window=state.window, give_back=state.give_back, on_progress=self._on_progress)
        self.counters = Counters(runs=1)
        """Its own; `times` are in `clock` until it is over."""
        self.clock = clock.RunClock(time.monotonic(), self.lanes_of(order.pool))
        self.started = time.time()
        self._worked_until: float | None = None
        self._source = order.source
        self._spec = order.spec
        self._pool = order.pool
        self._counters = order.counters
        self._object_timeout = order.object_timeout
        self._spool_window = order.spool_window
        self._on_failure = order.on_failure
        self._ended = asyncio.Event()
        self._worked = 0.0
        self._reported: str | None = None

    @property
    def source_descriptor(self) -> int:
        return self._source.descriptor

    @property
    def is_ahead(self) -> bool:
        """Nobody waits for it; it gives way to runs that somebody waits for."""
        return not self.output.is_awaited

    @property
    @abstractmethod
    def fraction_done(self) -> float:
        """How much of the work is done, 0 to 1."""

    def lanes_of(self, pool: WorkerPool) -> int:
        """Workers that it can use at once."""
        return pool.lanes

    @property
    def rate(self) -> float:
        """Samples a second, whatever their outcome, from the start to the last one."""
        stop = self._worked_until if self._worked_until is not None else time.time()
        return self.counters.done / max(stop - self.started, 1e-9)

    def end_clock(self) -> None:
        """Nobody reads any more; called once."""
        now = time.monotonic()
        self.clock.stop(now)
        self._counters.times.add(self.clock.read(now))

    def snapshot(self) -> TransformStatistics:
        """Its counts and seconds until now."""
        found = Counters()
        found.add(self.counters)
        found.times.add(self.clock.read(time.monotonic()))
        return found.snapshot()

    async def work(self, spool: Spool | None) -> None:
        """Transform the object into `output`, which is complete or failed afterwards; cancelling stops all work.

        Args:
            spool: Where the bytes go too, as far as it has room; left to be published or abandoned.
        """
        if spool is not None:
            self.output.spool_to(spool.descriptor)
        self._counters.runs += 1
        self._pool.attach(self)
        feeding = asyncio.create_task(self._feed())
        writing = asyncio.create_task(self._write(spool)) if spool is not None else None
        for step in (feeding, writing):
            if step is not None:
                step.add_done_callback(self._on_step_ended)
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
            tasks = [task for task in (feeding, writing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._end_feeding()
            self._settle()

    # What the pool asks and tells.

    @property
    @abstractmethod
    def is_at_work(self) -> bool:
        """Whether workers can go on with what they have of it."""

    @property
    @abstractmethod
    def is_starved(self) -> bool:
        """Whether the object's bytes are waited for."""

    @abstractmethod
    def has_batch(self, *, queued: bool = False) -> bool: ...

    @abstractmethod
    def next_batch(self) -> Batch | None: ...

    @abstractmethod
    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None: ...

    @abstractmethod
    def on_lost(self, batch: Batch, loss: Loss | None) -> None: ...

    def on_load_failed(self, failure: Failed) -> None:
        self.fail(TransformFailed(failure.message, traceback=failure.traceback))

    def on_no_worker(self, error: Exception) -> None:
        if isinstance(error, ShardmillError):
            self.fail(error)
        else:
            self.fail(TransformFailed(f"no worker could be started: {error}"))

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

    @abstractmethod
    async def _feed(self) -> None:
        """Bring in what workers need; cancelled when the run ends."""

    @abstractmethod
    async def _end_feeding(self) -> None:
        """Return when nothing uses the source any more."""

    async def _write(self, spool: Spool) -> None:
        """Bring the output into its file, until that is complete or can take no more."""
        output = self.output
        while output.is_spooling and not (output.is_complete and output.spooled == output.published):
            if output.spooled == output.published:
                if output.error is not None:
                    return
                await output.wait_changed()
                continue
            # A run with little memory would wait for its file instead of for its reader.
            await output.wait_batch(min(_WORTH_A_VISIT, self.state.window // 4), _LINGER)
            taken = output.take_unspooled(_WRITE)
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

    def _on_step_ended(self, step: "asyncio.Task[None]") -> None:
        """What broke a step that the run needs breaks the run, which would wait for it for ever."""
        error = None if step.cancelled() else step.exception()
        if error is not None:
            logger.error("run %d: %s", self.number, error, exc_info=error)
            self.fail(ServerError("internal error"))

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
        if self.state.phase != "running" and not self._ended.is_set():
            self._ended.set()
            self._worked_until = time.time()
        self._mark()

    def _count(self, counted: Counters) -> None:
        """Add to the run's counts and the version's."""
        self.counters.add(counted)
        self._counters.add(counted)

    def _mark(self) -> None:
        """Tell the clock what is so from now on; called whenever that may have changed."""
        state, output = self.state, self.output
        found = 0
        if state.phase == "running" and output.readers:
            if self.has_batch():
                found = clock.BUSY | clock.QUEUED
            else:
                if self.is_at_work:
                    found = clock.BUSY
                if self.is_starved:
                    found |= clock.STARVED
                elif output.is_spooling and state.outstanding >= state.window:
                    found |= clock.KEEPING
        fastest = output.fastest
        if output.readers and output.published > fastest:
            found |= clock.BEHIND
        if output.is_complete and fastest >= output.published:
            self.clock.stop(time.monotonic())
        else:
            self.clock.mark(time.monotonic(), found)

    def _on_progress(self) -> None:
        """Readers went on, or what they have not read is safe in the file: more may be framed."""
        output = self.output
        self.state.limit = output.fastest + self._spool_window if output.is_spooling else math.inf
        self._pool.kick()
        self._mark()
