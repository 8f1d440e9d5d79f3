"""The transform engine of a node, assembled: versions, environments, workers, runs, failures."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from shardmill.config import EnvironmentSettings, PackageSettings, TransformSettings
from shardmill.core.api import (
    FailureInfo,
    ProbeReport,
    RunInfo,
    TransformInfo,
    TransformRequest,
    TransformStatistics,
)
from shardmill.core.errors import BadRequest, TransformFailed
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.requirements import parse_requirements
from shardmill.core.sources import ResultFiles, Source
from shardmill.core.specs import Spec
from shardmill.etl.environments.environments import BuiltEnvironment, Environment, Environments
from shardmill.etl.environments.packages import Packages
from shardmill.etl.failures import FailureLog
from shardmill.etl.probes.object_probe import probe_object
from shardmill.etl.probes.sample_probe import SAMPLES, probe_samples
from shardmill.etl.processes.arenas import ARENA
from shardmill.etl.processes.executables import identify_command
from shardmill.etl.processes.staging import stage
from shardmill.etl.runs.object_run import ObjectRun
from shardmill.etl.runs.object_state import ObjectState
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.registry import Runs
from shardmill.etl.runs.run import Order, Run
from shardmill.etl.runs.run_state import Budget, RunState, SampleFailed
from shardmill.etl.runs.sample_run import SampleRun, ShardReader
from shardmill.etl.runs.statistics import Counters, EngineStatistics
from shardmill.etl.scratch import remove_tree
from shardmill.etl.versions.pipelines import part_uuids
from shardmill.etl.versions.registry import Version, Versions, arguments_hash, build_info, compute_digest
from shardmill.etl.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_INDEX_THREADS = 4
_PACKAGES = PackageSettings()
_COUNT_STEP = 1024  # samples indexed in one visit to a thread, where nobody waits for the first
_PLAIN = Spec("x")


class Engine:
    """Use `Engine.open`; on exit no process of it is left."""

    def __init__(
        self,
        settings: TransformSettings,
        directory: Path,
        environments: Environments,
        pool: WorkerPool,
        threads: ThreadPoolExecutor,
        *,
        results: ResultFiles | None,
        spool_window: int,
    ) -> None:
        self.settings = settings
        self.versions = Versions(directory / "versions")
        self.failures = FailureLog(directory / "failures")
        self.environments = environments
        environments.users = self._users
        environments.is_run_in = lambda name: pool.is_at_work(name) or self.runs.is_run_in(name)
        self.pool = pool
        self._threads = threads
        self.results = results
        self.runs = Runs(
            self._build_run,
            results,
            max_runs=settings.max_runs,
            link=self.failures.link,
            identify_command=self._identify_command,
        )
        self._spool_window = spool_window
        self._budget = Budget(settings.node_window)
        self._counters: dict[str, Counters] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: TransformSettings,
        data: Path,
        environments: Sequence[EnvironmentSettings],
        packages: PackageSettings = _PACKAGES,
        *,
        results: ResultFiles | None = None,
        spool_window: int = 64 << 20,
    ) -> AsyncIterator["Engine"]:
        """Assemble it below a node's data directory, which this process has locked.

        Args:
            settings: Bounds of workers and runs.
            data: The data directory.
            environments: Beside the default one.
            packages: Of environments that are built here.
            results: Where finished outputs are kept; None: they are streamed only.
            spool_window: Bytes that a spooled run may be ahead of its fastest reader.

        Raises:
            ConfigError: What was named as an interpreter is none.
        """
        scratch = data / "scratch"
        await asyncio.to_thread(_renew, scratch)
        staged = await asyncio.to_thread(stage, scratch / "stage")
        named = [(item.name, item.python) for item in environments]
        homes = scratch / "zygotes"
        homes.mkdir()
        built = await asyncio.to_thread(Packages, packages, data / "packages", stage=staged)
        known = Environments(named, built, stage=staged, scratch=homes, load_seconds=settings.load_timeout)
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="index") as threads:
            try:
                await known.check()
                async with WorkerPool(settings) as pool:
                    engine = cls(
                        settings,
                        data / "transforms",
                        known,
                        pool,
                        threads,
                        results=results,
                        spool_window=spool_window,
                    )
                    warming = asyncio.create_task(engine._warm_up())
                    try:
                        async with engine.runs:
                            yield engine
                    finally:
                        warming.cancel()
                        await asyncio.wait([warming])
            finally:
                await known.close()
                await asyncio.to_thread(remove_tree, scratch)

    async def register(
        self,
        request: TransformRequest,
        *,
        probe_with: tuple[Source, str] | None,
        progress: Callable[[str], None],
    ) -> tuple[TransformInfo, bool]:
        """Choose or build an environment, load the function there once, try it if asked, keep it.

        Args:
            request: Checked.
            probe_with: A shard to try samples of, or an object to try as a whole, and its URL for the function.
            progress: Told what takes long.

        Returns:
            The version, and whether it is new.

        Raises:
            BadRequest: Its packages are no requirements.
            AccessDenied, InsufficientStorage: They are not to be had here.
            TransformFailed: No environment fits, the function cannot be loaded, or the probe fails.
        """
        code = request.code
        digest = await asyncio.to_thread(compute_digest, request)
        requirements = parse_requirements(request.packages)
        if not requirements:
            environment = await self.environments.choose(
                request.environment, python=code.python, modules=code.modules, progress=progress
            )
            return await self._register_in(environment, request, digest, probe_with, progress)
        request = msgspec.structs.replace(request, packages=[str(requirement) for requirement in requirements])
        async with self.environments.build(
            requirements, request.environment, python=code.python, modules=code.modules, progress=progress
        ) as environment:
            return await self._register_in(environment, request, digest, probe_with, progress)

    async def _register_in(
        self,
        environment: Environment,
        request: TransformRequest,
        digest: str,
        probe_with: tuple[Source, str] | None,
        progress: Callable[[str], None],
    ) -> tuple[TransformInfo, bool]:
        code = request.code
        await environment.zygote(code.modules, progress=progress)
        version = self._version(request, digest, environment, None)
        try:
            failure = await self.pool.warm(version, environment)
        except (ConnectionError, TimeoutError) as error:
            raise TransformFailed(f"the function cannot be loaded: {error}") from None
        if failure is not None:
            raise TransformFailed(failure.message, traceback=failure.traceback)
        if probe_with is not None:
            what = f"{SAMPLES} samples of " if request.kind == "sample" else ""
            progress(f"trying {what}{probe_with[1]}")
            report = await self._probe(version, environment, *probe_with)
            version = self._version(request, digest, environment, report)
        is_new = await self.versions.add(version)
        return self.versions.get(version.info.name, version.info.digest, _args(version)).info, is_new

    def environment_of(self, version: Version) -> Environment:
        """The environment that a version was registered with; EnvironmentUnfit if it is gone."""
        return self.environments[version.info.environment]

    async def plan(self, version: Version, meta: ObjectMeta, ref: ObjectRef, spec: Spec) -> Plan:
        """What reading a spec over an object's version means: which seed, and whether others may share it.

        Args:
            version: The spec's.
            meta: Of the opened object.
            ref: Its name.
            spec: As asked for.

        Raises:
            EnvironmentUnfit, TransformFailed: The environment is gone, or does not start.
        """
        _check_options(version, spec)
        environment = self.environment_of(version)
        probe = version.info.probe
        is_deterministic = probe is not None and probe.deterministic
        resolved = replace(
            spec, name=version.info.name, digest=version.info.digest, args=arguments_hash(version.info.args), k=None
        )
        if is_deterministic:
            resolved = replace(resolved, seed=None, epoch=0)
        return Plan(
            version=version,
            environment=environment,
            environment_id=await environment.identify(),
            executable=await self._identify_command(version),
            ref=ref,
            spec=resolved,
            seed=spec.seed if spec.seed is not None else 0 if is_deterministic else self._draw_seed(),
            source_version=meta.version,
            is_repeatable=probe is None or probe.reproducible,
            is_shared=self.is_shared(version, spec),
            is_scratch=not is_deterministic and spec.epoch != 0,
        )

    def is_shared(self, version: Version, spec: Spec) -> bool:
        """Whether reading a spec gives the same bytes again, so that others may have them."""
        probe = version.info.probe
        if probe is not None and probe.deterministic:
            return True
        return spec.seed is not None and (probe is None or probe.reproducible)

    async def _identify_command(self, version: Version) -> str:
        """What tells the command of a version from others of its name; empty if it is none."""
        if version.info.kind != "command":
            return ""
        return await asyncio.to_thread(identify_command, version.code.payload, self.settings.commands)

    def _build_run(self, plan: Plan, source: Source, request_id: str) -> Run:
        def on_failure(failure: SampleFailed) -> None:
            self._record(plan, failure, request_id=request_id)

        spec = plan.spec
        order = Order(
            version=plan.version,
            environment=plan.environment,
            environment_id=plan.environment_id,
            source=source,
            spec=spec,
            seed=plan.seed,
            url=str(plan.ref),
            pool=self.pool,
            counters=self.counters(plan.version),
            object_timeout=self.settings.object_timeout,
            spool_window=self._spool_window,
            on_failure=on_failure,
        )
        if plan.version.info.kind != "sample":
            window = min(self._window(), ARENA // 2)
            limit = self.settings.max_object_output
            return ObjectRun(order, ObjectState(window=window, max_output=limit, budget=self._budget))
        state = RunState(
            policy=spec.errors,
            window=self._window(),
            lanes=self.pool.lanes,
            start=spec.start,
            count=spec.count,
            budget=self._budget,
        )
        return SampleRun(order, state, self._threads)

    async def count_samples(self, source: Source) -> int:
        """Samples of an opened shard, from its headers alone; raises BadShard."""
        reader, count = ShardReader(source, self._threads), 0
        try:
            while samples := await reader.advance(_COUNT_STEP):
                count += len(samples)
            return count
        finally:
            await reader.close()

    def counters(self, version: Version) -> Counters:
        """Totals of a version; the times are those of its runs that are over."""
        return self._counters.setdefault(version.label, Counters())

    def statistics_of(self, version: Version) -> TransformStatistics:
        return self._totals({version.label})

    def statistics(self) -> EngineStatistics:
        labels: dict[str, set[str]] = {}
        for label in self._counters:
            labels.setdefault(label.partition("@")[0], set()).add(label)
        return EngineStatistics(
            {name: self._totals(versions) for name, versions in labels.items()},
            {"running": self.runs.going_on, **self.runs.outcomes},
            self.pool.count_by_environment(),
            self.pool.at_work,
            self.results.statistics() if self.results is not None else None,
            dict(self.runs.reads),
        )

    def describe_runs(self) -> list[RunInfo]:
        """Runs that go on or are being read, the oldest first."""
        return [running.describe() for running in self.runs.live()]

    def _totals(self, labels: set[str]) -> TransformStatistics:
        """Of versions, with the times of runs that go on."""
        totals = Counters()
        for label in labels:
            totals.add(self._counters.get(label, Counters()))
        now = time.monotonic()
        for running in self.runs.live():
            if running.plan.version.label in labels:
                totals.times.add(running.run.clock.read(now))
        return totals.snapshot()

    def _draw_seed(self) -> int:
        """A seed for a run without one."""
        return secrets.randbits(63)

    def _window(self) -> int:
        """Bytes one more run may be ahead: its own window, or its share of the node's."""
        return min(self.settings.run_window, self.settings.node_window // (self.runs.going_on + 1))

    def _version(
        self, request: TransformRequest, digest: str, environment: Environment, report: ProbeReport | None
    ) -> Version:
        locked = (environment.info().packages or []) if request.packages else []
        parts = part_uuids(request.code)
        info = build_info(request, environment.name, report, digest=digest, parts=parts, locked=locked)
        return Version(info, request.code, request.allow_pickle)

    def _users(self, environment: str) -> list[str]:
        """The transforms that run in an environment."""
        return [version.label for version in self.versions.list() if version.info.environment == environment]

    async def _probe(self, version: Version, environment: Environment, source: Source, url: str) -> ProbeReport:
        if version.info.kind != "sample":
            timeout = self.settings.object_timeout
            return await probe_object(version, environment, source, url, self.pool, object_timeout=timeout)
        reader = ShardReader(source, self._threads)
        try:
            samples = await reader.advance(SAMPLES)
            return await probe_samples(version, environment, source, samples, url, self.pool)
        finally:
            await reader.close()

    def _record(self, plan: Plan, failure: SampleFailed, *, request_id: str) -> None:
        sample = failure.sample
        self.failures.record(
            FailureInfo(
                time=time.time(),
                request=request_id,
                transform=plan.version.label,
                bucket=str(plan.ref.bucket),
                object=plan.ref.key,
                version=plan.source_version,
                sample=sample.key if sample else None,
                ordinal=sample.ordinal if sample else None,
                message=failure.message,
                traceback=failure.traceback,
                seed=plan.seed,
                output=failure.output,
                ended_run=failure.ended_run,
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
            if isinstance(environment, BuiltEnvironment) and not self._users(environment.name):
                # Nobody asks for it.
                continue
            with contextlib.suppress(TransformFailed, TimeoutError):
                await environment.zygote(sorted(modules))


def _check_options(version: Version, spec: Spec) -> None:
    """Refuse options about samples where there are none."""
    kind = version.info.kind
    if kind == "sample":
        return
    for name in ("start", "count", "errors"):
        if getattr(spec, name) != getattr(_PLAIN, name):
            raise BadRequest(f"transform {spec.name!r} is of kind {kind!r} and has no samples; leave out {name}")


def _args(version: Version) -> str | None:
    return Spec.parse(version.info.uuid).args


def _renew(directory: Path) -> None:
    """An empty directory in place of what an earlier process left."""
    remove_tree(directory)
    directory.mkdir(parents=True, mode=0o700)
