"""Finished results kept open by the name that was asked for, so that reading one again costs no call to find it.

A name stands for a result as long as nothing has changed that decides it: the object, the version and its environment.
All of that is looked at again for each reader; what takes more than a look is found by `Transforms`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from shardmill.core.kept import KeepResult, Kept
from shardmill.core.paths import TransformedRef
from shardmill.etl.engine import Engine
from shardmill.node.access import Principal
from shardmill.node.ahead import LookAhead
from shardmill.node.objects import Objects
from shardmill.node.transforms import TransformedHead, describe_plan
from shardmill.storage.kept import Shelf, most_kept


@dataclass(frozen=True, slots=True)
class OpenResult:
    """A finished result, kept open."""

    kept: Kept
    head: TransformedHead


class FinishedResults:
    """What is kept open of results, with access checked.

    Args:
        files: Where results are; None: they are not kept.
    """

    def __init__(self, engine: Engine, objects: Objects, ahead: LookAhead, files: KeepResult | None) -> None:
        self._engine = engine
        self._objects = objects
        self._ahead = ahead
        self._files = files
        self._shelf = Shelf(most_kept() // 4)
        self._open: dict[TransformedRef, OpenResult] = {}

    @property
    def is_keeping(self) -> bool:
        """False: there are no results."""
        return self._files is not None

    def get(self, principal: Principal, name: TransformedRef) -> OpenResult | None:
        """What is kept open under a name with a version; None: nothing, so it has to be opened."""
        self._objects.check(principal, "read", name.ref.bucket)
        found = self._open.get(name)
        if found is not None and not found.kept.is_current:
            self._drop(name, found)
            return None
        return found

    async def open(self, principal: Principal, name: TransformedRef) -> OpenResult | None:
        """Open the finished result of a name with a version to be kept; starts nothing.

        Returns:
            None: There is none, or it takes more than a look to know it.

        Raises:
            ShardmillError: The name stands for nothing.
        """
        engine, objects, ref, spec = self._engine, self._objects, name.ref, name.spec
        objects.check(principal, "read", ref.bucket)
        changes = engine.versions.changes
        version = engine.versions.get(spec.name, spec.digest, spec.args)
        # What a command is may change with any file that its name is looked for under.
        if self._files is None or version.info.kind == "command" or not engine.is_shared(version, spec):
            return None
        environment = engine.environment_of(version)
        if environment.recent_id is None and await environment.look() is None:
            return None
        shard = objects.kept(principal, ref)
        if shard is None or not _is_there(shard):
            shard = await objects.keep(principal, ref)
        if shard is None or shard.source is None or not _is_there(shard):
            return None
        plan = await engine.plan(version, shard.source.meta, ref, spec)
        kept = await self._files.keep_open(plan.key)
        if kept is None:
            return None
        made_in = plan.environment_id

        def is_there() -> bool:
            return changes == engine.versions.changes and made_in == environment.recent_id and _is_there(shard)

        kept.is_there = is_there
        known = self.get(principal, name)
        if known is not None or not is_there():
            kept.leave()
            return known
        found = self._open[name] = OpenResult(kept, describe_plan(plan, spec, run=None))
        self._shelf.put(kept, lambda: self._drop(name, found))
        return found

    def reading(
        self, principal: Principal, name: TransformedRef, key: str, request_id: str
    ) -> AbstractContextManager[None]:
        """Around the reading of the result with that key, which was kept open under a name."""
        self._engine.runs.count_hit(key, request_id)
        self._objects.is_read(principal, name.ref)
        return self._ahead.reading(principal, name, is_made=True)

    def close_unused(self) -> None:
        """Close what is kept open and was not asked for since the last call."""
        self._shelf.sweep()

    def _drop(self, name: TransformedRef, found: OpenResult) -> None:
        if self._open.get(name) is found:
            del self._open[name]
        self._shelf.take(found.kept)
        found.kept.leave()


def _is_there(kept: Kept) -> bool:
    """Whether what is kept of an object is still what an opening would find; it is kept open while that is asked."""
    if kept.is_current and kept.is_there is not None and not kept.is_there():
        kept.leave()
    kept.is_used = True
    return kept.is_current
