"""A body on its way through to an origin: counted and hashed, so that a wrong one fails before the origin keeps it."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import xxhash

from shardmill.core.conditions import Conditions
from shardmill.core.errors import BadRequest, ObjectNotFound, PreconditionFailed
from shardmill.core.origins import OriginFacts, ReadOrigin, WriteOrigin


@runtime_checkable
class OpenToWriting(ReadOrigin, WriteOrigin, Protocol):
    """An origin that can be read and written to."""


class Write:
    """One change of an object on its way to the origin."""

    def __init__(self) -> None:
        self.is_alone = True
        """No other change of the same object was under way with it: only then is known what the origin has after it."""


class Writes:
    """What changes of objects are under way."""

    def __init__(self) -> None:
        self._begun: dict[str, list[Write]] = {}

    @contextmanager
    def begin(self, key: str) -> Iterator[Write]:
        """For as long as a change takes, until its outcome is noted here."""
        others = self._begun.setdefault(key, [])
        write = Write()
        others.append(write)
        if len(others) > 1:
            for other in others:
                other.is_alone = False
        try:
            yield write
        finally:
            others.remove(write)
            if not others:
                del self._begun[key]


async def checked(
    body: AsyncIterator[bytes | bytearray | memoryview], *, size: int | None, checksum: str | None
) -> AsyncIterator[bytes | bytearray | memoryview]:
    """The body, piece by piece; the last one only when all of it is known to be right.

    Raises:
        BadRequest: It is shorter or longer than `size`, or `checksum` (`xxh3:HEX`) is another.
    """
    hasher = xxhash.xxh3_128()
    received = 0
    held: bytes = b""
    async for piece in body:
        hasher.update(piece)
        received += len(piece)
        if size is not None and received > size:
            raise BadRequest(f"the body is longer than the {size} bytes announced; nothing was stored")
        if held:
            yield held
        # What it was given may be used again by whoever gave it.
        held = bytes(piece)
    if size is not None and received != size:
        raise BadRequest(f"the body has {received} bytes, {size} were announced; nothing was stored")
    found = f"xxh3:{hasher.hexdigest()}"
    if checksum is not None and checksum != found:
        raise BadRequest(f"the body's checksum is {found}, announced was {checksum}; nothing was stored")
    if held:
        yield held


async def put_through(
    origin: OpenToWriting,
    label: str,
    key: str,
    body: AsyncIterator[bytes | bytearray | memoryview],
    *,
    size: int | None,
    user: Mapping[str, str],
    conditions: Conditions,
) -> tuple[OriginFacts, bool]:
    """Store an object at its origin, which judges the conditions at the end once more; True: there was none.

    Raises:
        PreconditionFailed: The conditions do not hold.
    """
    current = await _current(origin, key)
    _judge(label, conditions, current)
    is_conditional = conditions != Conditions()
    facts = await origin.put(
        key,
        body,
        size=size,
        user=user,
        content_type=None,
        if_match=current.etag if is_conditional and current is not None else None,
        if_absent=is_conditional and current is None,
    )
    return facts, current is None


async def copy_through(origin: OpenToWriting, key: str, target: str) -> tuple[OriginFacts, bool]:
    """Have the origin copy an object over another; True: there was none. Raises ObjectNotFound."""
    current = await _current(origin, target)
    await origin.copy(key, target)
    return await origin.head(target), current is None


async def delete_through(origin: OpenToWriting, label: str, key: str, conditions: Conditions) -> None:
    """Remove an object at its origin; raises ObjectNotFound, PreconditionFailed."""
    current = await _current(origin, key)
    if current is None:
        raise ObjectNotFound(f"no object {label}")
    _judge(label, conditions, current)
    await origin.delete(key)


async def _current(origin: ReadOrigin, key: str) -> OriginFacts | None:
    try:
        return await origin.head(key)
    except ObjectNotFound:
        return None


def _judge(label: str, conditions: Conditions, current: OriginFacts | None) -> None:
    etag, modified = (current.etag, current.modified or 0.0) if current is not None else (None, None)
    if conditions.judge_write(etag, modified) == "failed":
        raise PreconditionFailed(f"{label} does not meet the conditions; it is unchanged")
