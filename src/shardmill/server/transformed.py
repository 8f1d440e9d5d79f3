"""`/t/{provider}/{bucket}/[{dirs}/]{spec}~{file}`: transformed objects, streamed while they are made.

A run that fails midway ends the connection without the final chunk; what was sent until then ends inside a payload. A
finished result is answered like any stored object, and stops as a run does.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from shardmill.core.errors import BadRequest, Conflict, CorruptObject, ServerError, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.paths import parse_transformed_path, render_transformed
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import InFile
from shardmill.core.specs import Spec
from shardmill.node.transforms import TransformedFile, TransformedHead, TransformedStream, Transforms
from shardmill.server.body import Sender, seen_through
from shardmill.server.calls import Call
from shardmill.server.errors import Cut
from shardmill.server.framed import FramedSender
from shardmill.server.objects import UNTRUSTED, content_type, describe_bytes

_NEED_THE_WHOLE = ("Range", "If-Match", "If-Range", "If-Unmodified-Since")
"""Headers that only a finished result can answer to."""


class TransformedFace:
    """Data URLs over `Transforms`.

    Args:
        sender: Of finished results.
        threads: For reading what was spooled.
        send_timeout: Seconds a reader may take no byte.
    """

    def __init__(
        self, transforms: Transforms, sender: Sender, threads: ThreadPoolExecutor, send_timeout: float
    ) -> None:
        self._transforms = transforms
        self._sender = sender
        self._threads = threads
        self._send_timeout = send_timeout

    async def get(self, call: Call) -> web.StreamResponse:
        """GET: the finished result, or a run while it goes on. HEAD starts none."""
        call.query()
        named = parse_transformed_path(call.path)
        ref = named.ref
        if call.method == "HEAD":
            async with self._transforms.head(call.principal, ref, named.spec) as known:
                if isinstance(known, TransformedFile):
                    return await self._answer_file(call, ref, known)
                return transformed_head(ref, known, None)
        try:
            return await self._get(call, ref, named.spec)
        except CorruptObject:
            # A kept result is a copy. Where one turns out wrong before its first byte is sent, it is made again.
            if call.answer is not None:
                raise
            return await self._get(call, ref, named.spec)

    async def _get(self, call: Call, ref: ObjectRef, spec: Spec) -> web.StreamResponse:
        wants_finished = any(name in call.headers for name in _NEED_THE_WHOLE)
        async with self._transforms.open(
            call.principal, ref, spec, request_id=call.id, wants_finished=wants_finished
        ) as made:
            if isinstance(made, TransformedFile):
                return await self._answer_file(call, ref, made)
            return await self._stream(call, ref, made)

    async def _answer_file(self, call: Call, ref: ObjectRef, made: TransformedFile) -> web.StreamResponse:
        meta = made.source.meta

        def head(status: int) -> web.StreamResponse:
            return transformed_head(ref, made.head, meta, status)

        return await self._sender.answer(call, made.source, transformed_label(ref, made.head), head, is_framed=True)

    async def _stream(self, call: Call, ref: ObjectRef, made: TransformedStream) -> web.StreamResponse:
        if call.request.version < (1, 1):
            raise BadRequest("a transformed object is sent in chunks, which HTTP/1.0 does not have; use HTTP/1.1")
        if not made.head.is_stable and _continues(call):
            raise Conflict(
                "each read of this URL is drawn afresh, so it cannot be continued; read it from its start, or give it "
                "a seed"
            )
        await made.reading.start()
        answer = transformed_head(ref, made.head, None)
        answer.enable_chunked_encoding()
        await call.send_head(answer)
        try:
            with FramedSender(call, answer, self._send_timeout) as sender:
                try:
                    while (part := await made.reading.next()) is not None:
                        await sender.write(await self._read(part) if isinstance(part, InFile) else part.data)
                except ShardmillError:
                    # All that may be sent is sent, so that the reader has every sample before the one that failed.
                    await sender.flush()
                    raise
                await sender.finish()
        except (ShardmillError, ConnectionError) as error:
            raise Cut(str(error)) from error
        return answer

    async def _read(self, part: InFile) -> bytes:
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._threads, os.pread, part.descriptor, part.stop - part.start, part.start)
        data = await seen_through(reading)
        if len(data) != part.stop - part.start:
            raise ServerError("what was spooled cannot be read")
        return data


def _continues(call: Call) -> bool:
    """Whether what is asked for is the rest of what was read before, without a way to tell that it is not.

    A 200 would be right, but GNU wget takes it for the same bytes again and leaves out as many as it has.
    """
    wanted = ByteRange.parse(call.headers.get("Range"))
    return wanted is not None and bool(wanted.start) and wanted.stop is None and "If-Range" not in call.headers


def transformed_label(ref: ObjectRef, head: TransformedHead) -> str:
    """Names a finished result in errors."""
    return f"{head.spec}~{ref}"


def transformed_head(
    ref: ObjectRef, head: TransformedHead, meta: ObjectMeta | None, status: int = 200
) -> web.StreamResponse:
    """An answer with headers; `meta` is that of the finished result, if there is one."""
    answer = web.StreamResponse(status=status, headers=UNTRUSTED)
    answer.headers["Content-Type"] = "application/x-tar" if head.is_shard else content_type(ref.key)
    answer.headers["Accept-Ranges"] = "none" if meta is None else "bytes"
    answer.headers["Shardmill-Transform"] = str(Spec(head.spec.name, head.spec.digest, args=head.spec.args))
    if meta is not None:
        describe_bytes(answer, meta)
    if head.run is not None:
        answer.headers["Shardmill-Run"] = head.run
    if head.origin is not None:
        answer.headers["Shardmill-Origin"] = head.origin
    if head.seed is not None:
        answer.headers["Shardmill-Seed"] = str(head.seed)
    if head.is_bare:
        answer.headers["Content-Location"] = render_transformed(ref, head.spec)
    answer.headers["Cache-Control"] = "no-cache" if head.is_stable else "no-store"
    return answer
