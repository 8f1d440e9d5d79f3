"""Steps that are seen through even when whoever asked for them has left."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Value = TypeVar("Value")


async def finish(work: Awaitable[Value]) -> Value:
    """Await `work` to its end; a cancellation meanwhile is passed on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks it retrieved: its waiter has gone
        raise


async def opened(opening: asyncio.Future[Value], close: Callable[[Value], None]) -> Value:
    """Await what a thread opens; when whoever asked leaves meanwhile, it is closed again."""
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if opening.exception() is None:
            close(opening.result())
        raise
