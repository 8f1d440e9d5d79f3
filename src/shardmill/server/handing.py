"""Handing bytes to a reader that may be slow, stalled or gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from shardmill.server.calls import Call
from shardmill.server.errors import Cut, Stalled


async def hand_on(call: Call, answer: web.StreamResponse, data: bytes | memoryview, seconds: float) -> None:
    """Write a piece of a body.

    Raises:
        Cut: The reader went away.
        Stalled: It took nothing for `seconds`.
    """
    try:
        async with patience_with_reader(seconds):
            await answer.write(data)
    except ConnectionError as error:
        raise Cut("the reader went away") from error
    call.sent += len(data)


@asynccontextmanager
async def patience_with_reader(seconds: float) -> AsyncIterator[None]:
    """Raises Stalled when what is done inside takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Stalled(f"the reader took nothing for {seconds:g} s") from None
