"""Transforms of a node: ship a function, name its versions, read its failures back."""

import builtins
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args
from urllib.parse import quote, urlsplit

import msgspec

from shardmill.client.answers import Answer
from shardmill.client.handles import ObjectHandle
from shardmill.client.http import Transport
from shardmill.core.api import (
    Code,
    EnvironmentInfo,
    EnvironmentList,
    ErrorBody,
    Failures,
    Kind,
    PipelineRequest,
    RemovedResults,
    Results,
    TransformDetails,
    TransformInfo,
    TransformRequest,
    Transforms,
    TransformStatistics,
)
from shardmill.core.commands import check_command, parse_argv
from shardmill.core.errors import BadRequest, error_from_wire
from shardmill.core.paths import parse_object_path
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.requirements import parse_requirements
from shardmill.core.specs import Spec, check_name
from shardmill.marking import Marks, marks_in_source, marks_of

if TYPE_CHECKING:
    from shardmill.client.shipping import Shipment

Function = Callable[..., Any]  # the user's own: takes a sample, gives anything
Probe = str | ObjectHandle

_ILLEGAL = re.compile(r"[^a-z0-9._-]+")


class Versioned(Protocol):
    """What names a version: what its registration returned, or a handle of it."""

    @property
    def uuid(self) -> str: ...


Part = str | Versioned
"""Of a pipeline: a spec, or what names one."""


