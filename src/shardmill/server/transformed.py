"""`/t/{provider}/{bucket}/[{dirs}/]{spec}~{file}`: transformed objects, streamed while they are made.

A run that fails midway ends the connection without the final chunk; what was sent until then ends inside a payload.
"""

import asyncio
import sys

from aiohttp import web

from shardmill.core.errors import BadRequest, ShardmillError
from shardmill.core.paths import parse_transformed_path, render_transformed
from shardmill.core.refs import ObjectRef
from shardmill.node.transforms import TransformedHead, Transforms
from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.objects import UNTRUSTED

SLICE = 1 << 20  # bytes that a reader must take within `send_timeout`

# From 3.12 on transports keep the buffer they are given; its memory is used again once the next chunk is asked for.
_COPIES = sys.version_info >= (3, 12)


class TransformedFace:
    """Data URLs over `Transforms`."""

    def __init__(self, transforms: Transforms, send_timeout: float) -> None:
        self._transforms = transforms
        self._send_timeout = send_timeout

    async def get(self, call: Call) -> web.StreamResponse:
        """GET: a fresh run; Range is ignored, since the length is not known. HEAD starts none."""
        call.query()
        named = parse_transformed_path(call.path)
        if call.method == "HEAD":
            head = await self._transforms.head(call.principal, named.ref, named.spec)
            return _head_of(named.ref, head)
        if call.request.version < (1, 1):
            raise BadRequest("a transformed object is sent in chunks, which HTTP/1.0 does not have; use HTTP/1.1")
        async with self._transforms.open(call.principal, named.ref, named.spec, request_id=call.id) as made:
            await made.start()
            answer = _head_of(named.ref, made.head)
            answer.enable_chunked_encoding()
            await call.send_head(answer)
            try:
                async for chunk in made:
                    await self._write(call, answer, memoryview(chunk))
                await answer.write_eof()
            except (ShardmillError, ConnectionError, TimeoutError) as error:
                raise Cut(str(error)) from error
            return answer

    async def _write(self, call: Call, answer: web.StreamResponse, chunk: memoryview) -> None:
        for start in range(0, len(chunk), SLICE):
            piece = chunk[start : start + SLICE]
            async with asyncio.timeout(self._send_timeout):
                await answer.write(bytes(piece) if _COPIES else piece)
            call.sent += len(piece)


def _head_of(ref: ObjectRef, head: TransformedHead) -> web.StreamResponse:
    answer = web.StreamResponse(headers=UNTRUSTED)
    answer.headers["Content-Type"] = "application/x-tar"
    answer.headers["Accept-Ranges"] = "none"
    answer.headers["Shardmill-Transform"] = f"{head.spec.name}@{head.spec.digest}"
    if head.run is not None:
        answer.headers["Shardmill-Run"] = head.run
    if head.seed is not None:
        answer.headers["Shardmill-Seed"] = str(head.seed)
    if head.bare:
        answer.headers["Content-Location"] = render_transformed(ref, head.spec)
    answer.headers["Cache-Control"] = "no-store" if head.spec.seed is None else "no-cache"
    return answer
