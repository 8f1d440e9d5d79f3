"""Bodies of finished results: shards that stop inside a payload, whatever stops them; as `bodies` otherwise."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial

from shardmill.core.sources import Source
from shardmill.server.body import AHEAD, BLOCK, PER_CALL, seen_through
from shardmill.server.framed_file import FramedFile
from shardmill.server.front.bodies import SLICE, TAIL, read_whole
from shardmill.server.front.desk import Desk
from shardmill.shards.stops import Stretches


class FramedBody:
    """A whole shard on its way to one socket, beside its transport, whose own buffer is empty.

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
        sock = transport.get_extra_info("socket")
        # A copy of the descriptor: the transport may close its own while a thread still sends.
        self._socket = os.dup(sock.fileno())
        self._file = FramedFile(self._socket, sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), source.descriptor)
        self._stop = 0
        self._is_end = False
        self._resident = 0
        """Up to here the page cache had it when it was looked at."""
        self._done: asyncio.Future[None] | None = None
        self._in_thread: asyncio.Future[int] | None = None

    def close(self) -> None:
        os.close(self._socket)

    async def send(self, stop: int) -> None:
        """Send bytes [0, stop), all there are.

        Raises:
            ShardmillError, OSError: They are not to be had, or the reader has gone.
        """
        file, source, ensured = self._file, self._source, 0
        last = max(0, stop - TAIL)
        while not file.is_done(last):
            if file.position >= ensured:
                source.release(file.position)
                ensured = await source.ensure_some(file.position, min(last, file.position + AHEAD))
            await self._send_to(min(last, ensured), is_end=False)
        # The last bytes only after the last look at the source.
        await source.ensure(last, stop)
        await source.check_unchanged()
        await self._send_to(stop, is_end=True)

    async def _send_to(self, stop: int, *, is_end: bool) -> None:
        """Send or hold back all up to `stop`, by steps that the loop calls when there is room."""
        self._stop, self._is_end = stop, is_end
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
        done, file = self._done, self._file
        if done is None or done.done():
            return
        if file.position >= self._resident and file.position < self._stop:
            stop = min(self._stop, file.position + SLICE)
            if not self._desk.residency.has(file.descriptor, file.position, stop):
                self._hand_to_thread()
                return
            self._resident = stop
        stop = min(self._stop, self._resident)
        try:
            sent = file.send_some(stop, SLICE, is_end=self._is_end and stop == self._stop, patience=0)
        except OSError as error:
            done.set_exception(error)
            return
        self._advance(sent)

    def _advance(self, sent: int) -> None:
        done = self._done
        if done is None or done.done():
            return
        self._on_sent(sent)
        if self._file.is_done(self._stop):
            done.set_result(None)

    def _hand_to_thread(self) -> None:
        self._desk.ears.remove_writer(self._socket)
        send = partial(self._file.send_some, self._stop, PER_CALL, is_end=self._is_end)
        self._in_thread = self._loop.run_in_executor(self._desk.threads, send)
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
        self._advance(work.result())
        if not done.done():
            self._desk.ears.add_writer(self._socket, self._step)


async def send_framed_blocks(
    desk: Desk,
    transport: asyncio.Transport,
    source: Source,
    stop: int,
    drained: Callable[[], "asyncio.Future[None] | None"],
    on_sent: Callable[[int], None],
) -> None:
    """Write bytes [0, stop), all there are, to a transport that encrypts them: a record arrives whole or not at all.

    Args:
        drained: Gives what to await before more is written; None: nothing.

    Raises:
        ShardmillError, OSError: They are not to be had, or the reader has gone.
    """
    stretches, start = Stretches(), 0
    while start < stop:
        piece = await source.ensure_some(start, min(stop, start + BLOCK))
        data = await read_whole(desk, source.descriptor, start, piece)
        source.release(piece)
        if piece == stop:
            await source.check_unchanged()
        found = [bytes(stretch.data) for stretch in stretches.feed(data)]
        if piece == stop:
            found += [bytes(stretch.data) for stretch in stretches.finish()]
        for stretch in found:
            if transport.is_closing():
                raise ConnectionResetError("the reader went away")
            transport.write(stretch)
            on_sent(len(stretch))
            waiting = drained()
            if waiting is not None:
                await waiting
        start = piece
