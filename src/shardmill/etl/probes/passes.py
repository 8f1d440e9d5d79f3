"""One pass of a probe: one batch of work on one object with one seed."""

import asyncio
import itertools

from shardmill.core.errors import ShardmillError, TransformFailed
from shardmill.core.sources import Source
from shardmill.etl.environments.environments import Environment
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Batch, Failed, Loss, Result, StageSeconds, Whole
from shardmill.etl.workers.pool import WorkerPool

SEED = 1  # of all passes but one

_numbers = itertools.count(-1, -1)  # apart from the numbers of runs


class Pass:
    """Work on one object with one seed, for a probe: one batch, given to one worker."""

    probing = True
    is_ahead = False
    whole: Whole | None = None
    epoch = 0

    def __init__(
        self,
        version: Version,
        environment: Environment,
        environment_id: str,
        source: Source,
        url: str,
        seed: int,
        batch: Batch,
    ) -> None:
        self.number = next(_numbers)
        self.version = version
        self.environment = environment
        self.environment_id = environment_id
        self.seed = seed
        self.source_key = source.meta.key
        self.source_url = url
        self.source_descriptor = source.descriptor
        self.seconds = 0.0
        self._batch: Batch | None = batch
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def finish(self, pool: WorkerPool) -> None:
        """Have it done; raises TransformFailed when that is not possible."""
        pool.attach(self)
        try:
            await self._done
        finally:
            pool.detach(self)

    def has_batch(self, *, queued: bool = False) -> bool:
        return self._batch is not None

    def next_batch(self) -> Batch | None:
        batch, self._batch = self._batch, None
        return batch

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        self.seconds += seconds.read + seconds.decode + seconds.user + seconds.encode

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        if loss is None:
            self._batch = batch
        else:
            printed = f"\nIt printed last:\n{loss.output}" if loss.output else ""
            self.end(TransformFailed(f"the probe failed: {loss.message}{printed}"))

    def on_load_failed(self, failure: Failed) -> None:
        self.end(TransformFailed(failure.message, traceback=failure.traceback))

    def on_no_worker(self, error: Exception) -> None:
        message = f"no worker could be started: {error}"
        self.end(error if isinstance(error, ShardmillError) else TransformFailed(message))

    def on_tick(self, seconds: float, busy: bool) -> None:
        """A probe of samples is bounded by their deadlines."""

    def end(self, error: Exception | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)
