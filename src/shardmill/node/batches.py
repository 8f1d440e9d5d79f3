"""Batches: members of several shards, and whole objects, found before the first byte of any of them is sent.

What was found of an object is of one version, however often it is named, and is read of no other.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shardmill.core.errors import ObjectChanged, ObjectNotFound
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.node.access import Principal
from shardmill.node.objects import Objects
from shardmill.node.shards import Shards

HELD = 64  # objects of a batch that stay open from when they are found; descriptors are for others, too


@dataclass(frozen=True, slots=True)
class Wanted:
    """Members of an object, or all of it."""

    ref: ObjectRef
    names: Sequence[str] | None
    """None: the object as it is."""


@dataclass(slots=True)
class FoundObject:
    """A version of an object that something of a batch is of."""

    ref: ObjectRef
    meta: ObjectMeta
    source: Source | None
    """Held open; None: it has to be opened again."""


@dataclass(frozen=True, slots=True)
class FoundPart:
    """Consecutive bytes of an object."""

    of: FoundObject
    name: str | None
    """Of the member; None: it is the whole object."""
    start: int
    size: int


class Batches:
    """Finds and opens what a batch names."""

    def __init__(self, objects: Objects, shards: Shards) -> None:
        self._objects = objects
        self._shards = shards

    @asynccontextmanager
    async def find(
        self, principal: Principal, wanted: Sequence[Wanted], *, skips_missing: bool
    ) -> AsyncIterator[list[FoundPart]]:
        """Everything that is wanted, in its order; the first objects stay open until the context is left.

        Args:
            principal: Who asks; needs to be allowed to read each of the buckets.
            wanted: Entries.
            skips_missing: Leave out objects and members that do not exist.

        Raises:
            BucketNotFound, ObjectNotFound, MemberNotFound, BadShard, AccessDenied: As reading each would.
        """
        places: dict[ObjectRef, list[int]] = {}
        for place, entry in enumerate(wanted):
            places.setdefault(entry.ref, []).append(place)
        for bucket in {ref.bucket for ref in places}:
            self._objects.check(principal, "read", bucket)
        found: list[Sequence[FoundPart]] = [()] * len(wanted)
        held: list[FoundObject] = []
        try:
            for ref, of_ref in places.items():
                try:
                    opened, parts = await self._find(principal, ref, [wanted[place] for place in of_ref], skips_missing)
                except ObjectNotFound:
                    if not skips_missing:
                        raise
                    continue
                held.append(opened)
                if len(held) > HELD:
                    _close(held.pop())
                for place, of_entry in zip(of_ref, parts, strict=True):
                    found[place] = of_entry
            yield [part for of_entry in found for part in of_entry]
        finally:
            for opened in held:
                _close(opened)

    async def open(self, principal: Principal, found: FoundObject) -> Source:
        """The version that was found, for one that is not held; the caller closes it.

        Raises:
            ObjectChanged: There is another one by now, or none.
        """
        changed = ObjectChanged(f"{found.ref} was replaced while the batch was read; read it again")
        try:
            source = await self._objects.open(principal, found.ref)
        except ObjectNotFound as error:
            raise changed from error
        if source.meta.version != found.meta.version:
            source.close()
            raise changed
        return source

    async def _find(
        self, principal: Principal, ref: ObjectRef, entries: Iterable[Wanted], skips_missing: bool
    ) -> tuple[FoundObject, list[list[FoundPart]]]:
        """One object with its parts for each entry."""
        names = [entry.names for entry in entries]
        if all(of_entry is None for of_entry in names):
            source = await self._objects.open(principal, ref)
            members = None
        else:
            wanted = [name for of_entry in names for name in of_entry or ()]
            source, members = await self._shards.open_members(principal, ref, wanted, skips_missing=skips_missing)
        found = FoundObject(ref, source.meta, source)
        parts: list[list[FoundPart]] = []
        for of_entry in names:
            if of_entry is None:
                parts.append([FoundPart(found, None, 0, source.meta.size)])
                continue
            assert members is not None
            extents = [(name, members[name]) for name in of_entry if name in members]
            parts.append([FoundPart(found, name, extent.offset, extent.size) for name, extent in extents])
        return found, parts


def _close(found: FoundObject) -> None:
    source, found.source = found.source, None
    if source is not None:
        source.close()
