"""Handing bytes to a reader that may be slow, stalled or gone."""

from aiohttp import web

from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.patience import patience_with_reader


async def hand_on(call: Call, answer: web.StreamResponse, data: bytes | memoryview, seconds: float) -> None:
    """Write a piece of a body.

    Raises:
        Cut: The reader went away.
        Stalled: It took nothing for `seconds`.
    """
    try:
        async with patience_with_reader(call.request.transport, seconds):
            await answer.write(data)
    except ConnectionError as error:
        raise Cut("the reader went away") from error
    call.sent += len(data)
