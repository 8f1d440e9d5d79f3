"""Bodies of objects: small ones with their head, others by sendfile in threads, blocks under TLS.

The last block is read and the version checked before it is sent, so a file that changed under its reader is never
completed. An object that still arrives from its origin is sent as it comes, like a shard that is being made. A sendfile
call holds its thread until the kernel has taken the bytes, so it never runs on the loop.
"""

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from aiohttp import web

from shardmill.core.conditions import Conditions
from shardmill.core.errors import PreconditionFailed, RangeNotSatisfiable, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.ranges import ByteRange, content_range
from shardmill.core.sources import Source
from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.framed import FramedSender
from shardmill.server.framed_file import NO_ROOM_MILLISECONDS, FramedFile
from shardmill.server.handing import hand_on
from shardmill.server.patience import patience_with_reader

SMALL = 64 << 10  # bytes; below this one write costs less than a hop to a thread
BLOCK = 1 << 20
AHEAD = 16 << 20  # bytes verified ahead of what is sent
PER_CALL = 4 << 20  # bytes per hop to a thread

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of a source that are answered as if they were all there is."""

    meta: ObjectMeta
    """Theirs: size, ETag, time."""
    start: int
    """Where they begin in the source."""


def judge_read(conditions: Conditions, wanted: ByteRange | None, meta: ObjectMeta, what: str) -> tuple[int, int, int]:
    """Status of the answer to a GET or HEAD, and which bytes [start, stop) it is of (RFC 9110 §13, §14).

    Raises:
        PreconditionFailed, RangeNotSatisfiable: They name it as `what`.
    """
    verdict = conditions.judge_read(meta.etag, meta.modified)
    if verdict == "failed":
        raise PreconditionFailed(f"{what} does not meet the request's conditions")
    if verdict == "not_modified":
        return 304, 0, 0
    if wanted is None or not conditions.allows_range(meta.etag, meta.modified):
        return 200, 0, meta.size
    found = wanted.resolve(meta.size)
    if found is None:
        raise RangeNotSatisfiable(f"{what} has {meta.size} bytes; {wanted} is outside", size=meta.size)
    return 206, *found


def describe_range(answer: web.StreamResponse, status: int, start: int, stop: int, size: int) -> None:
    """The headers that say how much of the object a 200 or 206 has."""
    if status == 206:
        answer.headers["Content-Range"] = content_range(start, stop, size)
    answer.content_length = stop - start


class Sender:
    """Sends slices of sources.

    Args:
        threads: Shared by all answers.
        send_timeout: Seconds a reader may take no byte.
    """

    def __init__(self, threads: ThreadPoolExecutor, send_timeout: float) -> None:
        self._threads = threads
        self._send_timeout = send_timeout

    async def answer(
        self,
        call: Call,
        source: Source,
        what: str,
        head: Callable[[int], web.StreamResponse],
        *,
        is_framed: bool = False,
        part: Part | None = None,
    ) -> web.StreamResponse:
        """Answer GET or HEAD of an opened object, with Range and conditions (RFC 9110 §13, §14).

        Several ranges give the whole object.

        Args:
            call: The request.
            source: Closed by the caller.
            what: Names the object in errors.
            head: Makes the answer for a status, with all headers but those of length and range.
            is_framed: It is a shard made here; sent whole, it stops inside a payload whatever stops it. So is any
                object that still arrives.
            part: Answer this much of the source only.

        Raises:
            PreconditionFailed, RangeNotSatisfiable: As the request's headers demand.
            Cut: The answer failed after its head.
        """
        meta, base = (source.meta, 0) if part is None else (part.meta, part.start)
        wanted = ByteRange.parse(call.headers.get("Range")) if call.method == "GET" else None
        status, start, stop = judge_read(Conditions.parse(call.headers), wanted, meta, what)
        answer = head(status)
        if status == 304:
            return answer
        describe_range(answer, status, start, stop, meta.size)
        if call.method == "GET":
            is_framed = is_framed or (part is None and not source.is_whole and stop > SMALL)
            send = self._send_framed if is_framed and status == 200 else self.send
            await send(call, answer, source, base + start, base + stop)
        return answer

    async def send(self, call: Call, answer: web.StreamResponse, source: Source, start: int, stop: int) -> None:
        """Send head and bytes [start, stop); `answer` has its headers and length.

        Raises:
            ShardmillError: Before the head was sent.
            Cut: After it.
        """
        if stop - start <= SMALL:
            await source.ensure(start, stop)
            data = await self._read(source, start, stop)
            await source.check_unchanged()
            await self._write(call, answer, data, first=True)
            return
        await source.ensure_some(start, min(stop, start + AHEAD))
        await call.send_head(answer)
        try:
            last = stop - SMALL
            transport = call.request.transport
            if transport is not None and transport.get_extra_info("sslcontext") is None:
                await self._send_file(call, transport, source, start, last)
            else:
                await self._send_blocks(call, answer, source, start, last)
            await source.ensure(last, stop)
            tail = await self._read(source, last, stop)
            await source.check_unchanged()
            await self._write(call, answer, tail, first=False)
        except (ShardmillError, OSError) as error:
            raise Cut(str(error)) from error

    async def _send_framed(self, call: Call, answer: web.StreamResponse, source: Source, start: int, stop: int) -> None:
        """Send a whole shard; `start` is 0."""
        await source.ensure_some(start, min(stop, start + AHEAD))
        await call.send_head(answer)
        try:
            transport = call.request.transport
            if transport is not None and transport.get_extra_info("sslcontext") is None:
                await self._send_framed_file(call, transport, source, stop)
                await answer.write_eof()
            else:
                await self._send_framed_blocks(call, answer, source, stop)
        except (ShardmillError, OSError) as error:
            raise Cut(str(error)) from error

    async def _send_framed_file(self, call: Call, transport: asyncio.Transport, source: Source, stop: int) -> None:
        loop = asyncio.get_running_loop()
        await _flush(transport, self._send_timeout)
        sock = transport.get_extra_info("socket")
        buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        # A copy of the descriptor: the transport may close its own while a thread still sends.
        descriptor = os.dup(sock.fileno())
        try:
            file, ensured = FramedFile(descriptor, buffer, source.descriptor), 0
            # The last bytes only after the last look at the source.
            for bound, is_end in ((max(0, stop - SMALL), False), (stop, True)):
                if is_end:
                    await source.ensure(ensured, stop)
                    file.descriptor = source.descriptor
                    await source.check_unchanged()
                    ensured = stop
                while not file.is_done(bound):
                    if file.position >= ensured:
                        source.release(file.position)
                        ensured = await source.ensure_some(file.position, min(bound, file.position + AHEAD))
                        file.descriptor = source.descriptor
                    part = min(bound, ensured)
                    work = loop.run_in_executor(self._threads, partial(file.send_some, part, PER_CALL, is_end=is_end))
                    sent = await seen_through(work)
                    call.sent += sent
                    if not sent and not file.is_done(part):
                        await self._wait_for_room(transport, descriptor)
        finally:
            os.close(descriptor)

    async def _send_framed_blocks(self, call: Call, answer: web.StreamResponse, source: Source, stop: int) -> None:
        start = 0
        with FramedSender(call, answer, self._send_timeout) as sender:
            while start < stop:
                piece = await source.ensure_some(start, min(stop, start + BLOCK))
                data = await self._read(source, start, piece)
                source.release(piece)
                if piece == stop:
                    await source.check_unchanged()
                await sender.write(data)
                start = piece
            await sender.finish()

    async def _read(self, source: Source, start: int, stop: int) -> bytes:
        data = await seen_through(
            asyncio.get_running_loop().run_in_executor(self._threads, os.pread, source.descriptor, stop - start, start)
        )
        if len(data) != stop - start:
            raise ShardmillError(f"{source.meta.key} is shorter than it was")
        return data

    async def _write(self, call: Call, answer: web.StreamResponse, data: bytes, *, first: bool) -> None:
        if first:
            await call.send_head(answer)
        await hand_on(call, answer, data, self._send_timeout)
        await answer.write_eof()

    async def _send_blocks(self, call: Call, answer: web.StreamResponse, source: Source, start: int, stop: int) -> None:
        while start < stop:
            piece = await source.ensure_some(start, min(stop, start + BLOCK))
            data = await self._read(source, start, piece)
            source.release(piece)
            await hand_on(call, answer, data, self._send_timeout)
            start = piece

    async def _send_file(self, call: Call, transport: asyncio.Transport, source: Source, start: int, stop: int) -> None:
        loop = asyncio.get_running_loop()
        await _flush(transport, self._send_timeout)
        # A copy of the descriptor: the transport may close its own while a thread still sends.
        sock = os.dup(transport.get_extra_info("socket").fileno())
        try:
            ensured = start
            while start < stop:
                if start >= ensured:
                    source.release(start)
                    ensured = await source.ensure_some(start, min(stop, start + AHEAD))
                work = loop.run_in_executor(
                    self._threads, send_some, sock, source.descriptor, start, min(ensured, start + PER_CALL)
                )
                sent = await seen_through(work)
                start += sent
                call.sent += sent
                if not sent:
                    await self._wait_for_room(transport, sock)
        finally:
            os.close(sock)

    async def _wait_for_room(self, transport: asyncio.Transport, sock: int) -> None:
        loop = asyncio.get_running_loop()
        room: asyncio.Future[None] = loop.create_future()
        loop.add_writer(sock, lambda: None if room.done() else room.set_result(None))
        try:
            async with patience_with_reader(transport, self._send_timeout):
                await room
        finally:
            loop.remove_writer(sock)


def send_some(sock: int, descriptor: int, start: int, stop: int) -> int:
    """Send from `start` until `stop` or until the reader takes nothing for a while; returns the bytes sent."""
    offset = start
    poller: select.poll | None = None
    while offset < stop:
        try:
            sent = os.sendfile(sock, descriptor, offset, stop - offset)
        except BlockingIOError:
            if poller is None:
                poller = select.poll()
                poller.register(sock, select.POLLOUT)
            if not poller.poll(NO_ROOM_MILLISECONDS):
                break
            continue
        if sent == 0:
            raise OSError("the file ends early")
        offset += sent
    return offset - start


async def seen_through(work: asyncio.Future[Value]) -> Value:
    """Await what a thread does with a descriptor; a cancellation is passed on when the thread is done with it."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            # Whoever is stopped may be told so more than once.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # marks it retrieved: its waiter has gone
        raise


async def _flush(transport: asyncio.Transport, seconds: float) -> None:
    """Return when the transport has handed everything to the kernel, so that nothing can overtake."""
    async with patience_with_reader(transport, seconds):
        while transport.get_write_buffer_size():
            if transport.is_closing():
                raise ConnectionResetError("the reader went away")
            await asyncio.sleep(0.005)
    if transport.is_closing():
        raise ConnectionResetError("the reader went away")
