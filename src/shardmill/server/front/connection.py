"""One connection as long as it asks for plain reads; the bytes of anything else go to aiohttp together with it.

Answers leave in the order of their requests: while one is not written, whatever comes waits, and little of it is read.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Protocol

from shardmill.core.errors import ShardmillError
from shardmill.core.kept import Kept
from shardmill.server.body import AHEAD
from shardmill.server.front.bodies import SLICE, TAIL, FileBody, limit_send_buffer, read_whole, send_blocks, send_now
from shardmill.server.front.desk import COPIED, SMALL, Desk
from shardmill.server.front.framed_bodies import FramedBody, send_framed_blocks
from shardmill.server.front.plans import Plan, Ready
from shardmill.server.front.storing import Ending, StoringConnection
from shardmill.server.patience import count_untaken

logger = logging.getLogger(__name__)


MIDDLE = 16 << 10  # bytes of a body from which on the size of the send buffer counts
STAYS = 0.5  # seconds that bytes just seen in memory are not looked for again
TOGETHER = 72 << 10  # bytes of a body from which on its head does not leave before it; a little more than a segment
AT_ONCE = 32  # requests of one peer, sent together, before others have their turn


class Lobby(Protocol):
    """Where connections are known."""

    def arrived(self, connection: "FrontConnection") -> None: ...

    def left(self, connection: "FrontConnection", work: "asyncio.Task[Ending] | None") -> None:
        """Its transport is closed; `work` still gives back what it holds."""
        ...

    def finished_one(self) -> None:
        """An answer that took its time is done."""
        ...

    def hand_over(self, connection: "FrontConnection", transport: asyncio.Transport, data: bytes) -> None:
        """Let somebody else go on with a connection, from these bytes on. Nothing is left to be written to it."""
        ...


class FrontConnection(StoringConnection):
    """One peer. What it sends is received into one buffer for all, which costs less than a new one each time."""

    __slots__ = (
        "_drained",
        "_is_full",
        "_is_heard",
        "_is_limited",
        "_lobby",
        "_progress",
        "_socket",
        "_work",
        "is_ended",
    )

    def __init__(self, lobby: Lobby, desk: Desk) -> None:
        self._lobby = lobby
        self._desk = desk
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1
        """Of the socket, when the desk's ears listen to it; -1: the transport does."""
        self._is_heard = False
        """The ears listen."""
        self._socket: socket.socket | None = None
        """The transport's, for writing with flags; it does not own the descriptor."""
        self._pending = b""
        """Came while an answer was in work."""
        self._work: asyncio.Task[Ending] | None = None
        """An answer that has to wait for something."""
        self._is_full = False
        """The transport wants nothing more for now."""
        self._drained: asyncio.Future[None] | None = None
        self._is_storing = False
        """What was sent is being stored."""
        self._is_limited = False
        """Its send buffer was looked at."""
        self.is_ended = False
        """The peer sends nothing more."""
        self._written = 0
        """Bytes, since the beginning."""
        self._progress = (0, 0.0)
        """While something is to be taken: what the peer has taken since the beginning, and when that was seen first."""
        self.waiting_since = 0.0
        """When it began to wait for a request."""
        self.has_asked = False
        """It was answered before; a new one owes a head from the start."""

    @property
    def is_serving(self) -> bool:
        """A request is in work, or an answer is not taken."""
        return self._work is not None or self._is_full or self._is_storing

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.waiting_since = monotonic()
        self._lobby.arrived(self)
        if not _is_encrypted(transport):
            self._descriptor = transport.get_extra_info("socket").fileno()
            transport.pause_reading()
            self._listen()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_hearing()
        self._forget_socket()
        self._transport = None
        if self._work is not None:
            self._work.cancel()
        self._wake()
        self._lobby.left(self, self._work)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()
        if self._work is None and not self._is_storing:
            self._lobby.finished_one()
            self._go_on()

    def eof_received(self) -> bool:
        self.is_ended = True
        # TLS has no half of a connection.
        is_needed = self.is_serving or bool(self._pending)
        return is_needed and self._transport is not None and not _is_encrypted(self._transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._desk.received

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._desk.received[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Bytes came, or another protocol got them."""
        if not self.is_serving and not self._pending:
            self._take(data)
            return
        self._pending += data
        self._pause()

    def _hear(self) -> None:
        """There is something to read: as a rule one request, whose answer is known but for its id and the date."""
        transport, received = self._transport, self._desk.received
        try:
            data = bytes(received[: os.readv(self._descriptor, (received,))])
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or transport is None or transport.is_closing():
            # Of an end the transport knows what to do; it finds the same.
            self._leave_ears()
        elif self._work is not None or self._is_full or self._is_storing or self._pending:
            self.data_received(data)
        else:
            plan = self._desk.known.get(data)
            ready = None if plan is None else plan.ready
            if plan is None or ready is None or not ready.is_known or not ready.kept.is_current:
                self._take(data)
            else:
                try:
                    self._answer_known(plan, ready, transport, monotonic())
                except Exception as error:
                    self._end_for(error)

    def _listen(self) -> None:
        """Take what comes."""
        if self._descriptor < 0:
            if self._transport is not None:
                self._transport.resume_reading()
        elif not self._is_heard:
            self._is_heard = True
            self._desk.ears.add(self._descriptor, self._hear)

    def _pause(self) -> None:
        """Take nothing for now."""
        if self._descriptor < 0 and self._transport is not None:
            self._transport.pause_reading()
        self._stop_hearing()

    def _stop_hearing(self) -> None:
        if self._is_heard:
            self._is_heard = False
            self._desk.ears.remove(self._descriptor)

    def _leave_ears(self) -> None:
        """Let the transport read."""
        self._stop_hearing()
        self._descriptor = -1
        self._listen()

    def _forget_socket(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.detach()

    # What the lobby asks.

    def is_overdue(self, now: float) -> bool:
        """It owes a head for too long, was idle for too long, or takes nothing of what it is sent."""
        settings, transport = self._desk.settings, self._transport
        if transport is None:
            return False
        if self.is_serving or transport.get_write_buffer_size() or transport.is_closing():
            untaken = count_untaken(transport)
            taken, (known, since) = self._written - untaken, self._progress
            if not untaken or not since or taken > known:
                self._progress = (taken, now)
                return False
            return now - since > settings.send_timeout
        self._progress = (0, 0.0)
        return now - self.waiting_since > (settings.idle_timeout if self.has_asked else settings.header_timeout)

    def abort(self) -> None:
        """End it now, whatever the peer has not taken."""
        if self._transport is not None:
            self._transport.abort()

    async def stop(self) -> None:
        """Cut what goes on, and close."""
        work = self._work
        if work is not None:
            work.cancel()
            await asyncio.wait([work])
        if self._transport is not None:
            self._transport.close()

    # Requests.

    def _take(self, data: bytes) -> None:
        """Answer what came; what nobody foresaw ends the connection, whose peer would wait."""
        try:
            self._answer_each(data)
        except Exception as error:
            self._end_for(error)

    def _end_for(self, error: Exception) -> None:
        """A defect: nobody above would end the connection."""
        logger.error("unexpected %s", type(error).__name__, exc_info=error)
        self.abort()

    def _answer_each(self, data: bytes) -> None:
        """Answer one after the other."""
        transport, desk = self._transport, self._desk
        start, number = 0, 0
        while start < len(data):
            if transport is None or transport.is_closing():
                return
            if self.is_serving or number == AT_ONCE:
                self._pending = data[start:] + self._pending
                self._pause()
                if number == AT_ONCE and not self.is_serving:
                    asyncio.get_running_loop().call_soon(self._go_on)
                return
            plan = desk.next_plan(data, start)
            if plan is None:
                data = data[start:] if start else data
                if not self._begin_upload(data, transport):
                    self._hand_over(data)
                return
            start += len(plan.head)
            number += 1
            self._answer(plan, transport)

    def _finished(self) -> None:
        self._lobby.finished_one()

    def _go_on(self) -> None:
        """Nothing is in work any more: on with what came meanwhile."""
        transport, data = self._transport, self._pending
        if transport is None or self.is_serving:
            return
        self._pending = b""
        if data:
            self._take(data)
            if self._transport is None or self._pending or self.is_serving:
                return
        if self.is_ended:
            transport.close()
        else:
            self._listen()

    def _hand_over(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None:
            self._leave_ears()
            self._forget_socket()
            self._transport = None
            self._lobby.hand_over(self, transport, data)

    def _answer(self, plan: Plan, transport: asyncio.Transport) -> None:
        """Answer at once, or begin to."""
        desk = self._desk
        now = monotonic()
        ready = plan.ready
        if ready is None or not ready.kept.is_current or not plan.is_allowed:
            try:
                ready = desk.look_up(plan)
            except ShardmillError:
                ready = None
            if ready is None:
                self._begin(self._open(plan, now))
                return
        kept = ready.kept
        kept.is_used = True
        size = ready.stop - ready.start
        if not ready.is_verified:
            ready.is_verified = kept.is_ready is not None and kept.is_ready(ready.start, ready.stop)
        is_apart = ready.is_framed or size > SMALL
        if is_apart and kept.is_there is not None and not kept.is_there():
            kept.leave()
            self._begin(self._open(plan, now))
            return
        if ready.is_framed or not ready.is_verified:
            self._begin(self._send(plan, ready, now))
            return
        if size > COPIED and (size > SMALL or kept.is_there is None):
            self._answer_from_file(plan, ready, transport, now)
            return
        ready.is_known = kept.is_there is None and plan.made is None
        self._answer_known(plan, ready, transport, now)

    def _answer_known(self, plan: Plan, ready: Ready, transport: asyncio.Transport, now: float) -> None:
        """Answer with what is small and verified, unless the disk would have to be waited for."""
        desk, kept = self._desk, ready.kept
        kept.is_used = True
        body: bytes | memoryview = b""
        size = ready.stop - ready.start
        if size:
            read = desk.read_small(ready)
            if read is None:
                self._begin(self._send(plan, ready, now))
                return
            body = read
        # Behind the reading, so that the bytes are of what stands there.
        if kept.is_there is not None and not kept.is_there():
            kept.leave()
            self._begin(self._open(plan, now))
            return
        request_id = desk.ids.next()
        if ready.error is not None and not plan.is_head:
            body = request_id.join(ready.said)
            size = len(body)
        if size > MIDDLE and not self._is_limited:
            self._limit(transport)
        self._write(transport, desk.head_of(ready, request_id, now), body)
        self._count(plan, ready, request_id, size, now)

    def _answer_from_file(self, plan: Plan, ready: Ready, transport: asyncio.Transport, now: float) -> None:
        """Send the head and as much of the file as the kernel takes; what is left, or not in memory, is waited for."""
        desk, kept, source = self._desk, ready.kept, ready.kept.source
        assert source is not None
        size = ready.stop - ready.start
        may_begin = kept.is_there is None and self._descriptor >= 0 and not transport.get_write_buffer_size()
        first = min(size, SLICE)
        if may_begin and now > ready.resident_until:
            may_begin = desk.residency.has(source.descriptor, ready.start, ready.start + first)
            ready.resident_until = now + STAYS if may_begin else 0.0
        if not may_begin:
            self._begin(self._send(plan, ready, now))
            return
        if not self._is_limited:
            self._limit(transport)
        request_id = desk.ids.next()
        head = desk.head_of(ready, request_id, now)
        if size > TOGETHER and self._socket is not None:
            self._write_ahead(self._socket, transport, head)
        else:
            self._write(transport, head, b"")
        sent = 0
        if not transport.get_write_buffer_size():
            sent = send_now(self._descriptor, source.descriptor, ready.start, first)
        self._written += sent
        if sent == size:
            self._count(plan, ready, request_id, size, now)
            return
        desk.tallies[plan.route].sent += sent
        self._begin(self._send_rest(plan, ready, transport, request_id, sent, now), kept)

    def _write(self, transport: asyncio.Transport, head: bytes, body: bytes | memoryview) -> None:
        """Write what the kernel takes at once, which is all as a rule; the transport keeps the rest."""
        sent = 0
        size = len(head) + len(body)
        if self._descriptor >= 0 and not transport.get_write_buffer_size():
            try:
                sent = os.writev(self._descriptor, (head, body)) if body else os.write(self._descriptor, head)
            except OSError:
                # The transport knows what to do; it finds the same.
                sent = 0
        if sent < size:
            transport.write(b"".join((head, body))[sent:])
        self._written += size

    def _write_ahead(self, sock: socket.socket, transport: asyncio.Transport, head: bytes) -> None:
        """Write what leaves with that which is written next."""
        try:
            sent = sock.send(head, socket.MSG_MORE)
        except OSError:
            sent = 0
        if sent < len(head):
            transport.write(head[sent:])
        self._written += len(head)

    def _count(self, plan: Plan, ready: Ready, request_id: bytes, size: int, began: float) -> None:
        desk, tally = self._desk, self._desk.tallies[plan.route]
        tally.count(ready.status)
        tally.sent += size
        with desk.reading(plan, ready, request_id):
            pass
        self.has_asked = True
        self.waiting_since = began
        if desk.is_verbose or (desk.is_telling and ready.error is not None):
            desk.log(plan, request_id, ready.status, size, monotonic() - began)

    # Answers that wait.

    def _begin(self, work: Coroutine[Any, Any, Ending], held: Kept | None = None) -> None:
        """Wait for the rest of an answer; `held` is leased for as long, from now on."""
        self._work = asyncio.get_running_loop().create_task(work)
        if held is not None:
            held.lease()
            # Not in the coroutine, which is never entered when its task is cancelled at once.
            self._work.add_done_callback(lambda _: held.release())
        self._work.add_done_callback(self._worked)

    def _worked(self, work: "asyncio.Task[Ending]") -> None:
        self._work = None
        self._progress = (0, 0.0)
        self._lobby.finished_one()
        transport = self._transport
        if work.cancelled() or transport is None:
            return
        error = work.exception()
        if error is not None:
            logger.error("unexpected %s", type(error).__name__, exc_info=error)
        if error is not None or work.result() == "closed":
            transport.close()
        elif work.result() == "kept":
            self._go_on()

    async def _open(self, plan: Plan, began: float) -> Ending:
        """Open the object, then answer."""
        try:
            ready = await self._desk.open(plan)
        except ShardmillError:
            ready = None
        if ready is None:
            return self._refuse(plan)
        return await self._send(plan, ready, began)

    def _refuse(self, plan: Plan) -> Ending:
        data, self._pending = plan.head + self._pending, b""
        self._hand_over(data)
        return "handed_over"

    async def _send(self, plan: Plan, ready: Ready, began: float) -> Ending:
        """Answer with bytes that have to be waited for: by the disk, or since they are many."""
        desk, kept, transport = self._desk, ready.kept, self._transport
        if transport is None or not kept.is_current:
            return self._refuse(plan)
        kept.lease()
        request_id = desk.ids.next()
        status, sent = "gone", 0
        why: str | None = None

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            desk.tallies[plan.route].sent += size
            self._written += size

        try:
            try:
                data = await self._first_bytes(plan, ready, request_id)
            except (ShardmillError, OSError):
                data = None
            if data is None:
                status = ""
                return self._refuse(plan)
            head, body = data
            status, why = "cut", "the peer went away"
            transport.write(head + body)
            self._written += len(head)
            count(len(body))
            with desk.reading(plan, ready, request_id):
                if ready.is_framed or ready.stop - ready.start > SMALL:
                    await self._send_large(transport, ready, 0, count)
            waiting = self._room()
            if waiting is not None:
                await waiting
            status, why = ready.status, None
            return "kept"
        except (ShardmillError, OSError) as error:
            why = str(error)
            return "closed"
        except asyncio.CancelledError:
            if sent and sent == ready.stop - ready.start:
                # It has it all, and has left before that was told here.
                status, why = ready.status, None
            raise
        finally:
            kept.release()
            if status:
                desk.tallies[plan.route].count(status)
                desk.log(plan, request_id, status, sent, monotonic() - began, why)
            self.has_asked = True
            self.waiting_since = monotonic()

    async def _send_rest(
        self, plan: Plan, ready: Ready, transport: asyncio.Transport, request_id: bytes, sent: int, began: float
    ) -> Ending:
        """Go on with an answer of which these bytes of the body are sent."""
        desk = self._desk
        status: str = "cut"
        why: str | None = "the peer went away"

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            desk.tallies[plan.route].sent += size
            self._written += size

        try:
            with desk.reading(plan, ready, request_id):
                await self._send_large(transport, ready, sent, count)
            status, why = ready.status, None
            return "kept"
        except (ShardmillError, OSError) as error:
            why = str(error)
            return "closed"
        finally:
            desk.tallies[plan.route].count(status)
            desk.log(plan, request_id, status, sent, monotonic() - began, why)
            self.has_asked = True
            self.waiting_since = monotonic()

    async def _first_bytes(self, plan: Plan, ready: Ready, request_id: bytes) -> tuple[bytes, bytes] | None:
        """Head, and the body of a small answer; None: the object is not the one that was opened."""
        desk, kept, source = self._desk, ready.kept, ready.kept.source
        body = b""
        size = ready.stop - ready.start
        if ready.error is not None and not plan.is_head:
            body = request_id.join(ready.said)
        elif source is not None and 0 < size <= SMALL and not ready.is_framed:
            await source.ensure(ready.start, ready.stop)
            body = await read_whole(desk, source.descriptor, ready.start, ready.stop)
        elif source is not None and size:
            await source.ensure_some(ready.start, min(ready.stop, ready.start + AHEAD))
        if kept.is_there is not None and not kept.is_there():
            kept.leave()
            return None
        return desk.head_of(ready, request_id, monotonic()), body

    async def _send_large(
        self, transport: asyncio.Transport, ready: Ready, sent: int, count: Callable[[int], None]
    ) -> None:
        """Send a body but for its first bytes, which are sent."""
        desk, source = self._desk, ready.kept.source
        assert source is not None
        if not self._is_limited:
            self._limit(transport)
        if _is_encrypted(transport):
            if ready.is_framed:
                await send_framed_blocks(desk, transport, source, ready.stop, self._room, count)
            else:
                await send_blocks(desk, transport, source, (ready.start, ready.stop), self._room, count)
            return
        while transport.get_write_buffer_size():
            if transport.is_closing():
                raise ConnectionResetError("the reader went away")
            await asyncio.sleep(0.005)
        if ready.is_framed:
            with contextlib.closing(FramedBody(desk, transport, source, count)) as framed:
                await framed.send(ready.stop)
            return
        with contextlib.closing(FileBody(desk, transport, source, count)) as body:
            # A file that is only ever replaced needs no last look.
            tail = 0 if ready.kept.is_there is None else TAIL
            await body.send(ready.start + sent, ready.stop, tail=tail)

    def _limit(self, transport: asyncio.Transport) -> None:
        self._is_limited = True
        limit_send_buffer(transport, self._desk.settings.near_send_buffer)
        if not _is_encrypted(transport):
            self._socket = socket.socket(fileno=transport.get_extra_info("socket").fileno())

    def _room(self) -> "asyncio.Future[None] | None":
        """What to await before more is written; None: nothing."""
        if not self._is_full or self._transport is None:
            return None
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_future()
        return self._drained

    def _wake(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)


def _is_encrypted(transport: asyncio.Transport) -> bool:
    return transport.get_extra_info("sslcontext") is not None
