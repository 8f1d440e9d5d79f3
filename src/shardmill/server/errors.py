"""Errors as answers: one JSON body for all, and nothing of the server's own inside."""

import logging

import msgspec
from aiohttp import web

from shardmill.core.api import ErrorBody
from shardmill.core.errors import ServerError, ShardmillError

logger = logging.getLogger(__name__)


class Cut(Exception):
    """The answer failed after its head was sent: the connection ends without a clean end of the body."""


class Stalled(Cut):
    """The reader takes nothing any more, so nothing that is still to be sent would ever leave."""


def error_body(error: ShardmillError, request_id: str) -> ErrorBody:
    """What the wire says of an error."""
    return ErrorBody(
        error.code, _sendable(error.message), request_id, _sendable(error.traceback) if error.traceback else None
    )


def error_answer(error: ShardmillError, request_id: str) -> web.Response:
    """The answer to a request that failed before its first byte."""
    headers = {"Cache-Control": "no-store"}
    if error.status == 503:
        headers["Retry-After"] = str(error.retry_after or 1)
    if error.size is not None:
        headers["Content-Range"] = f"bytes */{error.size}"
    body = msgspec.json.encode(error_body(error, request_id))
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def unexpected(error: Exception) -> ShardmillError:
    """What a defect is told as; its story is in the log alone."""
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ServerError("internal error; the node's log has the request id")


def _sendable(text: str) -> str:
    """Names that are not UTF-8 come from tar headers; on the wire they are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
