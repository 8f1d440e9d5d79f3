"""A body on its way to a store: measured, and broken off where it is not what was announced."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from shardmill.core.errors import BadRequest


class Feed:
    """The pieces of a body, counted. What goes wrong with it is kept: a library in between has its own words for it."""

    def __init__(self, body: AsyncIterator[bytes | bytearray | memoryview], size: int | None, label: str) -> None:
        self._body = body
        self._size = size
        self._label = label
        self._broken_off = asyncio.get_running_loop().create_future()
        self.taken = 0
        """Bytes so far."""
        self.problem: BaseException | None = None

    async def next(self) -> bytes | None:
        """The next piece, or None at the end.

        Raises:
            BadRequest: It is shorter or longer than announced.
        """
        try:
            try:
                # A sender may use its buffer again.
                piece = bytes(await self._awaited())
            except StopAsyncIteration:
                if self._size is not None and self.taken != self._size:
                    raise BadRequest(f"{self._label}: {self.taken} bytes came of {self._size} announced") from None
                return None
            self.taken += len(piece)
            if self._size is not None and self.taken > self._size:
                raise BadRequest(f"{self._label}: more bytes came than the {self._size} announced")
            return piece
        except BaseException as error:
            self.problem = error
            raise

    def break_off(self) -> None:
        """Fail at the next piece, or now if it is waited for."""
        if not self._broken_off.done():
            self._broken_off.set_result(None)

    async def _awaited(self) -> bytes | bytearray | memoryview:
        """The body's next piece; stands still for no longer than until it is broken off."""
        coming = asyncio.ensure_future(anext(self._body))
        try:
            await asyncio.wait([coming, self._broken_off], return_when=asyncio.FIRST_COMPLETED)
            if self._broken_off.done():
                raise BadRequest(f"{self._label}: its sender went away")
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])

    async def from_start(self, start: bytes) -> AsyncGenerator[bytes, None]:
        """What was taken already, then the rest."""
        yield start
        while (piece := await self.next()) is not None:
            if piece:
                yield piece


async def take_start(feed: Feed, limit: int) -> tuple[bytes, bool]:
    """The first bytes of a body, more than `limit` or all of it, and whether it is all."""
    pieces: list[bytes] = []
    while feed.taken <= limit:
        piece = await feed.next()
        if piece is None:
            return b"".join(pieces), True
        pieces.append(piece)
    return b"".join(pieces), False
