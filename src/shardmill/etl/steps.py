"""Steps that are seen through though whoever asked for them has left: what they use or end is not forgotten."""

import asyncio
from collections.abc import Callable, Iterable
from typing import ParamSpec, Protocol, TypeVar

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


class Closable(Protocol):
    """What is ended by `close`, at once where that is cancelled."""

    async def close(self) -> None: ...


async def close_all(parts: Iterable[Closable]) -> None:
    """Close each of them, whatever becomes of the others or of the waiting; the first error is raised at the end."""
    first: BaseException | None = None
    for part in parts:
        try:
            await part.close()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
