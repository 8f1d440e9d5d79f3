"""Connections with deadlines: a head that trickles, a peer that says nothing, more peers than the node will hold.

aiohttp itself waits for a request's head for ever once its first byte has come.
"""

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from shardmill.config import ServerSettings
from shardmill.core.api import ErrorBody
from shardmill.server.errors import Cut

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # between looks at all connections
_CUT_SECONDS = 0.5  # for answers that only wait to be written


class Connection(RequestHandler):
    """One peer. A request in work has deadlines of its own, so only waiting for heads is watched here."""

    __slots__ = ("_listener", "heard", "is_serving", "waiting_since")

    def __init__(self, listener: "Listener", **options: Any) -> None:
        super().__init__(listener, loop=asyncio.get_running_loop(), **options)
        self._listener = listener
        self.is_serving = False
        self.heard = True
        """A byte came since it began to wait; a new connection owes one from the start."""
        self.waiting_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.waiting_since = asyncio.get_running_loop().time()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self.heard and not self.is_serving:
            self.heard = True
            self.waiting_since = asyncio.get_running_loop().time()
        super().data_received(data)

    def begin(self) -> None:
        """A request is in work."""
        self.is_serving = True

    def finish(self) -> None:
        """It is done; the next one may come."""
        self._listener.finished.set()
        self.is_serving = False
        self.heard = False
        self.waiting_since = asyncio.get_running_loop().time()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the parser refused; or an answer that cannot be finished, whose connection just ends."""
        if isinstance(exc, Cut) or request.writer.output_size > 0:
            raise ConnectionError("the answer was cut")
        reason = " ".join((message or "bad request").split())[:200] if status < 500 else "internal error"
        body = msgspec.json.encode(ErrorBody("bad_request" if status < 500 else "internal", reason, "-"))
        answer = web.Response(status=status, body=body, content_type="application/json")
        answer.force_close()
        return answer


class Listener(web.Server):
    """Makes connections, and ends those that wait too long. Use as an async context manager."""

    def __init__(self, handler: Any, settings: ServerSettings) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            keepalive_timeout=settings.idle_timeout,
            access_log=None,
            auto_decompress=False,
            read_bufsize=1 << 21,
        )
        self._settings = settings
        self._watcher: asyncio.Task[None] | None = None
        self.finished = asyncio.Event()
        """Set whenever a request is done."""

    def __call__(self) -> Connection:
        connections = self._peers()
        if len(connections) >= self._settings.max_connections:
            self._shed(connections)
        return Connection(self, **self._kwargs)

    async def __aenter__(self) -> "Listener":
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])

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
        await self.shutdown(_CUT_SECONDS)

    @property
    def serving(self) -> int:
        """Requests in work."""
        return sum(1 for connection in self._peers() if connection.is_serving)

    def _peers(self) -> list[Connection]:
        return [connection for connection in self.connections if isinstance(connection, Connection)]

    def _shed(self, connections: list[Connection]) -> None:
        """Make room: the one that has waited longest goes."""
        waiting = [connection for connection in connections if not connection.is_serving]
        if waiting:
            _abort(min(waiting, key=lambda connection: connection.waiting_since))
        else:
            logger.warning("%d connections and all at work; raise max_connections", len(connections))
            _abort(connections[0])

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._settings.header_timeout / 4))
            limit = loop.time() - self._settings.header_timeout
            for connection in self._peers():
                if connection.heard and not connection.is_serving and connection.waiting_since < limit:
                    _abort(connection)


def _abort(connection: Connection) -> None:
    if connection.transport is not None:
        connection.transport.abort()
