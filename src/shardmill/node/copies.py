"""Copies of one object inside a node: made by the store behind a bucket where that can, else through the node."""

from contextlib import aclosing

from shardmill.core.conditions import Conditions
from shardmill.core.errors import BadRequest, TooLarge
from shardmill.core.meta import MAX_USER, ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import PutResult
from shardmill.core.values import Size
from shardmill.node.access import Principal
from shardmill.node.bodies import bytes_of_source
from shardmill.node.objects import Objects

BY_THE_STORE = 1 << 30  # bytes; a store is silent while it copies, and counts as broken after `idle_timeout`

_ABSENT = Conditions(if_none_match=("*",))


class Copies:
    """Copies objects of a node.

    Args:
        objects: Of the node.
        max_object: Bytes that an object may have.
    """

    def __init__(self, objects: Objects, max_object: Size) -> None:
        self._objects = objects
        self._max_object = max_object

    async def copy(self, principal: Principal, source: ObjectRef, target: ObjectRef, *, if_absent: bool) -> PutResult:
        """Copy bytes and user metadata of the current version; a copy that fails leaves what was at `target`.

        Args:
            principal: Who asks; has to have the right to read the one and to write the other.
            source: What is copied.
            target: Replaced, if there is one.
            if_absent: Leave an existing object alone. A store judges that of uploads only, so the bytes pass through
                here.

        Raises:
            BucketNotFound, ObjectNotFound: There is no source.
            BucketReadOnly, PreconditionFailed, TooLarge: The target cannot be written, or must not be.
            Conflict: The source was replaced meanwhile.
        """
        if source == target:
            raise BadRequest(f"{source} cannot be copied to itself; name another destination")
        self._objects.check(principal, "read", source.bucket)
        conditions = _ABSENT if if_absent else Conditions()
        await self._objects.check_put(principal, target, conditions)
        meta = await self._objects.head(principal, source)
        self._check(source, meta)
        if not if_absent and meta.size <= BY_THE_STORE:
            copied = await self._objects.copy_in_store(principal, source, target)
            if copied is not None:
                return copied
        return await self._copy_through(principal, source, target, conditions)

    async def _copy_through(
        self, principal: Principal, source: ObjectRef, target: ObjectRef, conditions: Conditions
    ) -> PutResult:
        opened = await self._objects.open(principal, source, expected=(0, None))
        try:
            meta = opened.meta
            self._check(source, meta)
            async with aclosing(bytes_of_source(opened)) as body:
                return await self._objects.put(
                    principal,
                    target,
                    body,
                    size=meta.size,
                    user=meta.user,
                    conditions=conditions,
                    checksum=meta.checksum,
                )
        finally:
            opened.close()

    def _check(self, source: ObjectRef, meta: ObjectMeta) -> None:
        """Raise what a PUT of the same would."""
        if meta.size > self._max_object:
            raise TooLarge(f"{source} has {meta.size} bytes; at most {self._max_object} are accepted (max_object)")
        size = sum(len(name.encode()) + len(value.encode()) for name, value in meta.user.items())
        if size > MAX_USER:
            raise BadRequest(f"user metadata of {source} has {size} bytes; at most {MAX_USER} are allowed")
