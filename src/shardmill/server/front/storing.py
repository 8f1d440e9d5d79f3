"""What a connection of the front does with uploads: the half of it that stores."""

import asyncio
from abc import abstractmethod
from collections.abc import Coroutine
from time import monotonic
from typing import Any, Literal

from shardmill.core.errors import ShardmillError
from shardmill.core.sources import PutResult
from shardmill.server.front.desk import Desk
from shardmill.server.front.uploads import LAST, SMALL, Receiver, Upload, answer_of, answer_of_error

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LINGER_SECONDS = 10.0  # a refused upload is read off for so long

Ending = Literal["kept", "closed", "handed_over"]


class StoringConnection(asyncio.BufferedProtocol):
    """Stores what a peer sends; what else a connection is made of is in `connection`."""

    __slots__ = (
        "_descriptor",
        "_desk",
        "_is_storing",
        "_pending",
        "_transport",
        "_written",
        "has_asked",
        "waiting_since",
    )

    _desk: Desk
    _descriptor: int
    _is_storing: bool
    _pending: bytes
    _transport: asyncio.Transport | None
    _written: int
    has_asked: bool
    waiting_since: float

    @abstractmethod
    def _begin(self, work: Coroutine[Any, Any, Ending]) -> None: ...

    @abstractmethod
    def _finished(self) -> None: ...

    @abstractmethod
    def _go_on(self) -> None: ...

    @abstractmethod
    def _hand_over(self, data: bytes) -> None: ...

    @abstractmethod
    def _stop_hearing(self) -> None: ...

    def _begin_upload(self, data: bytes, transport: asyncio.Transport) -> bool:
        """Begin to store what these bytes begin with; False: it is not the front's."""
        uploads = self._desk.uploads
        upload = uploads.next_upload(data) if self._descriptor >= 0 else None
        if upload is None:
            return False
        start, now = len(upload.head), monotonic()
        stop = start + upload.size
        if upload.size > SMALL or stop > len(data) or upload.is_waiting:
            self._stop_hearing()
            self._begin(self._receive(upload, data[start:], transport, now))
            return True
        self._is_storing = True
        whole, self._pending = data[:stop], data[stop:]
        if uploads.store_whole(upload, data[start:stop], lambda result: self._stored(upload, whole, result, now)):
            return True
        self._is_storing, self._pending = False, b""
        return False

    def _stored(self, upload: Upload, whole: bytes, result: PutResult | None, began: float) -> None:
        """A request of which all is here was answered by the store."""
        self._is_storing = False
        self._finished()
        transport, desk = self._transport, self._desk
        if transport is None:
            return
        if result is None:
            data, self._pending = whole + self._pending, b""
            self._hand_over(data)
            return
        request_id = desk.ids.next()
        head, rest = answer_of(result)
        answer = b"".join((head, request_id, rest, desk.clock.end_of_head(monotonic())))
        transport.write(answer)
        self._written += len(answer)
        self._count_upload(upload, request_id, "201" if result.created else "200", upload.size, began)
        self._go_on()

    async def _receive(self, upload: Upload, first: bytes, transport: asyncio.Transport, began: float) -> Ending:
        """Store a body that has to be waited for."""
        desk = self._desk
        rest = b""
        if len(first) > upload.size:
            first, rest = first[: upload.size], first[upload.size :]
        try:
            await desk.uploads.check(upload)
        except ShardmillError:
            data, self._pending = upload.head + first + rest + self._pending, b""
            self._hand_over(data)
            return "handed_over"
        if upload.is_waiting:
            transport.write(CONTINUE)
            self._written += len(CONTINUE)
        self._pending = rest
        request_id, status = desk.ids.next(), "gone"
        receiver = Receiver(self, transport, upload.size, first)
        transport.set_protocol(receiver)
        try:
            result = await desk.uploads.store(upload, receiver)
            status = "201" if result.created else "200"
            head, end = answer_of(result)
            answer = b"".join((head, request_id, end, desk.clock.end_of_head(monotonic())))
            transport.write(answer)
            self._written += len(answer)
        except ShardmillError as error:
            status = str(error.status)
            head, body = answer_of_error(error, request_id.decode())
            answer = b"".join((head, desk.clock.end_of_head(monotonic()), body))
            transport.write(answer)
            self._written += len(answer)
            if not receiver.is_complete:
                await receiver.discard(min(LINGER_SECONDS, desk.settings.body_timeout))
            if not receiver.is_complete or error.status in LAST:
                return "closed"
        finally:
            transport.pause_reading()
            transport.set_protocol(self)
            self._count_upload(upload, request_id, status, receiver.received, began)
        return "kept"

    def _count_upload(self, upload: Upload, request_id: bytes, status: str, received: int, began: float) -> None:
        desk = self._desk
        desk.tallies["o"].count(status)
        desk.tallies["o"].received += received
        self.has_asked = True
        self.waiting_since = monotonic()
        desk.log(upload, request_id, status, 0, self.waiting_since - began)
