"""Blocking steps that are seen through though whoever asked for them has left: what they use is not pulled away."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def see_through(step: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run a blocking step to its end, however often the waiting is cancelled; only then be cancelled."""
    task = asyncio.ensure_future(asyncio.to_thread(step, *arguments, **options))
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        task.exception()
        raise asyncio.CancelledError
    return task.result()
