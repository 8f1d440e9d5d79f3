"""The run of a function or a command over a whole object: one worker reads it and gives output as readers allow."""

import asyncio

from shardmill.core.errors import ShardmillError
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.runs.object_state import ObjectState
from shardmill.etl.runs.run import Order, Run
from shardmill.etl.runs.statistics import Counters
from shardmill.etl.workers.batches import Batch, Failed, Loss, Out, Result, StageSeconds, Whole
from shardmill.etl.workers.pool import WorkerPool

AHEAD = 8 << 20  # bytes of the object made sure of beyond what the worker asked for


class ObjectRun(Run):
    """One spec over one whole object.

    Args:
        order: What is to be done.
        state: Fresh.
    """

    state: ObjectState
    whole: Whole

    def __init__(self, order: Order, state: ObjectState) -> None:
        super().__init__(order, state)
        self.whole = Whole(order.source.meta.size, self._want, self._take)
        self._wanted = 0
        self._more_wanted = asyncio.Event()

    @property
    def fraction_done(self) -> float:
        """Not known: what was read says nothing about what is still to be done."""
        return 0.0

    @property
    def is_at_work(self) -> bool:
        # A worker that waits for bytes, or for readers, does nothing else.
        return self.state.is_in_work and not self.is_starved and self.state.allowed > self.state.framed

    @property
    def is_starved(self) -> bool:
        return self._wanted > self.whole.available

    def lanes_of(self, pool: WorkerPool) -> int:
        return 1

    def has_batch(self, *, queued: bool = False) -> bool:
        return self.state.has_batch()

    def next_batch(self) -> Batch | None:
        batch = self.state.next_batch()
        self.whole.allowed = self.state.allowed
        self._mark()
        return batch

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        counters = Counters()
        for _, result in results:
            match result:
                case Out():
                    counters.samples += 1
                    counters.bytes_in += result.bytes_in
                    counters.bytes_out += self.state.framed
                    self.state.finish()
                case Failed():
                    counters.failures += 1
                    self.state.add_failure(result)
        counters.add_seconds(seconds)
        self._count(counters)
        self._settle()

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        self.state.lose(batch, loss)
        self._settle()

    def _want(self, stop: int) -> None:
        self._wanted = max(self._wanted, stop)
        self._more_wanted.set()
        self._mark()

    def _take(self, pieces: list[Piece]) -> None:
        self.state.add_pieces(pieces)
        self._settle()
        self._on_progress()

    # Its own steps.

    async def _feed(self) -> None:
        """Bring in what the worker wants to read."""
        whole, source = self.whole, self._source
        try:
            while whole.available < whole.size:
                while self._wanted <= whole.available:
                    self._more_wanted.clear()
                    await self._more_wanted.wait()
                stop = min(whole.size, max(self._wanted, whole.available + AHEAD))
                whole.available = await source.ensure_some(whole.available, stop)
                self._pool.kick()
                self._mark()
        except ShardmillError as error:
            self.fail(error)

    async def _end_feeding(self) -> None:
        """Nothing here uses the source from a thread."""

    def _on_progress(self) -> None:
        super()._on_progress()
        self.whole.allowed = max(self.whole.allowed, self.state.allowed)
