"""Connections with deadlines: a head that trickles, a peer that says nothing, one that takes nothing, too many of them.

aiohttp itself waits for a request's head for ever once its first byte has come, closes a connection only when the peer
has taken all that was written, and does not tell a body's reader what its parser found wrong.
"""

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMethod, BadStatusLine, InvalidURLError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from shardmill.config import ServerSettings
from shardmill.core.errors import BadRequest, MethodNotAllowed, ServerError, ShardmillError
from shardmill.server.errors import Cut, Stalled, error_answer
from shardmill.server.front.connection import FrontConnection
from shardmill.server.front.desk import Desk
from shardmill.server.front.storing import Ending
from shardmill.server.patience import count_untaken

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # between looks at all connections
_CUT_SECONDS = 0.5  # for answers that only wait to be written
_KEEP_SECONDS = 2.0  # what is kept open is closed when nobody asked for it between two looks
_LINGER_SECONDS = 10.0  # a refused upload is read off for so long
_FIRST_BYTES = 256  # of what came last, to see whether it was a request

_REQUEST_LINE = re.compile(rb"[!-~]{1,32} [!-~]+ HTTP/1\.[01]\r\n")


class Connection(RequestHandler):
    """One peer. A request in work has deadlines of its own, so only waiting for heads is watched here."""

    __slots__ = ("_closing", "_first", "_is_ended", "_listener", "_peer", "_serving", "heard", "waiting_since")

    def __init__(self, listener: "Listener", **options: Any) -> None:
        super().__init__(listener, loop=asyncio.get_running_loop(), **options)
        self._listener = listener
        self._serving: web.BaseRequest | None = None
        self._peer: asyncio.Transport | None = None
        self._first = b""
        self._is_ended = False
        """The peer sends nothing more."""
        self.heard = True
        """A byte came since it began to wait; a new connection owes one from the start."""
        self.waiting_since = 0.0
        self._closing = (0, 0.0)
        """While it closes: what the peer has not taken yet, and since when it takes nothing."""

    @property
    def is_serving(self) -> bool:
        """A request is in work."""
        return self._serving is not None

    @property
    def is_closing(self) -> bool:
        """It ends when the peer has taken what was written."""
        return self._peer is not None and self._peer.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._peer = transport
        self.waiting_since = asyncio.get_running_loop().time()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._peer is not None and self._is_between_requests() and self._listener.take_back(self, self._peer, data):
            return
        if not self.heard and not self.is_serving:
            self.heard = True
            self.waiting_since = asyncio.get_running_loop().time()
        self._first = data[:_FIRST_BYTES]
        super().data_received(data)
        self._tell_what_is_wrong()

    def begin(self, request: web.BaseRequest) -> None:
        """A request is in work."""
        self._serving = request
        self._tell_what_is_wrong()

    def finish(self) -> None:
        """It is done; the next one may come."""
        self._listener.finished.set()
        self._serving = None
        self.heard = False
        self.waiting_since = asyncio.get_running_loop().time()
        if self._is_ended and not self._messages:
            self.close()

    def end(self) -> None:
        """The peer sends nothing more; what it asked for is all that it gets."""
        self._is_ended = True
        if not self._messages and not self.is_serving and self._peer is not None:
            self._peer.close()

    def _is_between_requests(self) -> bool:
        """It has answered and has heard nothing since."""
        is_idle = self._waiter is not None and not self._messages and not self.heard and not self.is_serving
        return is_idle and not (self._force_close or self._close or self.is_closing or self.writing_paused)

    def leave(self) -> None:
        """Forget the peer, whom another protocol goes on with."""
        self._peer = None
        # Else it would be closed.
        self.transport = None
        self.connection_lost(None)

    def last_taken(self, now: float) -> float:
        """When the peer of a closing connection was last seen to take something; to be asked now and then."""
        known, since = self._closing
        untaken = count_untaken(self._peer)
        if not since or untaken < known:
            self._closing = (untaken, now)
        return self._closing[1]

    def abort(self) -> None:
        """End it now, whatever the peer has not taken."""
        if self._peer is not None:
            self._peer.abort()

    def _tell_what_is_wrong(self) -> None:
        """What the parser could not go on with, while a body is read, is that body's."""
        request = self._serving
        if request is None or request.content.is_eof() or not self._messages:
            return
        if not isinstance(self._messages[-1][0], RawRequestMessage):
            request.content.set_exception(web.RequestPayloadError("the body is malformed"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the parser refused; or an answer that cannot be finished, whose connection just ends."""
        if isinstance(exc, Stalled):
            self.abort()
        if isinstance(exc, Cut) or request.writer.output_size > 0:
            raise ConnectionError("the answer was cut")
        error: ShardmillError = ServerError("internal error")
        if isinstance(exc, BadHttpMethod) and _REQUEST_LINE.match(self._first):
            error = MethodNotAllowed(f"this method is not known here; {', '.join(self._listener.methods)} are")
        elif status < 500:
            error = BadRequest(_reason(exc, message or "bad request"))
        request_id = secrets.token_hex(8)
        self._listener.on_refused(request_id, error.status, error.message)
        answer = error_answer(error, request_id)
        if isinstance(error, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(self._listener.methods)
        answer.headers["Shardmill-Request-Id"] = request_id
        answer.headers["Server"] = "shardmill"
        answer.force_close()
        return answer


def _reason(exc: BaseException | None, message: str) -> str:
    """What the parser says, without a byte of what was sent: that may be a secret."""
    if isinstance(exc, BadStatusLine):
        return "the request line is malformed"
    if isinstance(exc, InvalidURLError):
        return "the request target is malformed"
    if isinstance(exc, LineTooLong):
        return "a line of the request's head is too long"
    return re.split(r"[:\n]", message)[0]


class Listener(web.Server):
    """Makes connections, and ends those that wait too long. Use as an async context manager.

    Args:
        handler: Answers requests.
        settings: Deadlines and the most connections.
        methods: That any path has, for who asks with another.
        on_refused: Told request id, status and reason of what was not even a request.
        desk: Of the front, which answers plain reads; None: there is none.
    """

    def __init__(
        self,
        handler: Any,
        settings: ServerSettings,
        *,
        methods: Sequence[str],
        on_refused: Callable[[str, int, str], None],
        desk: Desk | None,
    ) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            keepalive_timeout=settings.idle_timeout,
            access_log=None,
            auto_decompress=False,
            read_bufsize=1 << 21,
            # To read off the rest of a body behind its refusal, so that the refusal is seen.
            lingering_time=min(_LINGER_SECONDS, settings.body_timeout),
        )
        self.methods = methods
        self.on_refused = on_refused
        self._settings = settings
        self._watcher: asyncio.Task[None] | None = None
        self._desk = desk
        self._fronts: set[FrontConnection] = set()
        self._ending: set[asyncio.Task[Ending]] = set()
        """What still gives back what it held for a peer that has left."""
        self.finished = asyncio.Event()
        """Set whenever a request is done."""

    def accept(self) -> asyncio.BaseProtocol:
        """What speaks to one more peer."""
        peers = self._peers()
        if len(peers) + len(self._fronts) >= self._settings.max_connections:
            self._shed(peers)
        return Connection(self, **self._kwargs) if self._desk is None else FrontConnection(self, self._desk)

    # What connections of the front tell.

    def arrived(self, connection: FrontConnection) -> None:
        self._fronts.add(connection)

    def left(self, connection: FrontConnection, work: "asyncio.Task[Ending] | None") -> None:
        self._fronts.discard(connection)
        if work is not None:
            self._ending.add(work)
            work.add_done_callback(self._ending.discard)

    def finished_one(self) -> None:
        self.finished.set()

    def hand_over(self, connection: FrontConnection, transport: asyncio.Transport, data: bytes) -> None:
        """aiohttp goes on with it."""
        self._fronts.discard(connection)
        other = Connection(self, **self._kwargs)
        self._go_on(other, transport, data)
        if connection.is_ended:
            other.end()

    def take_back(self, connection: Connection, transport: asyncio.Transport, data: bytes) -> bool:
        """The front goes on with a connection that begins to ask for plain reads; False: it does not."""
        desk = self._desk
        if desk is None or (desk.next_plan(data, 0) is None and desk.uploads.next_upload(data) is None):
            return False
        connection.leave()
        self._go_on(FrontConnection(self, desk), transport, data)
        return True

    @staticmethod
    def _go_on(protocol: Connection | FrontConnection, transport: asyncio.Transport, data: bytes) -> None:
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(data)

    async def __aenter__(self) -> "Listener":
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        if self._desk is not None:
            self._desk.close()

    async def wait_idle(self, seconds: float) -> None:
        """Return when no request is in work, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.serving:
                    self.finished.clear()
                    await self.finished.wait()

    async def cut(self) -> None:
        """End every connection; bodies that are not finished end without a clean end."""
        self.pre_shutdown()
        stopping = [asyncio.ensure_future(connection.stop()) for connection in self._fronts]
        await self.shutdown(_CUT_SECONDS)
        if waiting := [*stopping, *self._ending]:
            await asyncio.wait(waiting)

    @property
    def serving(self) -> int:
        """Requests in work."""
        everyone: list[Connection | FrontConnection] = [*self._peers(), *self._fronts]
        return sum(1 for connection in everyone if connection.is_serving)

    def _peers(self) -> list[Connection]:
        return [connection for connection in self.connections if isinstance(connection, Connection)]

    def _shed(self, connections: list[Connection]) -> None:
        """Make room: the one that has waited longest goes."""
        everyone: list[Connection | FrontConnection] = [*connections, *self._fronts]
        waiting = [connection for connection in everyone if not connection.is_serving]
        if waiting:
            min(waiting, key=lambda connection: connection.waiting_since).abort()
        else:
            logger.warning("%d connections and all at work; raise max_connections", len(everyone))
            everyone[0].abort()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        next_sweep = 0.0
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._settings.header_timeout / 4))
            now = loop.time()
            for connection in self._peers():
                if self._is_overdue(connection, now):
                    connection.abort()
            for front in [front for front in self._fronts if front.is_overdue(now)]:
                front.abort()
            if self._desk is not None and now >= next_sweep:
                next_sweep = now + _KEEP_SECONDS
                self._desk.close_unused()

    def _is_overdue(self, connection: Connection, now: float) -> bool:
        """It owes a head for too long, or has not taken the end of what it was sent."""
        if connection.is_closing:
            return now - connection.last_taken(now) > self._settings.send_timeout
        owes_head = connection.heard and not connection.is_serving
        return owes_head and now - connection.waiting_since > self._settings.header_timeout
