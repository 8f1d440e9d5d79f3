"""What a node knows of shards without transforming them: how many samples there are."""

from collections import OrderedDict
from collections.abc import Sequence

from shardmill.core.refs import ObjectRef
from shardmill.etl.engine import Engine
from shardmill.node.access import Principal
from shardmill.node.objects import Objects

_KEPT = 100_000  # counts remembered


class Shards:
    """Counts of samples, remembered by version."""

    def __init__(self, engine: Engine, objects: Objects) -> None:
        self._engine = engine
        self._objects = objects
        self._counts: OrderedDict[tuple[ObjectRef, str], int] = OrderedDict()

    async def count(self, principal: Principal, refs: Sequence[ObjectRef]) -> list[int]:
        """Source samples of each shard.

        Raises:
            ObjectNotFound, BucketNotFound: One of them does not exist.
            BadShard: One of them is not a good tar.
        """
        return [await self._count_one(principal, ref) for ref in refs]

    async def _count_one(self, principal: Principal, ref: ObjectRef) -> int:
        source = await self._objects.open(principal, ref)
        try:
            key = (ref, source.meta.version)
            known = self._counts.get(key)
            if known is None:
                known = self._counts[key] = await self._engine.count_samples(source)
                while len(self._counts) > _KEPT:
                    self._counts.popitem(last=False)
            return known
        finally:
            source.close()
