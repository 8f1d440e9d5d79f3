"""Tries a transform on one whole object before anyone depends on it: does it work, does it draw, is it reproducible?"""

import asyncio
import hashlib
import time

from shardmill.core.api import ProbeReport
from shardmill.core.errors import TransformFailed
from shardmill.core.sources import Source
from shardmill.etl.environments.environments import Environment
from shardmill.etl.probes.passes import SEED, Pass
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.runs.object_state import OBJECT
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Batch, Failed, Loss, Out, Result, StageSeconds, Whole
from shardmill.etl.workers.pool import WorkerPool

COMPARED = 64 << 20  # bytes of output; what comes behind them is neither waited for nor compared
_ROOM = 8 << 20  # bytes that the worker may be ahead


async def probe_object(
    version: Version, environment: Environment, source: Source, url: str, pool: WorkerPool, *, object_timeout: float
) -> ProbeReport:
    """Do the object twice with one seed, on fresh workers, and once with another seed.

    Raises:
        TransformFailed: It fails, with the user's traceback; or it takes too long, or the worker is lost.
    """
    environment_id = await environment.identify()
    await source.ensure(0, source.meta.size)
    passes: list[_ObjectPass] = []
    for seed in (SEED, SEED, SEED + 1):
        if len(passes) == 1:
            # Whatever stamps its output with the time, in seconds, must not look reproducible.
            await _wait_next_second()
        pool.retire(version.key)
        tried = _ObjectPass(version, environment, environment_id, source, url, seed, object_timeout)
        await tried.run(pool)
        passes.append(tried)
    pool.retire(version.key)
    reproducible = passes[0].digest == passes[1].digest
    return ProbeReport(
        samples=1,
        deterministic=reproducible and passes[0].digest == passes[2].digest and not any(each.moved for each in passes),
        reproducible=reproducible,
        seconds_per_sample=passes[1].seconds,
        bytes_in=passes[0].bytes_in,
        bytes_out=passes[0].bytes_out,
    )


async def _wait_next_second() -> None:
    await asyncio.sleep(1.0 - time.time() % 1.0)


class _ObjectPass(Pass):
    """The whole object."""

    whole: Whole

    def __init__(
        self,
        version: Version,
        environment: Environment,
        environment_id: str,
        source: Source,
        url: str,
        seed: int,
        object_timeout: float,
    ) -> None:
        super().__init__(version, environment, environment_id, source, url, seed, Batch(1, [OBJECT]))
        size = source.meta.size
        self.whole = Whole(size, lambda _: None, self._take, available=size, allowed=_ROOM)
        self.moved = False
        self.bytes_in = 0
        self.bytes_out = 0
        self._hash = hashlib.sha256()
        self._timeout = object_timeout
        self._worked = 0.0
        self._pool: WorkerPool | None = None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    async def run(self, pool: WorkerPool) -> None:
        self._pool = pool
        await self.finish(pool)

    def _take(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self.bytes_out < COMPARED:
                self._hash.update(piece.data[: COMPARED - self.bytes_out])
            self.bytes_out += piece.size
            piece.release()
        self.whole.allowed = self.bytes_out + _ROOM
        if self.bytes_out >= COMPARED:
            self.end(None)
        elif self._pool is not None:
            self._pool.kick()

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        super().on_results(batch, results, seconds)
        for _, result in results:
            if isinstance(result, Failed):
                wrote = f"\n{result.output}" if result.output else ""
                self.end(TransformFailed(result.message + wrote, traceback=result.traceback))
            elif isinstance(result, Out):
                self.bytes_in, self.moved = result.bytes_in, result.moved
                self.end(None)

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        if loss is None and self.bytes_out:
            # What was hashed cannot be taken back.
            loss = Loss("exited", "the worker process was stopped")
        super().on_lost(batch, loss)

    def on_tick(self, seconds: float, busy: bool) -> None:
        self._worked += seconds if busy else 0.0
        if self._worked > self._timeout:
            self.end(TransformFailed(f"the probe took longer than {self._timeout:g} s (object_timeout)"))
