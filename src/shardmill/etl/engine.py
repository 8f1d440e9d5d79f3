"""The transform engine of a node, assembled: versions, environments, workers, runs, failures."""

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from shardmill.config import EnvironmentSettings, TransformSettings
from shardmill.core.api import Code, FailureInfo, ProbeReport, TransformInfo, TransformRequest, TransformStatistics
from shardmill.core.errors import Busy, TransformFailed
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.core.specs import Spec
from shardmill.etl.environments import Environment, Environments
from shardmill.etl.failures import FailureLog
from shardmill.etl.probe import SAMPLES, probe
from shardmill.etl.run import Run, ShardReader
from shardmill.etl.run_state import RunState, SampleFailed
from shardmill.etl.staging import stage
from shardmill.etl.statistics import EngineStatistics, VersionCounters
from shardmill.etl.versions import Version, Versions, build_info
from shardmill.etl.workers import WorkerPool

logger = logging.getLogger(__name__)

_INDEX_THREADS = 4
_RETRY_SECONDS = 2


class Engine:
    """Use `Engine.open`; on exit no process of it is left."""

    def __init__(
        self,
        settings: TransformSettings,
        directory: Path,
        environments: Environments,
        pool: WorkerPool,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.settings = settings
        self.versions = Versions(directory / "versions")
        self.failures = FailureLog(directory / "failures")
        self.environments = environments
        self.pool = pool
        self._threads = threads
        self._counters: dict[str, VersionCounters] = {}
        self._runs: dict[int, Run] = {}
        self._finished = {"ended": 0, "failed": 0, "abandoned": 0}

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: TransformSettings, data: Path, environments: Sequence[EnvironmentSettings]
    ) -> AsyncIterator["Engine"]:
        """Assemble it below a node's data directory, which this process has locked."""
        scratch = data / "scratch"
        await asyncio.to_thread(_renew, scratch)
        staged = await asyncio.to_thread(stage, scratch / "stage")
        named = [(item.name, item.python) for item in environments]
        homes = scratch / "zygotes"
        homes.mkdir()
        known = Environments(named, stage=staged, scratch=homes, load_seconds=settings.load_timeout)
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="index") as threads:
            try:
                async with WorkerPool(settings, scratch) as pool:
                    engine = cls(settings, data / "transforms", known, pool, threads)
                    warming = asyncio.create_task(engine._warm_up())
                    try:
                        yield engine
                    finally:
                        warming.cancel()
                        await asyncio.wait([warming])
            finally:
                await known.close()
                await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    async def register(
        self,
        request: TransformRequest,
        *,
        probe_with: tuple[Source, str] | None,
        progress: Callable[[str], None],
    ) -> tuple[TransformInfo, bool]:
        """Choose an environment, load the function there once, try it if asked, keep it.

        Args:
            request: Checked.
            probe_with: A shard to try samples of, and its URL for the function.
            progress: Told what takes long.

        Returns:
            The version, and whether it is new.

        Raises:
            TransformFailed: No environment fits, the function cannot be loaded, or the probe fails.
        """
        code = request.code
        environment = await self.environments.choose(
            request.environment, python=code.python, modules=code.modules, progress=progress
        )
        await environment.zygote(code.modules, progress=progress)
        version = self._version(request, code, environment, None)
        try:
            failure = await self.pool.warm(version, environment)
        except (ConnectionError, TimeoutError) as error:
            raise TransformFailed(f"the function cannot be loaded: {error or 'it takes too long'}") from None
        if failure is not None:
            raise TransformFailed(failure.message, traceback=failure.traceback)
        if probe_with is not None:
            progress(f"trying {SAMPLES} samples of {probe_with[1]}")
            report = await self._probe(version, environment, *probe_with)
            version = self._version(request, code, environment, report)
        is_new = await self.versions.add(version)
        return self.versions.get(version.info.name, version.info.digest, _args(version)).info, is_new

    def environment_of(self, version: Version) -> Environment:
        """The environment that a version was registered with; EnvironmentUnfit if it is gone."""
        return self.environments[version.info.environment]

    @asynccontextmanager
    async def run(
        self, version: Version, source: Source, ref: ObjectRef, spec: Spec, *, seed: int, request_id: str
    ) -> AsyncIterator[Run]:
        """A run of one spec over one opened shard; it stops when the context is left.

        Raises:
            Busy: There are `max_runs` already.
        """
        if len(self._runs) >= self.settings.max_runs:
            raise Busy(f"{len(self._runs)} runs are going on (max_runs); try again", retry_after=_RETRY_SECONDS)

        def on_failure(failure: SampleFailed) -> None:
            self._record(version, ref, source, failure, seed=seed, request_id=request_id)

        state = RunState(
            policy=spec.errors, window=self._window(), lanes=self.pool.lanes, start=spec.start, count=spec.count
        )
        run = Run(
            version,
            self.environment_of(version),
            source,
            spec,
            seed=seed,
            url=str(ref),
            state=state,
            pool=self.pool,
            threads=self._threads,
            counters=self.counters(version),
            object_timeout=self.settings.object_timeout,
            on_failure=on_failure,
        )
        self._runs[run.number] = run
        outcome = "abandoned"
        try:
            async with run:
                try:
                    yield run
                finally:
                    phase = state.phase
                    outcome = phase if phase != "running" else "abandoned"
        finally:
            del self._runs[run.number]
            self._finished[outcome] += 1

    def counters(self, version: Version) -> VersionCounters:
        return self._counters.setdefault(version.label, VersionCounters())

    def statistics_of(self, version: Version) -> TransformStatistics:
        return self.counters(version).snapshot()

    def statistics(self) -> EngineStatistics:
        outcomes: dict[tuple[str, str], int] = {}
        for label, counters in self._counters.items():
            name = label.partition("@")[0]
            for outcome, count in (
                ("ok", counters.samples),
                ("failed", counters.failures),
                ("dropped", counters.dropped),
            ):
                outcomes[name, outcome] = outcomes.get((name, outcome), 0) + count
        return EngineStatistics(
            outcomes, {"running": len(self._runs), **self._finished}, self.pool.count_by_environment()
        )

    def draw_seed(self) -> int:
        """A seed for a run without one."""
        return secrets.randbits(63)

    def _window(self) -> int:
        """Bytes one more run may be ahead: its own window, or its share of the node's."""
        return min(self.settings.run_window, self.settings.node_window // (len(self._runs) + 1))

    def _version(
        self, request: TransformRequest, code: Code, environment: Environment, report: ProbeReport | None
    ) -> Version:
        return Version(build_info(request, environment.name, report), code, request.allow_pickle)

    async def _probe(self, version: Version, environment: Environment, source: Source, url: str) -> ProbeReport:
        reader = ShardReader(source, self._threads)
        try:
            samples = await reader.advance(SAMPLES)
            return await probe(version, environment, source, samples, url, self.pool)
        finally:
            await reader.close()

    def _record(
        self, version: Version, ref: ObjectRef, source: Source, failure: SampleFailed, *, seed: int, request_id: str
    ) -> None:
        sample = failure.sample
        self.failures.record(
            FailureInfo(
                time=time.time(),
                request=request_id,
                transform=version.label,
                bucket=str(ref.bucket),
                object=ref.key,
                version=source.meta.version,
                sample=sample.key if sample else None,
                ordinal=sample.ordinal if sample else None,
                message=failure.message,
                traceback=failure.traceback,
                seed=seed,
                output=failure.output,
            )
        )

    async def _warm_up(self) -> None:
        """Start every environment with what its newest versions import, so that first requests find it warm."""
        newest = {version.info.name: version for version in self.versions.list()}
        for environment in self.environments:
            modules = {
                name
                for version in newest.values()
                if version.info.environment == environment.name
                for name in version.info.modules
            }
            with contextlib.suppress(TransformFailed, TimeoutError):
                await environment.zygote(sorted(modules))


def _args(version: Version) -> str | None:
    return Spec.parse(version.info.uuid).args


def _renew(directory: Path) -> None:
    """An empty directory in place of what an earlier process left."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