class TransformsHandle:
    """The transforms of a node; `client.transforms`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def add(
        self,
        function: Function | str | PathLike[str],
        name: str = "",
        *,
        kind: Kind | None = None,
        by_path: bool | None = None,
        decoder: str | None = "pil",
        fields: Sequence[str] | None = None,
        args: Mapping[str, object] | None = None,
        packages: Sequence[str] = (),
        env: str | None = None,
        probe: Probe | None = None,
        allow_pickle: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> TransformInfo:
        """Register a function, or one of a file (`"file.py:function"`, which is not run here).

        Args:
            function: What to ship.
            name: Default: its `@transform` name, else its own.
            kind: `sample` (default, unless it is marked with another): it takes a sample and returns one. `bytes`: it
                takes a whole object's bytes and returns the output's. `stream`: it takes two files, to read the object
                from and to write the output to. Of the last two, a parameter `ref` is given `provider://bucket/key`.
            by_path: Of kind `bytes`: it takes the path of a file instead.
            decoder: As `wd_decoder` of `WDTransform`; of kind `sample`, as are `fields` and `allow_pickle`.
            fields: Decode only these.
            args: Keyword arguments of the function; JSON.
            packages: Requirements that the node builds an environment of, as of `WDTransform`.
            env: An environment of the node by name.
            probe: URI, URL or handle of a shard, or of an object that it takes as a whole.
            allow_pickle: Let `pyd` and `pth` fields be decoded, which runs code that they hold.
            progress: Called with what the node is doing.
        """
        # Here, not above: those who only read need not wait for cloudpickle.
        from shardmill.client.shipping import check_call, ship, ship_file

        if isinstance(function, str | PathLike):
            shipment = ship_file(str(function))
            marks = _marks_of_file(str(function))
        else:
            shipment, marks = ship(function), marks_of(function)
        kind = _choose_kind(kind, marks)
        if decoder == "pil" and "decoder" in marks:
            decoder = marks["decoder"]
        if kind != "sample" and decoder not in ("pil", None):
            raise BadRequest(f"decoder is of kind 'sample'; of kind {kind!r} nothing is decoded")
        by_path = by_path if by_path is not None else marks.get("by_path", False)
        if by_path and kind != "bytes":
            raise BadRequest("by_path is of kind 'bytes'")
        check_call(shipment, kind, args or {})
        fields = fields if fields is not None else marks.get("fields")
        packages = packages or marks.get("packages") or ()
        request = TransformRequest(
            name=_choose_name(name, shipment, marks),
            code=Code(
                encoding=shipment.encoding,
                payload=shipment.payload,
                form=shipment.form,
                python=shipment.python,
                modules=list(shipment.modules),
                label=shipment.label,
            ),
            kind=kind,
            by_path=by_path,
            decoder=decoder if kind == "sample" else None,
            fields=None if fields is None else list(fields),
            args=_json_arguments(args),
            environment=env if env is not None else marks.get("env"),
            packages=[str(requirement) for requirement in parse_requirements(packages)],
            allow_pickle=allow_pickle,
            probe=None if probe is None else probe_uri(probe),
        )
        return self._register("/api/transforms", request, progress)

    def add_command(
        self,
        argv: Sequence[str],
        name: str = "",
        *,
        args: Mapping[str, object] | None = None,
        env: str | None = None,
        probe: Probe | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> TransformInfo:
        """Register a command line: each object is its standard input, and what it gives on its standard output.

        Args:
            argv: The command, to be found in the node's PATH, and its arguments. In them `{key}` and `{name}` stand
                for the object's key and file name, `{seed}` for a number that the seed decides, `{path}` for a file
                with the object's bytes (standard input is then empty), other `{names}` for `args`.
            name: Default: the command's own.
            args: What other placeholders stand for; JSON.
            env: An environment of the node by name; it gives the command nothing but a place to run.
            probe: URI, URL or handle of an object.
            progress: Called with what the node is doing.
        """
        if isinstance(argv, str) or not argv:
            raise BadRequest("argv is a sequence of strings: the command and its arguments")
        given = _json_arguments(args)
        payload = msgspec.json.encode(parse_argv(argv))
        check_command(payload, given or {})
        chosen = name or legal_name(argv[0].rpartition("/")[2])
        request = TransformRequest(
            name=check_name(chosen),
            code=Code("command", payload, hashlib.sha256(payload).hexdigest(), python="", label=shlex.join(argv)),
            kind="command",
            decoder=None,
            args=given,
            environment=env,
            probe=None if probe is None else probe_uri(probe),
        )
        return self._register("/api/transforms", request, progress)

    def add_pipeline(
        self,
        parts: Sequence[Part],
        name: str = "",
        *,
        probe: Probe | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> TransformInfo:
        """Register functions that follow one another; all are of kind `sample`, or all of kind `bytes`.

        Samples go from one function to the next as they are, without encoding in between, in one worker.

        Args:
            parts: At least two: uuids, what registrations returned, or pipelines. Options of a uuid do not matter.
            name: Default: the parts' names, joined by dots.
            probe: URI, URL or handle of a shard or object.
            progress: Called with what the node is doing.
        """
        uuids = [uuid_of(part) for part in parts]
        chosen = name or ".".join(Spec.parse(uuid).name for uuid in uuids)[:63].rstrip("._-")
        uri = None if probe is None else probe_uri(probe)
        return self._register("/api/pipelines", PipelineRequest(check_name(chosen), uuids, uri), progress)

    def _register(
        self, path: str, request: TransformRequest | PipelineRequest, progress: Callable[[str], None] | None
    ) -> TransformInfo:
        headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
        with self._transport.request("POST", path, headers=headers, body=msgspec.json.encode(request)) as answer:
            return _read_registration(answer, progress)

    def list(self) -> list[TransformInfo]:
        """Every registered version, oldest first."""
        with self._transport.request("GET", "/api/transforms") as answer:
            return msgspec.json.decode(answer.read_all(), type=Transforms).transforms

    def get(self, name: str) -> TransformDetails:
        """A version by `name@digits` (or a whole spec), or the newest of a name."""
        with self._transport.request("GET", _transform_path(name)) as answer:
            return msgspec.json.decode(answer.read_all(), type=TransformDetails)

    def remove(self, name: str) -> None:
        """Remove a version, or all of a name; their URLs are 404 from then on."""
        self._transport.request("DELETE", _transform_path(name)).close()

    def environments(self) -> builtins.list[EnvironmentInfo]:
        """The interpreters that transforms run in: those that the node was given, then those that it has built."""
        with self._transport.request("GET", "/api/environments") as answer:
            return msgspec.json.decode(answer.read_all(), type=EnvironmentList).environments

    def remove_environment(self, name: str, *, force: bool = False) -> None:
        """Remove an environment that the node has built.

        Args:
            name: As in `TransformInfo.environment`.
            force: Also when transforms run in it; they fail until they are registered again.

        Raises:
            Conflict: The node was given it, or transforms run in it.
        """
        query = {"force": "true"} if force else {}
        self._transport.request("DELETE", f"/api/environments/{quote(name, safe='')}", query=query).close()

    def errors(
        self,
        transform: str | None = None,
        *,
        bucket: str | None = None,
        key: str | None = None,
        request: str | None = None,
    ) -> Failures:
        """Failed samples and runs that match all that is given, oldest first.

        Args:
            transform: A name, `name@digits` or a whole spec.
            bucket: `provider://name`.
            key: Of a shard or of a sample.
            request: Request id of the answer that was cut.
        """
        query = {
            "transform": None if transform is None else _version_of(transform),
            "bucket": None if bucket is None else str(Bucket.parse(bucket)),
            "key": key,
            "request": request,
        }
        given = {name: value for name, value in query.items() if value is not None}
        with self._transport.request("GET", "/api/transforms/errors", query=given) as answer:
            return msgspec.json.decode(answer.read_all(), type=Failures)

    def results(
        self, transform: str | None = None, *, bucket: str | None = None, key: str | None = None, limit: int = 1000
    ) -> Results:
        """Finished transformed objects that the node keeps and that match all that is given, the last used first.

        Args:
            transform: A name, `name@digits` or a whole spec, whose options do not matter.
            bucket: `provider://name`.
            key: Of the object that was transformed.
            limit: At most so many; the totals count all.
        """
        query = {**_result_query(transform, bucket, key), "limit": str(limit)}
        with self._transport.request("GET", "/api/results", query=query) as answer:
            return msgspec.json.decode(answer.read_all(), type=Results)

    def remove_results(
        self,
        transform: str | None = None,
        *,
        bucket: str | None = None,
        key: str | None = None,
        everything: bool = False,
    ) -> RemovedResults:
        """Remove kept results that match all that is given; the next reader has them made again.

        Args:
            transform: As in `results`, like bucket and key.
            bucket: `provider://name`.
            key: Of the object that was transformed.
            everything: All that the node keeps, with nothing else given.
        """
        query = _result_query(transform, bucket, key)
        if everything:
            query["all"] = "true"
        with self._transport.request("DELETE", "/api/results", query=query) as answer:
            return msgspec.json.decode(answer.read_all(), type=RemovedResults)

    def statistics(self, name: str) -> TransformStatistics:
        """Totals of a version since the node started."""
        return self.get(name).statistics


def probe_uri(probe: Probe) -> str:
    """A shard's `provider://bucket/key` from its URI, its URL at a node, or its handle."""
    if isinstance(probe, ObjectHandle):
        return probe.uri
    if probe.startswith(("http://", "https://")):
        path = urlsplit(probe).path
        start = path.find("/o/")
        if start < 0:
            raise BadRequest(f"probe {probe!r} is not the URL of an untransformed object (…/o/provider/bucket/key)")
        return str(parse_object_path(path[start:]))
    return str(ObjectRef.parse(probe))


