"""Sending a shard that was made here so that it stops inside a payload, whatever stops it.

A kill -9 leaves whatever part of a write the kernel had room for. So bytes among which a tar reader would take a stop
for the end are given to the kernel at once, and only when it has room for them all.
"""

import asyncio
import contextlib
import os
import select
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from aiohttp import web

from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.handing import hand_on
from shardmill.server.patience import patience_with_reader
from shardmill.shards.stops import WHOLE, Stretch, Stretches

SLICE = 1 << 20  # bytes that a reader must take within the time-out
_LOOKS_EVERY = 32  # writes; the buffer of a socket only grows
MAX_WHOLE = 64 << 10  # bytes given to the kernel at once

# From 3.12 on transports keep the buffer they are given; its memory may be used again once `write` has returned.
_COPIES = sys.version_info >= (3, 12)


class FramedSender:
    """Writes the body of one answer. Use as a context manager: leaving it frees what watches the socket.

    A plain socket is written to straight from the memory that holds the bytes, with a call a payload; under TLS the
    transport has to encrypt them, and does.

    Args:
        call: Its request; bytes are counted there.
        answer: Its head is sent.
        send_timeout: Seconds that a reader may take no byte.
    """

    def __init__(self, call: Call, answer: web.StreamResponse, send_timeout: float) -> None:
        self._call = call
        self._answer = answer
        self._send_timeout = send_timeout
        self._stretches = Stretches()
        transport = call.request.transport
        # Under TLS a record arrives whole or not at all, and a whole stretch is one record.
        is_plain = transport is not None and transport.get_extra_info("sslcontext") is None
        self._room = _Room(transport) if transport is not None and is_plain else None
        self._writes = 0
        self._waiting = b""
        """A whole stretch that goes with what comes next."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._room is not None:
            self._room.close()

    async def write(self, data: memoryview | bytes) -> None:
        """Send the next bytes, up to the last place where the stream may stop; `data` may change afterwards.

        What no reader can use before more comes waits for that, unless it is flushed.

        Raises:
            Cut: The reader went away.
            Stalled: It takes nothing.
        """
        if self._room is not None and not self._writes % _LOOKS_EVERY:
            self._stretches.limit = self._room.size
        self._writes += 1
        is_urgent = False
        # A forgotten view would keep a worker's whole memory, and its descriptor, until garbage is collected.
        with contextlib.closing(self._stretches.feed(data)) as stretches:
            for stretch in stretches:
                if self._room is None:
                    await self._hand_on(stretch)
                elif stretch.is_whole:
                    await self._keep(bytes(stretch.data), self._room)
                    is_urgent = is_urgent or stretch.is_urgent
                else:
                    await self._send_loose(stretch.data, self._room)
                    is_urgent = False
        if is_urgent:
            await self.flush()

    async def flush(self) -> None:
        """Send what waits for more."""
        if self._waiting and self._room is not None:
            await self._send(b"", self._room)

    async def finish(self) -> None:
        """Send what is left and end the body."""
        for stretch in self._stretches.finish():
            if self._room is None:
                await self._hand_on(stretch)
            else:
                await self._send_loose(stretch.data, self._room)
        await self.flush()
        await self._answer.write_eof()

    async def _keep(self, whole: bytes, room: "_Room") -> None:
        if len(self._waiting) + len(whole) > self._stretches.limit:
            await self._send(b"", room)
        self._waiting += whole

    async def _send_loose(self, data: memoryview | bytes, room: "_Room") -> None:
        with memoryview(data) as view:
            for start in range(0, len(view), SLICE):
                with view[start : start + SLICE] as piece:
                    await self._send(piece, room)

    async def _send(self, loose: memoryview | bytes, room: "_Room") -> None:
        """Send what waits, whole, and bytes among which the stream may stop."""
        whole, self._waiting = self._waiting, b""
        size = len(whole) + len(loose)
        head, end = (b"%x\r\n" % size, b"\r\n") if self._answer.chunked else (b"", b"")
        pieces = (head + whole, loose, end)
        left = len(head) + size + len(end)
        while True:
            if not room.is_there:
                async with patience_with_reader(self._call.request.transport, self._send_timeout):
                    await room.wait()
            left -= room.write(pieces, left)
            if not left:
                break
        self._call.sent += size

    async def _hand_on(self, stretch: Stretch) -> None:
        with memoryview(stretch.data) as view:
            for start in range(0, len(view), SLICE):
                with view[start : start + SLICE] as piece:
                    kept = bytes(piece) if _COPIES and not stretch.is_whole else piece
                    await hand_on(self._call, self._answer, kept, self._send_timeout)


def whole_limit(buffer: int) -> int:
    """Bytes that a socket with such a buffer takes to the last when it says that there is room.

    Linux says so when a third of the buffer is free, some 15 KiB at the least; half of that is left for what the kernel
    counts beside the bytes.
    """
    return max(WHOLE, min(MAX_WHOLE, buffer // 6))


class _Room:
    """Room in a connection's socket: nothing waits to be sent, and the kernel takes more."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        # A copy of the descriptor: the loop watches the transport's own for the transport.
        self._descriptor = os.dup(self._socket.fileno())
        self._poller = select.poll()
        self._poller.register(self._descriptor, select.POLLOUT)

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes that it takes to the last when there is room."""
        return whole_limit(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))

    @property
    def is_there(self) -> bool:
        return not self._transport.get_write_buffer_size() and bool(self._poller.poll(0))

    def write(self, pieces: Sequence[memoryview | bytes], left: int) -> int:
        """Give the kernel what it has room for of the last `left` bytes of the pieces; returns how many it took.

        Raises:
            Cut: The reader went away.
        """
        if self._transport.is_closing():
            raise Cut("the reader went away")
        skipped = sum(map(len, pieces)) - left
        views: list[memoryview] = []
        try:
            for piece in pieces:
                if len(piece) > skipped:
                    with memoryview(piece) as view:
                        views.append(view[skipped:])
                skipped = max(0, skipped - len(piece))
            return os.writev(self._descriptor, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Cut("the reader went away") from error
        finally:
            for view in views:
                view.release()

    async def wait(self) -> None:
        """Return when there is room; raises Cut when the reader went away."""
        loop = asyncio.get_running_loop()
        while not self.is_there:
            if self._transport.is_closing():
                raise Cut("the reader went away")
            writable: asyncio.Future[None] = loop.create_future()
            loop.add_writer(self._descriptor, _wake, writable)
            try:
                await writable
            finally:
                loop.remove_writer(self._descriptor)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
