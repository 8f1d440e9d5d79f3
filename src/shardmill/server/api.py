"""`/api`: buckets, listings, transforms, failures, configuration, as JSON. Wire types are those of `core.api`."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
from aiohttp import web

from shardmill.core.api import (
    Announcement,
    Buckets,
    CopyRequest,
    EnvironmentList,
    MemberInfo,
    MemberPage,
    ObjectInfo,
    ObjectPage,
    PipelineRequest,
    SampleCounts,
    ShardNames,
    TransformInfo,
    TransformRequest,
    Transforms,
)
from shardmill.core.errors import BadRequest, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.paths import TransformedRef, parse_object_path, parse_transformed_path
from shardmill.core.refs import Bucket, ObjectRef, unquote_path
from shardmill.core.specs import Spec
from shardmill.node.node import Node
from shardmill.node.objects import MAX_PAGE
from shardmill.node.results import ResultFilter
from shardmill.server.calls import Call
from shardmill.server.errors import error_body, unexpected
from shardmill.server.handing import hand_on
from shardmill.server.openapi import document
from shardmill.server.payloads import BODY, decode_body, flag_of, json_answer, read_body

_ANNOUNCEMENT = 16 << 20  # bytes
_LINES = "application/x-ndjson"


class _Registration(Protocol):
    """Registers something; says what takes long."""

    async def __call__(self, *, progress: Callable[[str], None]) -> tuple[TransformInfo, bool]: ...


class Api:
    """Handlers of the JSON API."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._objects = node.objects
        self._transforms = node.transforms

    async def buckets(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(Buckets(list(self._objects.buckets(call.principal))))

    async def create_bucket(self, call: Call) -> web.StreamResponse:
        call.query()
        await self._objects.create_bucket(call.principal, _bucket(call))
        return web.Response(status=201)

    async def remove_bucket(self, call: Call) -> web.StreamResponse:
        force = flag_of(call.query("force"), "force")
        await self._objects.remove_bucket(call.principal, _bucket(call), force=force)
        return web.Response(status=204)

    async def objects(self, call: Call) -> web.StreamResponse:
        query = call.query("bucket", "prefix", "delimiter", "after", "limit", "stale")
        if "bucket" not in query:
            raise BadRequest("the parameter bucket is missing, e.g. /api/objects?bucket=ais://name")
        look = self._objects.list_known if flag_of(query, "stale") else self._objects.list
        bucket = Bucket.parse(query["bucket"])
        page = await look(
            call.principal,
            bucket,
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            after=query.get("after", ""),
            limit=_limit(query.get("limit")),
        )
        cached = self._objects.cached_bytes(call.principal, bucket, page.objects)
        infos = [_info(meta, there) for meta, there in zip(page.objects, cached, strict=True)]
        is_stale = page.stale is not None
        return json_answer(ObjectPage(infos, list(page.prefixes), page.next, is_stale, page.is_complete, page.stale))

    async def copy(self, call: Call) -> web.StreamResponse:
        """201 new, 200 replaced."""
        call.query()
        body = await read_body(call, BODY, "a copy", self._node.config.server.body_timeout)
        wanted = await decode_body(body, CopyRequest, "a copy")
        source, target = ObjectRef.parse(wanted.source), ObjectRef.parse(wanted.destination)
        result = await self._node.copies.copy(call.principal, source, target, if_absent=wanted.if_absent)
        return json_answer(_info(result.meta, None), status=201 if result.created else 200)

    async def cache(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(self._node.cache.describe(call.principal))

    async def cached_objects(self, call: Call) -> web.StreamResponse:
        query = call.query("bucket", "prefix", "after", "limit")
        if "bucket" not in query:
            raise BadRequest("the parameter bucket is missing, e.g. /api/cache/objects?bucket=gs://name")
        page = await self._node.cache.list(
            call.principal,
            Bucket.parse(query["bucket"]),
            prefix=query.get("prefix", ""),
            after=query.get("after", ""),
            limit=_limit(query.get("limit")),
        )
        return json_answer(page)

    async def cached_object(self, call: Call) -> web.StreamResponse:
        query = call.query("object")
        if "object" not in query:
            raise BadRequest("the parameter object is missing, e.g. /api/cache/object?object=gs://name/shard.tar")
        return json_answer(self._node.cache.get(call.principal, ObjectRef.parse(query["object"])))

    async def members(self, call: Call) -> web.StreamResponse:
        query = call.query("object", "after", "limit")
        if "object" not in query:
            raise BadRequest("the parameter object is missing, e.g. /api/members?object=ais://name/shard.tar")
        ref = ObjectRef.parse(query["object"])
        after = _whole(query.get("after") or "0", "after")
        limit = _limit(query.get("limit"))
        page = await self._node.shards.members(call.principal, ref, after=after, limit=limit)
        stop = after + len(page.members)
        infos = [MemberInfo(found.name.decode("utf-8", "replace"), found.offset, found.size) for found in page.members]
        return json_answer(MemberPage(infos, page.total, page.meta.etag, str(stop) if stop < page.total else None))

    async def transforms(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(Transforms(self._transforms.list(call.principal)))

    async def transform(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(self._transforms.get(call.principal, *_named(call)))

    async def remove_transform(self, call: Call) -> web.StreamResponse:
        call.query()
        await self._transforms.remove(call.principal, *_named(call))
        return web.Response(status=204)

    async def failures(self, call: Call) -> web.StreamResponse:
        query = call.query("transform", "bucket", "key", "request")
        bucket = query.get("bucket")
        found = self._transforms.failures(
            call.principal,
            transform=query.get("transform"),
            bucket=None if bucket is None else str(Bucket.parse(bucket)),
            key=query.get("key"),
            request=query.get("request"),
        )
        return json_answer(found)

    async def runs(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(self._transforms.runs(call.principal))

    async def results(self, call: Call) -> web.StreamResponse:
        query = call.query("transform", "bucket", "key", "limit")
        found = await self._node.results.list(call.principal, _filter(query), limit=_limit(query.get("limit")))
        return json_answer(found)

    async def remove_results(self, call: Call) -> web.StreamResponse:
        query = call.query("transform", "bucket", "key", "all")
        everything = flag_of(query, "all")
        return json_answer(await self._node.results.remove(call.principal, _filter(query), everything=everything))

    async def register(self, call: Call) -> web.StreamResponse:
        """201 new, 200 known; as JSON lines with progress when the client accepts them."""
        call.query()
        limit = self._node.config.transforms.max_code * 4 // 3 + BODY
        body = await read_body(call, limit, "max_code", self._node.config.server.body_timeout)
        request = await decode_body(body, TransformRequest, "a registration")
        return await self._answer_registration(call, partial(self._transforms.register, call.principal, request))

    async def register_pipeline(self, call: Call) -> web.StreamResponse:
        """As `register`, of versions that follow one another."""
        call.query()
        body = await read_body(call, BODY, "a pipeline", self._node.config.server.body_timeout)
        request = await decode_body(body, PipelineRequest, "a pipeline")
        register = partial(self._transforms.register_pipeline, call.principal, request)
        return await self._answer_registration(call, register)

    async def _answer_registration(self, call: Call, register: _Registration) -> web.StreamResponse:
        if _LINES in call.headers.get("Accept", ""):
            return await self._register_with_progress(call, register)
        info, is_new = await register(progress=lambda _: None)
        return json_answer(info, status=201 if is_new else 200)

    async def _register_with_progress(self, call: Call, register: _Registration) -> web.StreamResponse:
        lines: asyncio.Queue[str | None] = asyncio.Queue()

        async def work() -> tuple[TransformInfo, bool]:
            try:
                return await register(progress=lines.put_nowait)
            finally:
                lines.put_nowait(None)

        answer = web.StreamResponse(headers={"Content-Type": _LINES, "Cache-Control": "no-store"})
        answer.enable_chunked_encoding()
        await call.send_head(answer)
        task = asyncio.create_task(work())
        try:
            while (line := await lines.get()) is not None:
                await self._write_line(call, answer, {"progress": line})
            await self._write_line(call, answer, await _outcome(task, call.id))
            await answer.write_eof()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        return answer

    async def _write_line(self, call: Call, answer: web.StreamResponse, line: dict[str, object]) -> None:
        data = msgspec.json.encode(line) + b"\n"
        await hand_on(call, answer, data, self._node.config.server.send_timeout)

    async def announce(self, call: Call) -> web.StreamResponse:
        """204; what is announced is fetched, and begun, when what stands before it is read."""
        call.query()
        body = await read_body(call, _ANNOUNCEMENT, "an announcement", self._node.config.server.body_timeout)
        paths = (await decode_body(body, Announcement, "an announcement")).paths
        named = await asyncio.to_thread(lambda: [_announced(path) for path in paths])
        transformed = [name for name in named if isinstance(name, TransformedRef)]
        await self._transforms.announce(call.principal, transformed)
        refs = [name.ref if isinstance(name, TransformedRef) else name for name in named]
        await self._node.objects.announce(call.principal, refs)
        return web.Response(status=204)

    async def samples(self, call: Call) -> web.StreamResponse:
        call.query()
        body = await read_body(call, _ANNOUNCEMENT, "a list of shards", self._node.config.server.body_timeout)
        uris = (await decode_body(body, ShardNames, "a list of shards")).objects
        refs = await asyncio.to_thread(lambda: [ObjectRef.parse(uri) for uri in uris])
        return json_answer(SampleCounts(await self._node.shards.count(call.principal, refs)))

    async def environments(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(EnvironmentList(list(self._transforms.environments())))

    async def remove_environment(self, call: Call) -> web.StreamResponse:
        force = flag_of(call.query("force"), "force")
        name = unquote_path(call.path.removeprefix("/api/environments/"))
        await self._transforms.remove_environment(call.principal, name, force=force)
        return web.Response(status=204)

    async def config(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(self._node.describe())

    async def openapi(self, call: Call) -> web.StreamResponse:
        call.query()
        return web.Response(body=document(), content_type="application/json")


async def _outcome(task: "asyncio.Task[tuple[TransformInfo, bool]]", request_id: str) -> dict[str, object]:
    try:
        info, is_new = await task
    except ShardmillError as error:
        return {"error": error_body(error, request_id)}
    except Exception as error:
        return {"error": error_body(unexpected(error), request_id)}
    return {"transform": info, "new": is_new}


def _announced(path: str) -> TransformedRef | ObjectRef:
    return parse_object_path(path) if path.startswith("/o/") else parse_transformed_path(path)


def _info(meta: ObjectMeta, cached: int | None) -> ObjectInfo:
    user = dict(meta.user) if meta.user else {}
    return ObjectInfo(meta.key, meta.size, meta.modified, meta.etag, meta.checksum, user, cached)


def _bucket(call: Call) -> Bucket:
    """The bucket of `/api/buckets/{provider}/{bucket}`."""
    parts = call.path.split("/")
    if len(parts) != 5:
        raise BadRequest("the path is not of the form /api/buckets/provider/bucket")
    return Bucket.of(unquote_path(parts[3]), unquote_path(parts[4]))


def _named(call: Call) -> tuple[str, str | None, str | None]:
    """Name, digest and hash of arguments of `/api/transforms/SPEC`; what else a spec may say is not of the version."""
    spec = Spec.parse(unquote_path(call.path.removeprefix("/api/transforms/")))
    return spec.name, spec.digest, spec.args


def _filter(query: dict[str, str]) -> ResultFilter:
    transform, bucket = query.get("transform"), query.get("bucket")
    return ResultFilter(
        transform=None if transform is None else Spec.parse(transform),
        bucket=None if bucket is None else Bucket.parse(bucket),
        key=query.get("key"),
    )


def _limit(text: str | None) -> int:
    if text is None:
        return MAX_PAGE
    return min(_whole(text, "limit"), MAX_PAGE)


def _whole(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequest(f"{name}={text!r} is not a whole number of at least 0")
    return int(text)