def legal_name(name: str) -> str:
    """A function's name as a transform's: lower case, other signs as `-`; empty if nothing legal is left."""
    return _ILLEGAL.sub("-", name.lower()).strip("._-")[:63]


def uuid_of(part: Part) -> str:
    """`name@digits` (+ `,args=`) of what a registration returned, or of a spec."""
    return _version_of(part if isinstance(part, str) else part.uuid)


def _choose_kind(kind: str | None, marks: Marks) -> Kind:
    chosen = kind if kind is not None else marks.get("kind", "sample")
    if chosen not in get_args(Kind) or chosen == "command":
        functions = ", ".join(known for known in get_args(Kind) if known != "command")
        raise BadRequest(f"kind={chosen!r} is no kind of function; known: {functions}")
    return cast(Kind, chosen)


def _choose_name(name: str, shipment: "Shipment", marks: Marks) -> str:
    given = name or marks.get("name") or legal_name(shipment.name)
    if not given:
        raise BadRequest("a lambda has no name to register under; give it one with transform_name=")
    return check_name(given)


def _json_arguments(args: Mapping[str, object] | None) -> dict[str, object] | None:
    """The arguments as the node gets them; none at all are None.

    Raises:
        BadRequest: JSON cannot say them.
    """
    if not args:
        return None
    try:
        text = json.dumps(dict(args), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"args are sent as JSON, which cannot say them: {error}") from None
    return msgspec.json.decode(text, type=dict[str, object])


def _marks_of_file(target: str) -> Marks:
    file, _, function = target.rpartition(":")
    with open(file, encoding="utf-8") as source:
        return marks_in_source(source.read(), function)


def _read_registration(answer: Answer, progress: Callable[[str], None] | None) -> TransformInfo:
    """The version that a stream of JSON lines ends with."""
    for line in answer.read_lines():
        if not line.strip():
            continue
        event = msgspec.json.decode(line, type=dict[str, Any])
        if "progress" in event:
            if progress is not None:
                progress(event["progress"])
        elif "error" in event:
            error = msgspec.convert(event["error"], ErrorBody)
            raise error_from_wire(
                error.code, error.message, status=500, traceback=error.traceback, request_id=error.request_id
            )
        else:
            return msgspec.convert(event.get("transform", event), TransformInfo)
    raise BadRequest("the node ended its answer to the registration without a result; register again")


def _result_query(transform: str | None, bucket: str | None, key: str | None) -> dict[str, str]:
    query = {
        "transform": None if transform is None else _version_of(transform),
        "bucket": None if bucket is None else str(Bucket.parse(bucket)),
        "key": key,
    }
    return {name: value for name, value in query.items() if value is not None}


def _transform_path(name: str) -> str:
    return f"/api/transforms/{quote(_version_of(name), safe='@,=._-')}"


def _version_of(spec: str) -> str:
    """`name@digits` of a spec and its `args`; other options do not matter to what is registered."""
    parsed = Spec.parse(spec)
    return str(Spec(parsed.name, parsed.digest, args=parsed.args))
