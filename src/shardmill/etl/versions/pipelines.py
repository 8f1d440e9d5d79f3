"""Registered functions one after the other, as one version: its code is the codes of its parts."""

import base64
import hashlib
from collections.abc import Sequence

import msgspec

from shardmill.core.api import Code, TransformRequest
from shardmill.core.errors import BadRequest
from shardmill.etl.versions.registry import Version, arguments_digest

KINDS = ("sample", "bytes")
"""Of parts: what one gives is what the next takes."""

MAX_PARTS = 32


class _Part(msgspec.Struct, frozen=True):
    """One function, as the worker is given it."""

    digest: str
    encoding: str
    payload: str
    """Base64."""
    args: dict[str, object] | None
    uuid: str


def build_pipeline(name: str, versions: Sequence[Version], probe: str | None) -> TransformRequest:
    """The registration of a pipeline. A part that is a pipeline itself stands for its own parts.

    Raises:
        BadRequest: The parts cannot follow one another; the message says why.
    """
    if len(versions) < 2:
        raise BadRequest(f"a pipeline has at least two parts, not {len(versions)}")
    first = versions[0]
    for version in versions:
        _check_alike(first, version)
    parts = [part for version in versions for part in _parts_of(version)]
    if len(parts) > MAX_PARTS:
        raise BadRequest(f"the pipeline has {len(parts)} parts; at most {MAX_PARTS} are allowed")
    identity = [[part.digest, arguments_digest(part.args)] for part in parts]
    code = Code(
        "pipeline",
        msgspec.json.encode(parts),
        hashlib.sha256(msgspec.json.encode(identity)).hexdigest(),
        first.code.python,
        sorted({module for version in versions for module in version.code.modules}),
        " >> ".join(part.uuid for part in parts),
    )
    return TransformRequest(
        name=name,
        code=code,
        kind=first.info.kind,
        decoder=first.info.decoder,
        fields=first.info.fields,
        by_path=first.info.by_path,
        environment=first.info.environment,
        allow_pickle=first.allow_pickle,
        probe=probe,
    )


def part_uuids(code: Code) -> list[str]:
    """Of a pipeline's code, in order; none of other code."""
    return [part.uuid for part in _decode(code)] if code.encoding == "pipeline" else []


def _check_alike(first: Version, version: Version) -> None:
    """The parts share one worker and one decoding."""
    one, other = first.info, version.info
    if other.kind not in KINDS or other.kind != one.kind:
        kinds = " or all ".join(f"of kind {kind!r}" for kind in KINDS)
        raise BadRequest(
            f"the parts of a pipeline are all {kinds}; {one.uuid} is {one.kind!r}, {other.uuid} {other.kind!r}"
        )
    if other.by_path and version is not first:
        raise BadRequest(f"{other.uuid} takes the path of a file, so it can only be the first part")
    how = (one.decoder, one.fields, first.allow_pickle)
    if (other.decoder, other.fields, version.allow_pickle) != how:
        raise BadRequest(
            f"samples are decoded once for all parts, but {one.uuid} and {other.uuid} differ in decoder, fields or "
            "allow_pickle; register them alike"
        )
    if (other.environment, version.code.python) != (one.environment, first.code.python):
        raise BadRequest(
            f"a pipeline runs in one environment; {one.uuid} is of {one.environment!r} (Python {first.code.python}), "
            f"{other.uuid} of {other.environment!r} (Python {version.code.python})"
        )


def _parts_of(version: Version) -> list[_Part]:
    code = version.code
    if code.encoding == "pipeline":
        return _decode(code)
    payload = base64.b64encode(code.payload).decode()
    return [_Part(version.info.digest, code.encoding, payload, version.info.args, version.info.uuid)]


def _decode(code: Code) -> list[_Part]:
    return msgspec.json.decode(code.payload, type=list[_Part])
