"""Bodies of requests: with a limit, a deadline for the next byte, and a least rate for all of them."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError

from shardmill.core.errors import BadRequest, RequestTimeout, TooLarge
from shardmill.server.calls import Call

LEAST_RATE = 1 << 10  # bytes a second; a slower sender is one that only keeps the connection and a file open


def check_framing(call: Call) -> None:
    """Refuse a body in another coding than chunks: stored as it comes it would not be what was meant (RFC 9112 §6.1).

    Raises:
        BadRequest: The connection has to be closed behind the answer.
    """
    coding = call.headers.get("Transfer-Encoding")
    if coding is None:
        return
    if coding.strip().lower() != "chunked" or call.request.version < HttpVersion11:
        call.is_broken = True
        raise BadRequest("the only transfer coding known here is chunked, in HTTP/1.1")


async def receive(call: Call, *, limit: int, limit_name: str, patience: float) -> AsyncIterator[bytes]:
    """The body as it comes.

    Args:
        limit: Bytes.
        limit_name: Of the setting, for people.
        patience: Seconds without a byte; and seconds in all beyond those that the bytes take at `LEAST_RATE`. Time in
            which nobody asks for more is not counted.

    Raises:
        TooLarge, RequestTimeout, BadRequest: It is too long, too slow, or not framed as announced. The connection has
            to be closed behind the answer.
    """
    loop = asyncio.get_running_loop()
    waited = 0.0
    while True:
        asked = loop.time()
        try:
            async with asyncio.timeout(min(patience, patience + call.received / LEAST_RATE - waited)):
                data = await call.request.content.readany()
        except TimeoutError:
            raise RequestTimeout(
                f"the body stopped or came too slowly: {call.received} bytes, and the next were waited for in vain "
                f"(body_timeout is {patience:g} s)"
            ) from None
        except (web.RequestPayloadError, ClientPayloadError, HttpProcessingError, ConnectionError):
            call.is_broken = True
            raise BadRequest("the body is not what its headers announce") from None
        waited += loop.time() - asked
        if not data:
            return
        call.received += len(data)
        if call.received > limit:
            raise TooLarge(f"the body has more than {limit} bytes ({limit_name})")
        yield data
