"""Large bodies: from the file to the socket in the kernel; in blocks under TLS.

While the page cache has the bytes they go in slices on the loop, which costs less than a hop to a thread; a slice that
the disk would have to be waited for goes in a thread. The end is sent only when the file is found unchanged behind it.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from functools import partial

from shardmill.core.sources import Source
from shardmill.server.body import AHEAD, PER_CALL, seen_through, send_some
from shardmill.server.front.desk import Desk

SLICE = 1 << 20  # bytes between which others have their turn
ENCRYPTED = 128 << 10  # bytes that are encrypted at once; they pass through memory several times, so few of them
NEAR = 1000  # microseconds
TAIL = 64 << 10  # bytes of the end that wait for the last look at the source

_ROUND_TRIP = struct.Struct("=148xI")  # up to tcpi_min_rtt of <linux/tcp.h>


class FileBody:
    """Bytes of a source on their way to one socket, beside its transport, whose own buffer is empty.

    Args:
        transport: Nobody else writes to it meanwhile.
        on_sent: Told of bytes that the kernel has taken.
    """

    def __init__(
        self, desk: Desk, transport: asyncio.Transport, source: Source, on_sent: Callable[[int], None]
    ) -> None:
        self._desk = desk
        self._source = source
        self._on_sent = on_sent
        self._loop = asyncio.get_running_loop()
        # A copy of the descriptor: the transport may close its own while a thread still sends.
        self._socket = os.dup(transport.get_extra_info("socket").fileno())
        self._position = 0
        self._stop = 0
        self._resident = 0
        """Up to here the page cache had it when it was looked at."""
        self._done: asyncio.Future[None] | None = None
        self._in_thread: asyncio.Future[int] | None = None

    def close(self) -> None:
        os.close(self._socket)

    async def send(self, start: int, stop: int, *, tail: int = TAIL) -> None:
        """Send bytes [start, stop).

        Args:
            start: The first.
            stop: Behind the last.
            tail: Bytes of the end that are sent only after a last look at the source.

        Raises:
            ShardmillError, OSError: They are not to be had, or the reader has gone.
        """
        last = max(start, stop - tail)
        ensured = start
        self._position = start
        while self._position < last:
            self._source.release(self._position)
            ensured = await self._source.ensure_some(self._position, min(last, self._position + AHEAD))
            await self._send_to(ensured)
        if last == stop:
            return
        await self._source.ensure(last, stop)
        # What is read before the look is of the version that was promised.
        data = await read_whole(self._desk, self._source.descriptor, last, stop)
        await self._source.check_unchanged()
        await self._send_bytes(data)

    async def _send_bytes(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                sent = os.write(self._socket, view)
            except BlockingIOError:
                await self._wait_for_room()
                continue
            self._on_sent(sent)
            view = view[sent:]

    async def _wait_for_room(self) -> None:
        room: asyncio.Future[None] = self._loop.create_future()
        self._desk.ears.add_writer(self._socket, partial(_set, room))
        try:
            await room
        finally:
            self._desk.ears.remove_writer(self._socket)

    async def _send_to(self, stop: int) -> None:
        """Send up to `stop`, by steps that the loop calls when there is room."""
        self._stop = stop
        done = self._done = self._loop.create_future()
        self._desk.ears.add_writer(self._socket, self._step)
        try:
            await done
        finally:
            self._done = None
            self._desk.ears.remove_writer(self._socket)
            if self._in_thread is not None:
                with contextlib.suppress(OSError):
                    await seen_through(self._in_thread)

    def _step(self) -> None:
        """Send a slice; the loop has others between it and the next."""
        position, done = self._position, self._done
        if done is None or done.done():
            return
        stop = min(self._stop, position + SLICE)
        if position >= self._resident:
            if not self._desk.residency.has(self._source.descriptor, position, stop):
                self._hand_to_thread()
                return
            self._resident = stop
        try:
            sent = os.sendfile(self._socket, self._source.descriptor, position, min(stop, self._resident) - position)
        except BlockingIOError:
            return
        except OSError as error:
            done.set_exception(error)
            return
        self._advance(sent)

    def _advance(self, sent: int) -> None:
        done = self._done
        if done is None or done.done():
            return
        if not sent:
            done.set_exception(OSError("the file ends early"))
            return
        self._on_sent(sent)
        self._position += sent
        if self._position >= self._stop:
            done.set_result(None)

    def _hand_to_thread(self) -> None:
        self._desk.ears.remove_writer(self._socket)
        stop = min(self._stop, self._position + PER_CALL)
        self._in_thread = self._loop.run_in_executor(
            self._desk.threads, send_some, self._socket, self._source.descriptor, self._position, stop
        )
        self._in_thread.add_done_callback(self._back_from_thread)

    def _back_from_thread(self, work: "asyncio.Future[int]") -> None:
        self._in_thread = None
        done = self._done
        if work.cancelled() or done is None or done.done():
            return
        error = work.exception()
        if error is not None:
            done.set_exception(error)
            return
        if sent := work.result():
            self._advance(sent)
        if not done.done():
            self._desk.ears.add_writer(self._socket, self._step)


def send_now(destination: int, descriptor: int, start: int, size: int) -> int:
    """Send of a file what the kernel takes without waiting; says how much, 0 also for a peer that has gone."""
    try:
        return os.sendfile(destination, descriptor, start, size)
    except OSError:
        return 0


async def send_blocks(
    desk: Desk,
    transport: asyncio.Transport,
    source: Source,
    span: tuple[int, int],
    drained: Callable[[], "asyncio.Future[None] | None"],
    on_sent: Callable[[int], None],
) -> None:
    """Write bytes [start, stop) to a transport that encrypts them.

    Args:
        drained: Gives what to await before more is written; None: nothing.

    Raises:
        ShardmillError, OSError: They are not to be had, or the reader has gone.
    """
    start, stop = span
    while start < stop:
        piece = await source.ensure_some(start, min(stop, start + ENCRYPTED))
        data = await read_whole(desk, source.descriptor, start, piece)
        source.release(piece)
        if piece == stop:
            await source.check_unchanged()
        if transport.is_closing():
            raise ConnectionResetError("the reader went away")
        transport.write(data)
        on_sent(len(data))
        waiting = drained()
        if waiting is not None:
            await waiting
        start = piece


async def read_whole(desk: Desk, descriptor: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; in a thread when the disk would have to be waited for.

    Raises:
        OSError: There are not so many.
    """
    if desk.residency.has(descriptor, start, stop):
        data = os.pread(descriptor, stop - start, start)
    else:
        loop = asyncio.get_running_loop()
        data = await seen_through(loop.run_in_executor(desk.threads, os.pread, descriptor, stop - start, start))
    if len(data) != stop - start:
        raise OSError("the file ends early")
    return data


def limit_send_buffer(transport: asyncio.Transport, size: int) -> None:
    """A small send buffer where the way is short; on a long one it would hold the rate down."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if size and is_near(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def is_near(sock: socket.socket) -> bool:
    """The peer is on this machine, or as near: the shortest round trip that the kernel has seen is below `NEAR`."""
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ROUND_TRIP.size)
    (microseconds,) = _ROUND_TRIP.unpack(information)
    return bool(microseconds < NEAR)


def _set(room: "asyncio.Future[None]") -> None:
    if not room.done():
        room.set_result(None)
