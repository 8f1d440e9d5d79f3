"""What a node does with a request for a transform or a transformed object."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from shardmill.core.api import EnvironmentInfo, Failures, TransformDetails, TransformInfo, TransformRequest
from shardmill.core.errors import BadRequest
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import SPEC_DIGITS, Spec, check_name
from shardmill.etl.engine import Engine
from shardmill.etl.run import Run
from shardmill.etl.statistics import EngineStatistics
from shardmill.etl.versions import Version, check_request
from shardmill.node.access import Access, Principal
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
    bare: bool
    """The request named no version."""


class TransformedObject:
    """A run with its reader: `start`, then iterate."""

    def __init__(self, head: TransformedHead, run: Run) -> None:
        self.head = head
        self._run = run

    async def start(self) -> None:
        """Return when the first bytes may be sent; raises what failed before."""
        await self._run.start()

    def __aiter__(self) -> AsyncIterator[memoryview | bytes]:
        """Chunks, each valid until the next is asked for; raises when the run fails midway."""
        return self._run.__aiter__()


class Transforms:
    """Transforms of a node, with access checked."""

    def __init__(self, engine: Engine, objects: Objects, access: Access) -> None:
        self._engine = engine
        self._objects = objects
        self._access = access

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
        check_request(request, self._engine.settings.max_code)
        if request.probe is None:
            return await self._engine.register(request, probe_with=None, progress=progress)
        ref = ObjectRef.parse(request.probe)
        source = await self._objects.open(principal, ref)
        try:
            return await self._engine.register(request, probe_with=(source, str(ref)), progress=progress)
        finally:
            source.close()

    def list(self, principal: Principal) -> list[TransformInfo]:
        self._access.check(principal, "read", None)
        return [version.info for version in self._engine.versions.list()]

    def get(self, principal: Principal, name: str, digest: str | None) -> TransformDetails:
        self._access.check(principal, "read", None)
        version = self._find(name, digest)
        return TransformDetails(version.info, self._engine.statistics_of(version))

    async def remove(self, principal: Principal, name: str, digest: str | None) -> None:
        self._access.check(principal, "run", None)
        labels = {version.label for version in self._engine.versions.list() if version.info.name == name}
        await self._engine.versions.remove(name, digest)
        for label in labels - {version.label for version in self._engine.versions.list()}:
            self._engine.failures.forget(label)

    def failures(
        self, principal: Principal, *, transform: str | None, bucket: str | None, key: str | None, request: str | None
    ) -> Failures:
        self._access.check(principal, "read", None)
        return self._engine.failures.find(transform=transform, bucket=bucket, key=key, request=request)

    async def head(self, principal: Principal, ref: ObjectRef, spec: Spec) -> TransformedHead:
        """Check that version and object exist; starts no run."""
        version = self._resolve(spec)
        await self._objects.head(principal, ref)
        self._engine.environment_of(version)
        return self._head(version, spec, seed=spec.seed, run=None)

    @asynccontextmanager
    async def open(
        self, principal: Principal, ref: ObjectRef, spec: Spec, *, request_id: str
    ) -> AsyncIterator[TransformedObject]:
        """Run a spec over an object for one reader; leaving the context stops it.

        Raises:
            TransformNotFound, ObjectNotFound, BucketNotFound: Something named does not exist.
            Busy: Too many runs.
        """
        version = self._resolve(spec)
        source = await self._objects.open(principal, ref)
        try:
            seed = spec.seed if spec.seed is not None else self._engine.draw_seed()
            async with self._engine.run(version, source, ref, spec, seed=seed, request_id=request_id) as run:
                yield TransformedObject(self._head(version, spec, seed=seed, run=f"run-{run.number}"), run)
        finally:
            source.close()

    def environments(self) -> Sequence[EnvironmentInfo]:
        return [environment.info() for environment in self._engine.environments]

    def isolation(self) -> dict[str, bool]:
        """Layers around user code → active, as the newest worker found them; all False before the first one.

        Landlock and a full seccomp filter are not used yet.
        """
        layers = self._engine.pool.layers
        watchdog = {"memory_watchdog": True}
        return {**dict.fromkeys(LAYERS, False), **layers, **watchdog, "landlock": False, "system_call_filter": False}

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

    def _resolve(self, spec: Spec) -> Version:
        if spec.digest is None and spec.args is not None:
            raise BadRequest(f"transform {str(spec)!r}: args without a version")
        return self._engine.versions.get(spec.name, spec.digest, spec.args)

    def _find(self, name: str, digest: str | None) -> Version:
        if digest is None:
            return self._engine.versions.get(name)
        matching = [
            version
            for version in self._engine.versions.list()
            if version.info.digest.startswith(digest) and version.info.name == name
        ]
        args = Spec.parse(matching[-1].info.uuid).args if matching else None
        return self._engine.versions.get(name, digest, args)

    def _head(self, version: Version, spec: Spec, *, seed: int | None, run: str | None) -> TransformedHead:
        args = Spec.parse(version.info.uuid).args
        resolved = replace(spec, digest=version.info.digest[:SPEC_DIGITS], args=args)
        return TransformedHead(resolved, seed, run, bare=spec.digest is None)
