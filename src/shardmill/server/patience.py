"""How long a reader may take nothing.

That there is room in the kernel's buffer is told only when a third of it is free, so a slow reader is told from one
that has stalled by what it has acknowledged.
"""

import array
import asyncio
import fcntl
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shardmill.server.errors import Stalled


@asynccontextmanager
async def patience_with_reader(transport: asyncio.BaseTransport | None, seconds: float) -> AsyncIterator[None]:
    """Raises Stalled when what is done inside goes on, and the reader has not taken a byte for `seconds`."""
    loop = asyncio.get_running_loop()
    untaken = count_untaken(transport)
    next_look: asyncio.TimerHandle

    def look() -> None:
        nonlocal next_look, untaken
        now = count_untaken(transport)
        if now < untaken:
            untaken = now
            next_look = loop.call_later(seconds, look)
        else:
            deadline.reschedule(loop.time())

    next_look = loop.call_later(seconds, look)
    try:
        async with asyncio.timeout(None) as deadline:
            yield
    except TimeoutError:
        raise Stalled(f"the reader took nothing for {seconds:g} s") from None
    finally:
        next_look.cancel()


def count_untaken(transport: asyncio.BaseTransport | None) -> int:
    """Bytes that were written and that the peer's machine has not acknowledged."""
    if not isinstance(transport, asyncio.Transport):
        return 0
    descriptor = transport.get_extra_info("socket").fileno()
    if descriptor < 0:  # it is closed, and whoever answered its peer is not through yet
        return 0
    queued = array.array("i", [0])
    try:
        fcntl.ioctl(descriptor, termios.TIOCOUTQ, queued)
    except OSError:
        return 0
    return queued[0] + transport.get_write_buffer_size()
