"""Registered versions of transforms: immutable, found by name and digest, kept on disk.

One directory a name; in it one record and one payload a version, both written before the record is renamed into place.
The newest version of a name is the one registered last, an old one registered again included.
"""

import asyncio
import contextlib
import difflib
import errno
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from shardmill.core.api import Code, ProbeReport, TransformInfo, TransformRequest
from shardmill.core.commands import check_command
from shardmill.core.errors import BadRequest, Conflict, InsufficientStorage, TransformNotFound
from shardmill.core.specs import SPEC_DIGITS, Spec
from shardmill.etl.durable import sync_directory, write_durably
from shardmill.etl.versions.fingerprints import fingerprint

FORM = 3
"""Of what a digest is over, and of this record; raised when either changes."""

_KNOWN_FORMS = (
    1,
    2,
    FORM,
)  # what was registered before keeps its digest, under which nothing can be registered any more

FORMAT = 1
"""Raised when decoding, encoding or framing changes the bytes that a version gives; part of a result's key."""

_NAMED = 10  # transforms that an error lists

_RECORD = ".json"
_PAYLOAD = ".code"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a transform: what is known of it, and its code."""

    info: TransformInfo
    code: Code
    allow_pickle: bool

    @property
    def key(self) -> str:
        """What a worker process is bound to: code, its arguments and where it runs."""
        arguments = arguments_digest(self.info.args) or ""
        return f"{self.info.digest}/{self.info.environment}/{arguments}/{self.allow_pickle}"

    @property
    def label(self) -> str:
        """`name@` + 12 digits (+ `,args=`), for people and records."""
        return self.info.uuid


class _Record(msgspec.Struct, frozen=True):
    form: int
    info: TransformInfo
    encoding: Literal["cloudpickle", "source", "command", "pipeline"]
    code_form: str
    python: str
    modules: list[str]
    label: str
    allow_pickle: bool
    code_hash: str


def compute_digest(request: TransformRequest) -> str:
    """The identity of a version: its code and what else decides bytes; 64 hex digits.

    Of the code both the normal form, as its client has made it, and the fingerprint, which is read off what will be
    run: code that claims the form of other code is another version. Name, environment, packages and error policy are
    left out. Takes some milliseconds, more for large payloads.
    """
    kind = f"{request.kind} by path" if request.by_path else request.kind
    fields = sorted(set(request.fields)) if request.fields is not None else None
    code = [request.code.form, fingerprint(request.code), request.code.python]
    return hashlib.sha256(msgspec.json.encode([FORM, kind, *code, request.decoder, fields])).hexdigest()


def arguments_hash(arguments: dict[str, object] | None) -> str | None:
    """The `args` of a spec: the first 12 digits of `arguments_digest`; None without arguments."""
    digest = arguments_digest(arguments)
    return None if digest is None else digest[:SPEC_DIGITS]


def arguments_digest(arguments: dict[str, object] | None) -> str | None:
    """64 hex digits over the arguments in canonical JSON; None without arguments."""
    if not arguments:
        return None
    return hashlib.sha256(msgspec.json.encode(arguments, order="deterministic")).hexdigest()


class Versions:
    """The registry. Reads are from memory; `add` and `remove` are durable when they return."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._versions: dict[tuple[str, str, str | None], Version] = {}
        self._lock = asyncio.Lock()
        self.changes = 0
        """How often anything was added or removed."""
        directory.mkdir(parents=True, exist_ok=True)
        self._load()

    def list(self) -> Sequence[Version]:
        """All versions, the newest of each name last."""
        return list(self._versions.values())

    def get(self, name: str, digest: str | None = None, args: str | None = None) -> Version:
        """A version by at least 12 digits of its digest and its arguments, or the newest of a name.

        Raises:
            TransformNotFound: There is none.
            Conflict: The digits fit several.
        """
        found = [
            version
            for key, version in self._versions.items()
            if _fits(key, name, digest, args) and (digest is None or key[2] == args)
        ]
        if not found:
            raise TransformNotFound(f"no transform {str(Spec(name, digest, args=args))!r}; {self._others(name)}")
        if digest is not None and len({version.info.digest for version in found}) > 1:
            raise Conflict(f"transform {name}@{digest} stands for several versions; give more digits")
        return found[-1]

    def find(self, name: str, digest: str | None, args: str | None) -> Version:
        """A version for people: without arguments the one registered last with whatever arguments.

        Raises:
            TransformNotFound: There is none.
            Conflict: The digits fit several.
        """
        keys = [key for key in self._versions if _fits(key, name, digest, args)]
        if args is None and keys:
            args = keys[-1][2]
        return self.get(name, digest, args)

    def _others(self, name: str) -> str:
        """What there is instead of a version that there is not: of the same name, of one alike, or of any."""
        names = sorted({known for known, _, _ in self._versions})
        if not names:
            return "none is registered"
        if name in names:
            uuids = [version.info.uuid for key, version in self._versions.items() if key[0] == name]
            return f"of {name} there {'is' if len(uuids) == 1 else 'are'} {_shortened(uuids[::-1])}"
        alike = difflib.get_close_matches(name, names, n=1)
        return f"did you mean {alike[0]!r}?" if alike else f"registered: {_shortened(names)}"

    async def add(self, version: Version) -> bool:
        """Keep a version and make it the newest of its name; False: it was known.

        Raises:
            Conflict: There is one with other arguments, whose 12 digits are the same.
            InsufficientStorage: The disk is full.
        """
        info = version.info
        key = (info.name, info.digest, arguments_hash(info.args))
        async with self._lock:
            if key in self._versions and self._versions[key].info.args != info.args:
                raise Conflict(f"{info.uuid} is registered with other arguments; remove it, or change yours")
            known = self._versions.pop(key, None)
            self.changes += 1
            if known is not None:
                # The first code stays: equal digests do the same, and running workers have it.
                version = Version(
                    msgspec.structs.replace(info, probe=info.probe or _probe_of(known, info.environment)),
                    known.code,
                    version.allow_pickle,
                )
            try:
                await asyncio.to_thread(self._write, version)
            except BaseException as error:
                if known is not None:
                    self._versions[key] = known
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise InsufficientStorage(f"{info.name}: the disk is full; nothing was registered") from None
                raise
            self._versions[key] = version
            self.changes += 1
            return known is None

    async def remove(self, name: str, digest: str | None, args: str | None = None) -> None:
        """Forget a version, or all of a name; runs that go on keep what they have.

        Raises:
            TransformNotFound: There is none.
        """
        async with self._lock:
            keys = [key for key in self._versions if _fits(key, name, digest, args)]
            if not keys:
                raise TransformNotFound(f"no transform {str(Spec(name, digest, args=args))!r}")
            self.changes += 1
            for key in keys:
                del self._versions[key]
            await asyncio.to_thread(self._erase, keys)

    def _path(self, name: str, digest: str, args: str | None) -> Path:
        return self._directory / name / (digest if args is None else f"{digest}-{args}")

    def _write(self, version: Version) -> None:
        info, code = version.info, version.code
        base = self._path(info.name, info.digest, arguments_hash(info.args))
        base.parent.mkdir(exist_ok=True)
        record = _Record(
            FORM, info, code.encoding, code.form, code.python, code.modules, code.label, version.allow_pickle,
            hashlib.sha256(code.payload).hexdigest(),
        )  # fmt: skip
        write_durably(base.with_name(base.name + _PAYLOAD), code.payload)
        write_durably(base.with_name(base.name + _RECORD), msgspec.json.encode(record))
        sync_directory(base.parent)
        sync_directory(self._directory)

    def _erase(self, keys: Sequence[tuple[str, str, str | None]]) -> None:
        for name, digest, args in keys:
            base = self._path(name, digest, args)
            for suffix in (_RECORD, _PAYLOAD):
                base.with_name(base.name + suffix).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                base.parent.rmdir()
        sync_directory(self._directory)

    def _load(self) -> None:
        found = []
        for path in self._directory.glob(f"*/*{_RECORD}"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=_Record)
                payload = path.with_name(path.name.removesuffix(_RECORD) + _PAYLOAD).read_bytes()
            except (OSError, msgspec.MsgspecError):
                continue
            if record.form not in _KNOWN_FORMS or hashlib.sha256(payload).hexdigest() != record.code_hash:
                continue
            code = Code(
                encoding=record.encoding, payload=payload,
                form=record.code_form, python=record.python, modules=record.modules, label=record.label,
            )  # fmt: skip
            found.append((path.stat().st_mtime_ns, Version(record.info, code, record.allow_pickle)))
        for _, version in sorted(found, key=lambda item: item[0]):
            info = version.info
            self._versions[info.name, info.digest, arguments_hash(info.args)] = version
        for stray in self._directory.glob("*/*.tmp"):
            stray.unlink(missing_ok=True)


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _probe_of(version: Version, environment: str) -> ProbeReport | None:
    """What a probe found out, where that says something of the environment, too."""
    return version.info.probe if version.info.environment == environment else None


