"""The OpenAPI document, made from the wire types and the table of routes below."""

from functools import cache

import msgspec

from shardmill import __version__
from shardmill.core import api, jobs
from shardmill.core.errors import error_types

_Operation = tuple[str, str, str, type | None, type | None, tuple[str, ...]]

OPERATIONS: tuple[_Operation, ...] = (
    # method, path, what it does, body, answer, query parameters
    ("get", "/api/buckets", "List the buckets.", None, api.Buckets, ()),
    ("put", "/api/buckets/{provider}/{bucket}", "Create a bucket.", None, None, ()),
    ("delete", "/api/buckets/{provider}/{bucket}", "Remove a bucket.", None, None, ("force",)),
    (
        "get",
        "/api/objects",
        "List objects, one page.",
        None,
        api.ObjectPage,
        ("bucket", "prefix", "delimiter", "after", "limit", "stale"),
    ),
    (
        "post",
        "/api/objects/copy",
        "Copy an object inside the node: 201 new, 200 replaced.",
        api.CopyRequest,
        api.ObjectInfo,
        (),
    ),
    ("get", "/api/transforms", "List the transforms.", None, api.Transforms, ()),
    (
        "post",
        "/api/transforms",
        "Register a version. To who accepts application/x-ndjson: lines of progress, then transform or error.",
        api.TransformRequest,
        api.TransformInfo,
        (),
    ),
    (
        "post",
        "/api/pipelines",
        "Register versions that follow one another as one. Lines of progress as for /api/transforms.",
        api.PipelineRequest,
        api.TransformInfo,
        (),
    ),
    ("get", "/api/transforms/{name}", "Show one version.", None, api.TransformDetails, ()),
    ("delete", "/api/transforms/{name}", "Remove one version, or all of a name.", None, None, ()),
    (
        "get",
        "/api/transforms/errors",
        "Failures that were kept.",
        None,
        api.Failures,
        ("transform", "bucket", "key", "request"),
    ),
    (
        "get",
        "/api/members",
        "List the members of a shard, one page.",
        None,
        api.MemberPage,
        ("object", "after", "limit"),
    ),
    (
        "post",
        "/api/batch",
        "Read many members, of several shards, and whole objects: one tar, in the order of the entries.",
        api.BatchRequest,
        None,
        (),
    ),
    ("post", "/api/samples", "Count the samples of shards.", api.ShardNames, api.SampleCounts, ()),
    ("get", "/api/runs", "Show what goes on.", None, api.Runs, ()),
    (
        "get",
        "/api/results",
        "List kept results, the last used first.",
        None,
        api.Results,
        ("transform", "bucket", "key", "limit"),
    ),
    (
        "delete",
        "/api/results",
        "Remove kept results; all=true for all of them.",
        None,
        api.RemovedResults,
        ("transform", "bucket", "key", "all"),
    ),
    ("get", "/api/cache", "Show what is cached of buckets with a store behind them.", None, api.CacheInfo, ()),
    (
        "get",
        "/api/cache/objects",
        "List what is cached of a bucket, one page.",
        None,
        api.CachedPage,
        ("bucket", "prefix", "after", "limit"),
    ),
    ("get", "/api/cache/object", "Show what is cached of an object.", None, api.CachedDetails, ("object",)),
    ("post", "/api/lookahead", "Say what will be read soon, in order.", api.Announcement, None, ()),
    ("get", "/api/jobs", "List the jobs, the newest first.", None, jobs.Jobs, ()),
    (
        "post",
        "/api/jobs",
        "Begin a job or go on with it (201); 200 if it is going on already.",
        jobs.JobRequest,
        jobs.JobInfo,
        (),
    ),
    ("post", "/api/jobs/plan", "Show what a job would do.", jobs.JobRequest, jobs.JobPlan, ()),
    (
        "get",
        "/api/jobs/{id}",
        "Show one job; wait=SECONDS: as soon as it has ended, at most 30 s later.",
        None,
        jobs.JobDetails,
        ("wait",),
    ),
    ("delete", "/api/jobs/{id}", "Cancel a job; what it has done stays.", None, jobs.JobInfo, ()),
    ("get", "/api/environments", "List the environments of transforms.", None, api.EnvironmentList, ()),
    ("delete", "/api/environments/{name}", "Remove one that the node has built.", None, None, ("force",)),
    ("get", "/api/config", "The effective configuration.", None, api.ConfigInfo, ()),
    ("get", "/api/openapi.json", "This document.", None, None, ()),
)

OTHER_PATHS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "/o/{provider}/{bucket}/{key}",
        "An object; with member= one member of a shard.",
        ("get", "head", "put", "delete"),
    ),
    ("/t/{provider}/{bucket}/{path}", "A transformed object: [DIRS/]SPEC~FILE.", ("get", "head")),
    ("/", "A page for people.", ("get",)),
    ("/healthz", "200 while the process answers.", ("get",)),
    ("/readyz", "200 while new work is begun.", ("get",)),
    ("/metrics", "Counters in Prometheus' text format.", ("get",)),
)


@cache
def document() -> bytes:
    """The document as JSON."""
    types = [kind for operation in OPERATIONS for kind in operation[3:5] if kind is not None]
    _, components = msgspec.json.schema_components(
        [*types, api.ErrorBody], schema_hook=_schema_of, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, object]] = {}
    for method, path, what, body, answer, query in OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(path, what, body, answer, query)
    for path, what, methods in OTHER_PATHS:
        for method in methods:
            query = ("member",) if path.startswith("/o/") and method in ("get", "head") else ()
            paths.setdefault(path, {})[method] = _operation(path, what, None, None, query)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "shardmill", "version": __version__},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _schema_of(kind: type) -> dict[str, object]:
    """The schema of what msgspec has none for."""
    if kind is object:
        return {"description": "Any JSON value."}
    raise TypeError(f"{kind} has no schema")


def _operation(
    path: str, what: str, body: type | None, answer: type | None, query: tuple[str, ...]
) -> dict[str, object]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in query]
    success: dict[str, object] = {"description": what}
    if answer is not None:
        success["content"] = _content(answer)
    codes = ", ".join(sorted(error_types()))
    operation: dict[str, object] = {
        "summary": what,
        "parameters": parameters,
        "responses": {
            "2XX": success,
            "default": {"description": f"An error; code is one of {codes}.", "content": _content(api.ErrorBody)},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _content(body)}
    return operation


def _content(kind: type) -> dict[str, object]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
