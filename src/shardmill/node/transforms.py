"""What a node does with a request for a transform or a transformed object."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from shardmill.core.api import (
    EnvironmentInfo,
    Failures,
    Kind,
    PipelineRequest,
    Runs,
    TransformDetails,
    TransformInfo,
    TransformRequest,
)
from shardmill.core.errors import BadRequest
from shardmill.core.paths import TransformedRef
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.core.specs import SPEC_DIGITS, Spec, check_name
from shardmill.etl.engine import Engine
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.running import Finished, Reading, RunCounts
from shardmill.etl.runs.statistics import EngineStatistics
from shardmill.etl.versions.pipelines import build_pipeline
from shardmill.etl.versions.registry import Version, check_request
from shardmill.node.access import Access, Principal
from shardmill.node.ahead import LookAhead
from shardmill.node.objects import Objects
from shardmill.worker.limits import LAYERS


@dataclass(frozen=True, slots=True)
class TransformedHead:
    """What can be said of a transformed object without running anything."""

    spec: Spec
    """Resolved: with a version of 12 digits."""
    seed: int | None
    """The spec's seed, or the one drawn for a run."""
    run: str | None
    is_bare: bool
    """The request named no version."""
    origin: str | None
    """Names the code, the object's version and the environment that the bytes come from; see `Plan`."""
    is_shard: bool
    """It is made of samples; otherwise a transform of whole objects says what it is."""
    is_stable: bool
    """The same URL gives the same bytes again, as long as object and environment stay."""
    key: str
    """64 hex digits over what decides the bytes, but for a seed that was drawn."""
    version: str
    """Source version of the object."""


@dataclass(frozen=True, slots=True)
class TransformedStream:
    """A run and this reader's place at it."""

    head: TransformedHead
    reading: Reading

    @property
    def done(self) -> float:
        """How much of the work is done, 0 to 1."""
        return self.reading.done

    @property
    def counts(self) -> RunCounts | None:
        return self.reading.counts


@dataclass(frozen=True, slots=True)
class TransformedFile:
    """A finished result: an object like any other."""

    head: TransformedHead
    source: Source

    @property
    def done(self) -> float:
        return 1.0

    @property
    def counts(self) -> RunCounts | None:
        """None: it was kept by a node that did not count."""
        return RunCounts.of(self.source.meta.user)


Transformed = TransformedStream | TransformedFile


