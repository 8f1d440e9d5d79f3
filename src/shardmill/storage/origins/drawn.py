"""A long body of a plain HTTP answer, received by threads into one buffer, once aiohttp has had the answer's head.

Received on the loop, a gigabyte is some thousands of objects of Python, each with a timer, and copied once more; what
is to be done with the bytes is done here where they are received. A thread is held only while bytes come.
"""

import asyncio
import os
import select
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

import aiohttp

from shardmill.core.errors import BackendTimeout, BackendUnavailable
from shardmill.core.origins import InThread
from shardmill.storage.steps import finish

BUFFER = 1 << 20  # bytes; a file system writes a whole buffer with less work than its parts
WORTH = 2 << 20  # bytes still to come; less is received where the head was, and the connection used again

_MOMENT = 0.005  # seconds that a thread waits for more
_VISIT = 0.02  # seconds at most that a body which comes slowly holds a thread
_SLOW = 256 << 10  # bytes; a visit that brought less waits on the loop before the next


class DrawnBody:
    """Use `DrawnBody.take`. Resources: `close`, which ends the connection.

    Args:
        descriptor: Of a socket that does not block.
        came: What was read of the body before.
        left: Bytes of the body that follow.
        start: Where the first byte lies in the object.
        label: Names the object in errors.
        idle_seconds: It may bring nothing for so long.
    """

    def __init__(self, descriptor: int, came: bytes, left: int, *, start: int, label: str, idle_seconds: float) -> None:
        self.left = len(came) + left
        """Bytes of it that were not given."""
        self._descriptor = descriptor
        self._came = came
        self._position = start
        self._label = label
        self._idle_seconds = idle_seconds
        self._buffer = memoryview(bytearray(BUFFER))
        self._is_begun = False
        self._is_slow = False

    @classmethod
    def take(
        cls, answer: aiohttp.ClientResponse, size: int, *, start: int, label: str, idle_seconds: float
    ) -> "DrawnBody | None":
        """The first `size` bytes of a body of which nothing was read; None: it has to be read as it is.

        The answer is closed in the former case, and untouched in the latter.
        """
        transport = None if answer.connection is None else answer.connection.transport
        content = answer.content
        length = answer.content_length
        if transport is None or transport.get_extra_info("sslcontext") is not None or content.exception() is not None:
            return None
        if length is None or "Transfer-Encoding" in answer.headers or not 0 < size <= length:
            return None
        # What is more than a buffer's worth may be held back inside, half parsed.
        if size - content.total_bytes < WORTH or content.total_bytes > BUFFER:
            return None
        came = []
        while piece := content.read_nowait():
            came.append(piece)
        transport.pause_reading()
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        answer.close()
        first = b"".join(came)
        return cls(descriptor, first, size - len(first), start=start, label=label, idle_seconds=idle_seconds)

    async def draw(self, give: Callable[[memoryview], None], most: int, in_thread: InThread) -> int:
        """Receive some of it in a thread, which gives each piece to `give`, valid during the call.

        Args:
            give: Its errors are raised.
            most: Bytes, about; less come where the server is slower than that.

        Returns:
            Bytes given; 0: that was all.

        Raises:
            BackendUnavailable: It broke off or stalled; nothing was given in this call.
        """
        while self.left:
            if self._is_slow:
                await self._wait()
            given = await finish(in_thread(self._draw, give, most))
            if given:
                return given
        return 0

    async def pieces(self) -> AsyncGenerator[memoryview, None]:
        """All of it; copied, so that pieces are valid for as long as kept."""
        loop = asyncio.get_running_loop()
        found: list[bytes] = []
        while await self.draw(lambda piece: found.append(bytes(piece)), BUFFER, partial(loop.run_in_executor, None)):
            for piece in found:
                yield memoryview(piece)
            found.clear()

    def close(self) -> None:
        os.close(self._descriptor)

    async def _wait(self) -> None:
        """Return when something has come, with a moment more for others to follow."""
        loop = asyncio.get_running_loop()
        came: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._descriptor, lambda: None if came.done() else came.set_result(None))
        try:
            async with asyncio.timeout(self._idle_seconds):
                await came
        except TimeoutError:
            raise BackendTimeout(f"{self._label}: the server stalled") from None
        finally:
            loop.remove_reader(self._descriptor)
        if self._is_begun:
            await asyncio.sleep(_MOMENT)

    def _draw(self, give: Callable[[memoryview], None], most: int) -> int:
        """Blocking; 0: nothing has come yet."""
        if self._came:
            first, self._came = memoryview(self._came), b""
            self._is_begun = True
            return self._give(give, first)
        given, until = 0, time.monotonic() + _VISIT
        is_first, is_more = not self._is_begun, True
        while self.left and given < most and is_more:
            try:
                count, is_more = self._fill(until)
            except BackendUnavailable:
                if given:
                    break  # it shows again with the next call
                raise
            if count:
                given += self._give(give, self._buffer[:count])
                self._is_begun = True
        # Behind the first bytes, which nobody is let wait for, the others are about to come.
        self._is_slow = given < min(_SLOW, most) and not (is_first and given)
        return given

    def _give(self, give: Callable[[memoryview], None], piece: memoryview) -> int:
        give(piece)
        self._position += len(piece)
        self.left -= len(piece)
        return len(piece)

    def _fill(self, until: float) -> tuple[int, bool]:
        """Fill the buffer to the next multiple of its size in the object; returns bytes, and False: no more now."""
        stop = min(BUFFER - self._position % BUFFER, self.left, len(self._buffer))
        filled = 0
        poller: select.poll | None = None
        while filled < stop:
            try:
                count = os.readv(self._descriptor, [self._buffer[filled:stop]])
            except BlockingIOError:
                if poller is None:
                    poller = select.poll()
                    poller.register(self._descriptor, select.POLLIN)
                if time.monotonic() > until or not poller.poll(_MOMENT * 1000):
                    return filled, False
                continue
            except OSError:
                count = 0
            if not count:
                if filled:
                    return filled, False  # it shows again with the next call
                raise BackendUnavailable(f"{self._label}: the server broke off")
            filled += count
            if not self._is_begun:
                return filled, False
        return filled, True