def _fits(key: tuple[str, str, str | None], name: str, digest: str | None, args: str | None) -> bool:
    return key[0] == name and key[1].startswith(digest or "") and args in (None, key[2])


def build_info(
    request: TransformRequest,
    environment: str,
    probe: ProbeReport | None,
    *,
    digest: str,
    parts: Sequence[str] = (),
    locked: Sequence[str] = (),
) -> TransformInfo:
    """What is known of a version that is registered now.

    Args:
        request: Its registration.
        environment: Where it runs.
        probe: What was found out by trying it.
        digest: See `compute_digest`.
        parts: Of a pipeline, the versions that it was made of.
        locked: What its packages were resolved to.
    """
    return TransformInfo(
        name=request.name,
        digest=digest,
        uuid=str(Spec(request.name, digest[:SPEC_DIGITS], args=arguments_hash(request.args))),
        kind=request.kind,
        decoder=request.decoder,
        fields=sorted(request.fields) if request.fields is not None else None,
        python=request.code.python,
        modules=request.code.modules,
        environment=environment,
        label=request.code.label,
        created=time.time(),
        by_path=request.by_path,
        args=request.args,
        parts=list(parts),
        probe=probe,
        packages=request.packages,
        locked=list(locked),
    )


def check_request(request: TransformRequest, max_code: int) -> TransformRequest:
    """Refuse what no client of ours sends; returns it without what its kind has no use for.

    Raises:
        BadRequest: Names the field.
    """
    code = request.code
    if len(code.form) != 64 or set(code.form) - set("0123456789abcdef"):
        raise BadRequest("code.form is not 64 hex digits")
    if len(code.payload) > max_code:
        raise BadRequest(f"code.payload has {len(code.payload)} bytes; at most {max_code} are allowed (max_code)")
    if not code.payload:
        raise BadRequest("code.payload is empty")
    if (request.kind == "command") != (code.encoding == "command") or code.encoding == "pipeline":
        raise BadRequest(f"code.encoding is {code.encoding!r}, which is not code of kind {request.kind!r}")
    major, _, minor = code.python.partition(".")
    if not (major.isdigit() and minor.isdigit()) and not (request.kind == "command" and not code.python):
        raise BadRequest(f"code.python is {code.python!r}, not e.g. '3.11'")
    bad = [name for name in code.modules if not name.isidentifier()]
    if bad:
        raise BadRequest(f"code.modules has {bad[0]!r}, which is not the name of a top-level module")
    if request.by_path and request.kind != "bytes":
        raise BadRequest(f"by_path is of kind 'bytes'; this is of kind {request.kind!r}")
    if request.kind == "sample":
        return request
    if request.fields is not None:
        raise BadRequest(f"fields are of kind 'sample'; of kind {request.kind!r} nothing is decoded")
    if request.kind == "command":
        check_command(code.payload, request.args or {})
    return msgspec.structs.replace(request, decoder=None)
