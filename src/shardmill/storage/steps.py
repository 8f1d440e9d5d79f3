"""Steps that are seen through even when whoever asked for them has left."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


async def finish(work: Awaitable[Value]) -> Value:
    """Await `work` to its end; a cancellation meanwhile is passed on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _end(task)
        raise


async def opened(opening: asyncio.Future[Value], close: Callable[[Value], None]) -> Value:
    """Await what a thread opens; when whoever asked leaves meanwhile, it is closed again."""
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        if await _end(opening):
            close(opening.result())
        raise


async def _end(work: asyncio.Future[Any]) -> bool:
    """Wait for the end of work, whatever it is; True: it has a result."""
    while not work.done():
        # Whoever is stopped may be told so more than once.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    return not work.cancelled() and work.exception() is None
