"""Members of several shards, and whole objects, by few requests: each is answered by one tar, in the asked order."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

import msgspec

from shardmill.client.answers import Answer, NodeUnreachable, TruncatedBody
from shardmill.client.http import Transport
from shardmill.core.api import BatchEntry, BatchRequest
from shardmill.core.errors import BadRequest, ServerError
from shardmill.core.refs import ObjectRef
from shardmill.shards.tar import TarError, iter_stream

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SLICE = 2000  # members and objects asked for at once; a node answers five times as many
TRIES = 3  # of what was cut, without one more item in between

_BUFFER = 256 << 10

Missing = Literal["fail", "skip"]
Wanted = str | tuple[str, str]
"""The URI of an object; or that of a shard, and the name of a member of it."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One member, or one object."""

    uri: str
    """`provider://bucket/key`."""
    member: str | None
    """None: the object as it is."""
    data: bytes


def read_batch(transport: Transport, wanted: Iterable[Wanted], *, missing: Missing) -> Iterator[BatchItem]:
    """See `Client.read_batch`."""
    items = iter(wanted)
    while part := [_parse(item) for item in islice(items, SLICE)]:
        yield from _read_part(transport, part, missing)


def open_batch(
    transport: Transport, entries: Sequence[BatchEntry], *, missing: Missing, naming: Literal["full", "member"]
) -> io.BufferedReader:
    """The tar of a batch; the caller closes it."""
    body = msgspec.json.encode(BatchRequest(list(entries), missing=missing, naming=naming))
    answer = transport.request("POST", "/api/batch", headers={"Content-Type": "application/json"}, body=body)
    return io.BufferedReader(_Raw(answer), _BUFFER)


def _parse(item: Wanted) -> tuple[ObjectRef, str | None]:
    uri, member = (item, None) if isinstance(item, str) else item
    if member == "":
        raise BadRequest(f"a member of {uri} without a name")
    return ObjectRef.parse(uri), member


def _read_part(
    transport: Transport, wanted: list[tuple[ObjectRef, str | None]], missing: Missing
) -> Iterator[BatchItem]:
    """*Recovery:* what is cut is asked for again from the first item that did not arrive."""
    done, tries = 0, 0
    while True:
        try:
            begun = done
            for place, data in _receive(transport, wanted[begun:], missing):
                done, tries = begun + place + 1, 0
                ref, member = wanted[begun + place]
                yield BatchItem(str(ref), member, data)
            return
        except (TruncatedBody, NodeUnreachable):
            if done == len(wanted):
                return
            tries += 1
            if tries >= TRIES:
                raise


def _receive(
    transport: Transport, wanted: list[tuple[ObjectRef, str | None]], missing: Missing
) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of each that there is."""
    with open_batch(transport, _entries(wanted), missing=missing, naming="full") as file:
        next_place = 0
        try:
            for member, data in iter_stream(cast(BinaryIO, file)):
                place = next_place
                while place < len(wanted) and missing == "skip" and _name_of(wanted[place]) != member.name:
                    place += 1
                if place == len(wanted) or _name_of(wanted[place]) != member.name:
                    raise ServerError(f"the node answered a batch with {member.name!r}, which was not asked for there")
                yield place, data
                next_place = place + 1
        except TarError as error:
            raise TruncatedBody(f"a batch was cut: {error}") from error
    if missing == "fail" and next_place != len(wanted):
        raise ServerError(f"the node answered a batch with {next_place} of {len(wanted)} items")


def _entries(wanted: Iterable[tuple[ObjectRef, str | None]]) -> list[BatchEntry]:
    """Neighbours of one shard together."""
    entries = []
    for (ref, is_whole), items in groupby(wanted, lambda item: (item[0], item[1] is None)):
        if is_whole:
            entries += [BatchEntry(str(ref)) for _ in items]
        else:
            entries.append(BatchEntry(str(ref), [member for _, member in items if member is not None]))
    return entries


def _name_of(item: tuple[ObjectRef, str | None]) -> str:
    ref, member = item
    base = f"{ref.bucket.provider}/{ref.bucket.name}/{ref.key}"
    return base if member is None else f"{base}/{member}"


class _Raw(io.RawIOBase):
    """An answer as a file."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        return self._answer.read_into(memoryview(buffer).cast("B"))

    def close(self) -> None:
        self._answer.close()
        super().close()