class Transforms:
    """Transforms of a node, with access checked."""

    def __init__(self, engine: Engine, objects: Objects, access: Access, ahead: LookAhead) -> None:
        self._engine = engine
        self._objects = objects
        self._access = access
        self._ahead = ahead

    async def register(
        self, principal: Principal, request: TransformRequest, *, progress: Callable[[str], None]
    ) -> tuple[TransformInfo, bool]:
        """Register a version; True: it is new.

        Raises:
            BadRequest: A field is wrong.
            TransformFailed: No environment fits, the code cannot be loaded, or its probe fails.
        """
        self._access.check(principal, "run", None)
        check_name(request.name)
        return await self._register(principal, check_request(request, self._engine.settings.max_code), progress)

    async def register_pipeline(
        self, principal: Principal, request: PipelineRequest, *, progress: Callable[[str], None]
    ) -> tuple[TransformInfo, bool]:
        """Register what registered versions give one after the other; True: it is new.

        Raises:
            BadRequest: They cannot follow one another.
            TransformNotFound: One of them is not registered.
            TransformFailed: The probe fails.
        """
        self._access.check(principal, "run", None)
        check_name(request.name)
        specs = [Spec.parse(part) for part in request.parts]
        bare = next((spec.name for spec in specs if spec.digest is None), None)
        if bare is not None:
            raise BadRequest(f"the part {bare!r} names no version; use the uuid that registration returned")
        versions = [self._resolve(spec) for spec in specs]
        return await self._register(principal, build_pipeline(request.name, versions, request.probe), progress)

    async def _register(
        self, principal: Principal, request: TransformRequest, progress: Callable[[str], None]
    ) -> tuple[TransformInfo, bool]:
        if request.probe is None:
            return await self._engine.register(request, probe_with=None, progress=progress)
        ref = ObjectRef.parse(request.probe)
        source = await self._objects.open(principal, ref)
        try:
            return await self._engine.register(request, probe_with=(source, str(ref)), progress=progress)
        finally:
            source.close()

    def resolve(self, principal: Principal, spec: Spec) -> Spec:
        """A spec with its version of 12 digits and its arguments; a bare name is its newest version.

        Raises:
            TransformNotFound: It is not registered.
        """
        self._access.check(principal, "read", None)
        version = Spec.parse(self._resolve(spec).info.uuid)
        return replace(spec, digest=version.digest, args=version.args, k=None)

    def kind(self, principal: Principal, spec: Spec) -> Kind:
        """What a registered version works on."""
        self._access.check(principal, "read", None)
        return self._resolve(spec).info.kind

    def list(self, principal: Principal) -> list[TransformInfo]:
        self._access.check(principal, "read", None)
        return [version.info for version in self._engine.versions.list()]

    def get(self, principal: Principal, name: str, digest: str | None, args: str | None) -> TransformDetails:
        self._access.check(principal, "read", None)
        version = self._engine.versions.find(name, digest, args)
        return TransformDetails(version.info, self._engine.statistics_of(version))

    async def remove(self, principal: Principal, name: str, digest: str | None, args: str | None) -> None:
        self._access.check(principal, "run", None)
        labels = {version.label for version in self._engine.versions.list() if version.info.name == name}
        await self._engine.versions.remove(name, digest, args)
        for label in labels - {version.label for version in self._engine.versions.list()}:
            self._engine.failures.forget(label)

    def failures(
        self, principal: Principal, *, transform: str | None, bucket: str | None, key: str | None, request: str | None
    ) -> Failures:
        self._access.check(principal, "read", None)
        return self._engine.failures.find(transform=transform, bucket=bucket, key=key, request=request)

    async def announce(self, principal: Principal, names: Sequence[TransformedRef]) -> None:
        """Transformed objects that will be read in this order, so that the next may be begun while one is read."""
        for bucket in {name.ref.bucket for name in names}:
            self._access.check(principal, "read", bucket)
        await self._ahead.announce(names)

    @asynccontextmanager
    async def head(
        self, principal: Principal, ref: ObjectRef, spec: Spec
    ) -> AsyncIterator[TransformedHead | TransformedFile]:
        """What is known without running anything: the finished result, or that version and object exist."""
        version = self._resolve(spec)
        meta = await self._objects.head(principal, ref)
        plan = await self._engine.plan(version, meta, ref, spec)
        finished = await self._engine.runs.open_finished(plan)
        head = describe_plan(plan, spec, run=None)
        if finished is None:
            yield head
            return
        try:
            yield TransformedFile(head, finished.source)
        finally:
            finished.source.close()

    @asynccontextmanager
    async def open(
        self,
        principal: Principal,
        ref: ObjectRef,
        spec: Spec,
        *,
        request_id: str,
        wants_finished: bool,
        is_patient: bool = False,
    ) -> AsyncIterator[Transformed]:
        """A spec over an object for one reader: the finished result, or a run; leaving the context leaves it.

        Args:
            principal: Who asks.
            ref: The object.
            spec: Over it.
            request_id: Names the reader in records.
            wants_finished: Wait for the finished result, where there will be one.
            is_patient: Give way to all who are not; what is made for this reader alone is scratch.

        Raises:
            TransformNotFound, ObjectNotFound, BucketNotFound: Something named does not exist.
            Busy: Too many runs, or the result is not finished in time.
        """
        version = self._resolve(spec)
        source = await self._objects.open(principal, ref)
        try:
            plan = await self._engine.plan(version, source.meta, ref, spec)
        except BaseException:
            source.close()
            raise
        runs = self._engine.runs
        opened: Reading | Finished
        with ExitStack() as held:
            if not is_patient:
                name = TransformedRef(ref, spec)
                held.enter_context(self._ahead.reading(principal, name, is_made=runs.is_made(plan)))
                self._objects.is_read(principal, ref)
            if wants_finished and plan.is_shared and runs.can_finish:
                opened = await runs.wait_finished(plan, source, request_id=request_id)
            else:
                opened = await runs.open(plan, source, request_id=request_id, is_patient=is_patient)
            if isinstance(opened, Finished):
                held.callback(opened.source.close)
                yield TransformedFile(describe_plan(plan, spec, run=None), opened.source)
            else:
                held.callback(opened.close)
                head = describe_plan(plan, spec, run=f"run-{opened.number}", seed=opened.seed)
                yield TransformedStream(head, opened)

    def environments(self) -> Sequence[EnvironmentInfo]:
        return self._engine.environments.infos()

    async def remove_environment(self, principal: Principal, name: str, *, force: bool) -> None:
        """Remove an environment that the node has built.

        Args:
            principal: Who asks.
            name: Its name.
            force: Also when transforms run in it.
        """
        self._access.check(principal, "run", None)
        await self._engine.environments.remove(name, force=force)

    def isolation(self) -> dict[str, bool]:
        """Layers around user code → active, as the newest worker found them.

        Confinement to a part of the file system and a full filter of system calls are not there yet.
        """
        layers = dict.fromkeys(LAYERS, False) | self._engine.pool.layers
        return {**layers, "memory_watchdog": True, "file_system_scope": False, "system_call_filter": False}

    def runs(self, principal: Principal) -> Runs:
        """Runs that go on or are being read, and the workers."""
        self._access.check(principal, "read", None)
        pool = self._engine.pool
        return Runs(
            time.time(),
            self._engine.describe_runs(),
            pool.lanes,
            pool.at_work,
            pool.count_by_environment(),
            self._engine.statistics().transforms,
        )

    @property
    def lanes(self) -> int:
        """Workers that may be at work at once."""
        return self._engine.pool.lanes

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

    def _resolve(self, spec: Spec) -> Version:
        if spec.digest is None and spec.args is not None:
            raise BadRequest(f"transform {str(spec)!r}: args without a version")
        return self._engine.versions.get(spec.name, spec.digest, spec.args)


def describe_plan(plan: Plan, spec: Spec, *, run: str | None, seed: int | None = None) -> TransformedHead:
    """What can be said of a plan for a spec as it was asked for; `run` None: nothing runs."""
    resolved = replace(spec, digest=plan.version.info.digest[:SPEC_DIGITS], args=plan.spec.args)
    has_seed = spec.seed is not None or (run is not None and not plan.is_shared)
    return TransformedHead(
        resolved,
        (plan.seed if seed is None else seed) if has_seed else None,
        run,
        is_bare=spec.digest is None,
        is_shard=plan.version.info.kind == "sample",
        origin=plan.origin,
        is_stable=plan.is_shared,
        key=plan.key,
        version=plan.source_version,
    )
