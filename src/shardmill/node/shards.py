"""What a node knows of shards without transforming them: their samples' number, their members, and where each lies."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from shardmill.core.errors import MemberNotFound, ObjectChanged, ObjectNotFound
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.etl.engine import Engine
from shardmill.node.access import Principal
from shardmill.node.objects import Objects
from shardmill.shards.members import Extent, MemberIndex
from shardmill.storage.members import MemberIndexes

_KEPT = 100_000  # counts remembered
_TRIES = 3  # openings of a shard that is replaced again and again


@dataclass(frozen=True, slots=True)
class OpenedMember:
    """One member of an opened shard. Resources: whoever got it closes the source."""

    source: Source
    """The shard."""
    start: int
    """Where the member's bytes begin in it."""
    meta: ObjectMeta
    """Of the member: its size, an ETag of its own, the shard's time."""


@dataclass(frozen=True, slots=True)
class MembersPage:
    """Some members of one version of a shard, in its order."""

    members: Sequence[Extent]
    total: int
    """Members of the whole shard."""
    meta: ObjectMeta
    """Of the shard."""


class Shards:
    """Counts of samples, remembered by version, and members, found by an index."""

    def __init__(self, engine: Engine, objects: Objects, indexes: MemberIndexes) -> None:
        self._engine = engine
        self._objects = objects
        self._indexes = indexes
        self._counts: OrderedDict[tuple[ObjectRef, str], int] = OrderedDict()

    async def count(self, principal: Principal, refs: Sequence[ObjectRef]) -> list[int]:
        """Source samples of each shard.

        Raises:
            ObjectNotFound, BucketNotFound: One of them does not exist.
            BadShard: One of them is not a good tar.
        """
        return [await self._count_one(principal, ref) for ref in refs]

    async def open_member(self, principal: Principal, ref: ObjectRef, name: str) -> OpenedMember:
        """Open a shard for one of its members, the last of that name; the caller closes its source.

        Raises:
            ObjectNotFound, BucketNotFound, MemberNotFound: There is none.
            BadShard: It is not a good tar.
            Conflict: It changes faster than it can be read.
        """
        source, index = await self._open(principal, ref)
        try:
            found = _find(ref, index, name)
            return OpenedMember(source, found.offset, _member_meta(source.meta, found))
        except BaseException:
            source.close()
            raise

    async def open_members(
        self, principal: Principal, ref: ObjectRef, names: Sequence[str], *, skips_missing: bool
    ) -> tuple[Source, dict[str, Extent]]:
        """Open a shard for several of its members, found by their names; the caller closes it.

        Raises as `open_member`, but with `skips_missing` leaves out members that there are not.
        """
        source, index = await self._open(principal, ref)
        try:
            if not skips_missing:
                return source, {name: _find(ref, index, name) for name in names}
            found = {name: index.find(_bytes_of(name)) for name in names}
            return source, {name: extent for name, extent in found.items() if extent is not None}
        except BaseException:
            source.close()
            raise

    def member_of(self, ref: ObjectRef, shard: ObjectMeta, name: str) -> tuple[int, ObjectMeta] | None:
        """Where a member of an opened version begins, and what is known of it; None: no index of it is in memory.

        Raises:
            MemberNotFound: There is none of that name.
        """
        index = self._indexes.known(ref, shard.version)
        if index is None:
            return None
        found = _find(ref, index, name)
        return found.offset, _member_meta(shard, found)

    async def members(self, principal: Principal, ref: ObjectRef, *, after: int, limit: int) -> MembersPage:
        """Members in the shard's order, from the place `after` on; raises as `open_member`."""
        source, index = await self._open(principal, ref)
        try:
            return MembersPage(index.page(after, after + limit), len(index), source.meta)
        finally:
            source.close()

    async def _open(self, principal: Principal, ref: ObjectRef) -> tuple[Source, MemberIndex]:
        """A shard with the index of the version that was opened."""
        for tries_left in reversed(range(_TRIES)):
            try:
                source = await self._objects.open(principal, ref)
            except ObjectNotFound:
                await self._indexes.forget(ref)
                raise
            try:
                version = source.meta.version
                index = self._indexes.known(ref, version)
                if index is None:
                    index = await self._indexes.get(ref, version, partial(self._objects.open, principal, ref))
                return source, index
            except ObjectChanged:
                source.close()
                if not tries_left:
                    raise
            except BaseException:
                source.close()
                raise
        raise AssertionError("the last try returns or raises")

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


def _find(ref: ObjectRef, index: MemberIndex, name: str) -> Extent:
    found = index.find(_bytes_of(name))
    if found is None:
        raise MemberNotFound(f"{ref} has no member {name!r}; GET /api/members?object={ref} lists its {len(index)}")
    return found


def _bytes_of(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _member_meta(shard: ObjectMeta, member: Extent) -> ObjectMeta:
    """A member's own ETag, as long as the shard has one: where it lies tells it from the shard's other members."""
    etag = None if shard.etag is None else f"{shard.etag}-{member.offset:x}"
    return msgspec.structs.replace(shard, size=member.size, etag=etag, checksum=None, user={})
