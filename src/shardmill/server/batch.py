"""`POST /api/batch`: members of several shards, and whole objects, as one tar in the order that was asked for.

Its length is known before its first byte. Whatever stops it, it stops inside a payload, as a shard does that is made.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from shardmill.core.api import BatchEntry, BatchRequest
from shardmill.core.errors import BadRequest, ServerError, ShardmillError, TooLarge
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.node.batches import HELD, Batches, FoundObject, FoundPart, Wanted
from shardmill.server.body import seen_through
from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.framed import FramedSender
from shardmill.server.objects import UNTRUSTED
from shardmill.server.payloads import decode_body, read_body
from shardmill.shards.framing import end_padding, padding, tar_header

MAX_PARTS = 10_000  # members and objects of one batch; what was found of each is held until it is sent
MAX_BODY = 16 << 20  # bytes of the request
PIECE = 1 << 20  # bytes read by one call of a thread

_MODE = 0o444


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of the answer: some that are made, then some of an object."""

    before: bytes
    of: FoundObject
    start: int
    stop: int


class BatchFace:
    """Batches over HTTP.

    Args:
        batches: Of the node.
        threads: For reading.
        body_timeout: Seconds for the request.
        send_timeout: Seconds that a reader may take no byte.
    """

    def __init__(
        self, batches: Batches, threads: ThreadPoolExecutor, *, body_timeout: float, send_timeout: float
    ) -> None:
        self._batches = batches
        self._threads = threads
        self._body_timeout = body_timeout
        self._send_timeout = send_timeout

    async def post(self, call: Call) -> web.StreamResponse:
        """One tar; 404 before its first byte for what does not exist, unless that is to be skipped."""
        call.query()
        body = await read_body(call, MAX_BODY, "a batch", self._body_timeout)
        request = await decode_body(body, BatchRequest, "a batch")
        wanted = await asyncio.to_thread(_wanted, request.entries)
        async with self._batches.find(call.principal, wanted, skips_missing=request.missing == "skip") as parts:
            archive = Archive(parts, request.naming)
            size = await asyncio.to_thread(archive.size)
            answer = web.StreamResponse(
                headers={"Content-Type": "application/x-tar", "Cache-Control": "no-store", **UNTRUSTED}
            )
            answer.content_length = size + end_padding(size)
            await self._send(call, answer, archive, end_padding(size))
            return answer

    async def _send(self, call: Call, answer: web.StreamResponse, archive: "Archive", ending: int) -> None:
        try:
            with FramedSender(call, answer, self._send_timeout) as sender:
                for piece in archive.pieces():
                    data = await self._read(call, piece)
                    if call.answer is None:
                        # What fails before the first bytes are there has a status of its own.
                        await call.send_head(answer)
                    await sender.write(data)
                if call.answer is None:
                    await call.send_head(answer)
                await sender.write(bytes(archive.padding + ending))
                await sender.finish()
        except (ShardmillError, OSError) as error:
            if call.answer is None:
                raise
            raise Cut(str(error)) from error

    async def _read(self, call: Call, piece: list[Slice]) -> bytes:
        """The bytes of a piece, after which no object of it has changed."""
        sources: dict[int, Source] = {}
        with contextlib.ExitStack() as opened:
            for part in piece:
                source = part.of.source or sources.get(id(part.of))
                if source is None:
                    source = await self._batches.open(call.principal, part.of)
                    opened.callback(source.close)
                sources[id(part.of)] = source
                if part.start < part.stop:
                    await source.ensure(part.start, part.stop)
            descriptors = [sources[id(part.of)].descriptor for part in piece if part.start < part.stop]
            loop = asyncio.get_running_loop()
            data = await seen_through(loop.run_in_executor(self._threads, _read, descriptors, piece))
            for source in sources.values():
                await source.check_unchanged()
            return data


class Archive:
    """A tar of what was found, made piece by piece."""

    def __init__(self, parts: Sequence[FoundPart], naming: Literal["full", "member"]) -> None:
        self._parts = parts
        self._is_full = naming == "full"
        self.padding = 0
        """Bytes behind the payload that the last piece ended with."""

    def size(self) -> int:
        """Bytes up to the end of the last member, its padding included.

        Raises:
            BadRequest: A name that no tar can hold.
        """
        return sum(len(self._header(part)) + part.size + padding(part.size) for part in self._parts)

    def pieces(self) -> Iterator[list[Slice]]:
        """What each reading has to bring; behind the last piece `padding` is missing."""
        piece: list[Slice] = []
        size, opened = 0, 0
        for part in self._parts:
            before = bytes(self.padding) + self._header(part)
            start, end = part.start, part.start + part.size
            opened += part.of.source is None
            while True:
                stop = min(end, start + PIECE - size)
                piece.append(Slice(before, part.of, start, stop))
                size += len(before) + stop - start
                start, before = stop, b""
                if size >= PIECE or opened >= HELD:
                    yield piece
                    piece, size, opened = [], 0, 0
                if start >= end:
                    break
            self.padding = padding(part.size)
        if piece:
            yield piece

    def _header(self, part: FoundPart) -> bytes:
        ref = part.of.ref
        name = ref.key if part.name is None else part.name
        if self._is_full:
            base = f"{ref.bucket.provider}/{ref.bucket.name}/{ref.key}"
            name = base if part.name is None else f"{base}/{part.name}"
        modified = round(part.of.meta.modified)
        try:
            return tar_header(name, part.size, mtime=modified, mode=_MODE, uid=0, gid=0, uname="", gname="")
        except ValueError as error:
            raise BadRequest(f"{ref}: {error}") from None


def _wanted(entries: list[BatchEntry]) -> list[Wanted]:
    count = sum(1 if entry.members is None else len(entry.members) for entry in entries)
    if max(count, len(entries)) > MAX_PARTS:
        raise TooLarge(f"a batch of {max(count, len(entries))} members and objects; at most {MAX_PARTS} are answered")
    for entry in entries:
        if entry.members is not None and "" in entry.members:
            raise BadRequest(f"a member of {entry.object} without a name")
    return [Wanted(ObjectRef.parse(entry.object), entry.members) for entry in entries]


def _read(descriptors: Iterable[int], piece: Iterable[Slice]) -> bytes:
    """Args:
    descriptors: Of the objects of those slices that have bytes of them.
    piece: The slices.
    """
    parts: list[bytes] = []
    left = iter(descriptors)
    for part in piece:
        if part.before:
            parts.append(part.before)
        if part.start < part.stop:
            data = os.pread(next(left), part.stop - part.start, part.start)
            if len(data) != part.stop - part.start:
                raise ServerError(f"{part.of.ref} is shorter than it was")
            parts.append(data)
    return b"".join(parts)
