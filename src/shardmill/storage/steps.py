"""Steps that are seen through even when whoever asked for them has left."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


async def finish(work: Coroutine[Any, Any, Value]) -> Value:
    """Await `work` to its end; a cancellation meanwhile is passed on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks it retrieved: its waiter has gone
        raise
