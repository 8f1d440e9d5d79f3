"""Tries a function on a few samples before anyone depends on it: does it work, does it draw, is it reproducible?"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from shardmill.core.api import ProbeReport
from shardmill.core.errors import BadShard, TransformFailed
from shardmill.core.sources import Source
from shardmill.etl.environments.environments import Environment
from shardmill.etl.probes.passes import SEED, Pass
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Batch, Failed, Out, Result, StageSeconds
from shardmill.etl.workers.pool import WorkerPool
from shardmill.shards.grouping import Sample

SAMPLES = 4


@dataclass(frozen=True, slots=True)
class _Tried:
    """One sample's result in one pass."""

    digest: str
    moved: bool
    bytes_in: int
    bytes_out: int
    failure: Failed | None


async def probe_samples(
    version: Version, environment: Environment, source: Source, samples: Sequence[Sample], url: str, pool: WorkerPool
) -> ProbeReport:
    """Run the samples forwards, backwards, on a fresh worker and with another seed.

    Raises:
        TransformFailed: All of them fail, with the user's traceback; or the worker is lost.
    """
    if not samples:
        raise BadShard(f"{source.meta.key}: there is no sample to probe with")
    environment_id = await environment.identify()
    forwards = await _SamplePass(version, environment, environment_id, source, samples, url, SEED).run(pool)
    failures = [tried.failure for tried in forwards.values() if tried.failure is not None]
    if len(failures) == len(samples):
        raise TransformFailed(failures[0].message, traceback=failures[0].traceback)
    backwards_pass = _SamplePass(version, environment, environment_id, source, list(reversed(samples)), url, SEED)
    backwards = await backwards_pass.run(pool)
    pool.retire(version.key)
    fresh = await _SamplePass(version, environment, environment_id, source, samples, url, SEED).run(pool)
    reseeded = await _SamplePass(version, environment, environment_id, source, samples, url, SEED + 1).run(pool)
    # Workers of a probe compare generator states; runs get workers that do not.
    pool.retire(version.key)
    digests = [
        {ordinal: tried.digest for ordinal, tried in tries.items()} for tries in (forwards, backwards, fresh, reseeded)
    ]
    reproducible = digests[0] == digests[1] == digests[2]
    moved = any(tried.moved for tries in (forwards, backwards, fresh, reseeded) for tried in tries.values())
    return ProbeReport(
        samples=len(samples),
        deterministic=reproducible and digests[0] == digests[3] and not moved,
        reproducible=reproducible,
        seconds_per_sample=backwards_pass.seconds / len(samples),
        bytes_in=sum(tried.bytes_in for tried in forwards.values()),
        bytes_out=sum(tried.bytes_out for tried in forwards.values()),
    )


class _SamplePass(Pass):
    """Samples in one order."""

    def __init__(
        self,
        version: Version,
        environment: Environment,
        environment_id: str,
        source: Source,
        samples: Sequence[Sample],
        url: str,
        seed: int,
    ) -> None:
        super().__init__(version, environment, environment_id, source, url, seed, Batch(1, list(samples)))
        self._expected = len(samples)
        self._tried: dict[int, _Tried] = {}

    async def run(self, pool: WorkerPool) -> dict[int, _Tried]:
        await self.finish(pool)
        return self._tried

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        super().on_results(batch, results, seconds)
        for ordinal, result in results:
            self._tried[ordinal] = _try(result)
        if len(self._tried) == self._expected:
            self.end(None)


def _try(result: Result) -> _Tried:
    match result:
        case Out():
            digest = hashlib.sha256()
            for piece in result.pieces:
                digest.update(piece.data)
            size = sum(piece.size for piece in result.pieces)
            for piece in result.pieces:
                piece.release()
            return _Tried(digest.hexdigest(), result.moved, result.bytes_in, size, None)
        case Failed():
            return _Tried(f"failed: {result.message}", False, 0, 0, result)
        case _:
            return _Tried("dropped", result.moved, result.bytes_in, 0, None)
