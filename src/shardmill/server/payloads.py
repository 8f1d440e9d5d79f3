"""JSON in and out: bodies read within bounds and decoded strictly, flags of a query, answers."""

import asyncio
import json
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from shardmill.core.errors import BadRequest, TooLarge, UnsupportedMediaType
from shardmill.server.calls import Call
from shardmill.server.intake import receive

BODY = 1 << 20  # bytes of a body that is only names and numbers

_SMALL = 64 << 10  # bytes; decoding more would hold up every other answer

Value = TypeVar("Value")


def json_answer(value: object, *, status: int = 200) -> web.Response:
    """An answer that is of this moment."""
    headers = {"Cache-Control": "no-store"}
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json", headers=headers
    )


def flag_of(query: dict[str, str], name: str) -> bool:
    """A parameter that is `true` or `false`, which it is when left out."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise BadRequest(f"{name}={text!r} is neither true nor false")
    return text == "true"


async def read_body(call: Call, limit: int, limit_name: str, patience: float) -> bytes:
    """A JSON body of at most `limit` bytes."""
    request = call.request
    if "Content-Encoding" in call.headers:
        raise UnsupportedMediaType("send the JSON body without Content-Encoding")
    if (request.content_length or 0) > limit:
        raise TooLarge(f"the body has {request.content_length} bytes; at most {limit} are accepted ({limit_name})")
    await call.invite_body()
    return b"".join([piece async for piece in receive(call, limit=limit, limit_name=limit_name, patience=patience)])


async def decode_body(data: bytes, kind: type[Value], what: str) -> Value:
    """A body as the type that it should be, strictly: no duplicate, unknown or non-finite anything.

    Raises:
        BadRequest: Says what is wrong, and where.
    """
    if len(data) <= _SMALL:
        return _decode(data, kind, what)
    return await asyncio.to_thread(_decode, data, kind, what)


def _decode(data: bytes, kind: type[Value], what: str) -> Value:
    try:
        # msgspec takes the last of duplicate names; a typo in one must not decide what runs.
        json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body is not {what}: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise BadRequest(f"the body is not JSON in UTF-8: {reason}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {name!r} is given twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
