"""Jobs as they are asked for, told of and written down: wire types of `/api/jobs`, and the manifest; version 1.

A job is known by what it is to do, so the same request is the same job.
"""

import hashlib
from typing import Literal, get_args

import msgspec

from shardmill.core.errors import BadRequest

JobKind = Literal["transform", "prefetch", "evict"]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
"""`waiting` for other jobs to end; the last three have ended, and can be asked for again."""

KINDS: tuple[str, ...] = get_args(JobKind)
MANIFESTS = ".shardmill/jobs/"
"""Start of the keys of manifests; what is below is no shard."""

KEPT_FAILURES = 100  # failed samples of an object, and tracebacks of a job, that are kept; all failures are counted
MAX_MESSAGE = 500  # characters of a message that are kept: a job may have a hundred thousand
_ID_BYTES = 8


class JobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`POST /api/jobs`: what is to be done. One of template, prefix and names says with which objects."""

    kind: JobKind
    source: str
    """Bucket, `provider://name`."""
    template: str | None = None
    """Braces, `@N` or `%06d`, as in `expand_object_urls`."""
    prefix: str | None = None
    names: list[str] | None = None
    """Keys, taken literally; answers have the first 100."""
    destination: str | None = None
    """Bucket that is written to."""
    transform: str | None = None
    """A spec; a bare name is its newest version when the job is first asked for."""
    rename: str = "{key}"
    """Key of what an object becomes: see `core.renaming`."""
    rate: int | None = None
    """Of a prefetch: bytes a second that are fetched at most."""

    @property
    def label(self) -> str:
        """From where to where, for people; of one bucket, what is done with it."""
        return f"{self.source} -> {self.destination}" if self.destination is not None else f"{self.kind} {self.source}"


class PlannedObject(msgspec.Struct, frozen=True):
    """One object of a job that is not begun."""

    object: str
    size: int
    target: str
    done: bool
    """It is there from before, and would be the same."""


class JobPlan(msgspec.Struct, frozen=True):
    """`POST /api/jobs/plan`: what a job would do."""

    id: str
    spec: str | None
    """With its version."""
    objects: list[PlannedObject]
    """The first 1000."""
    total: int
    done: int
    """Of all."""
    bytes: int
    """Of all sources."""
    manifest: str | None
    left: int = 0
    """Bytes that would be fetched, or given back, by kinds of which that is known before."""


class SampleFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sample that was left out."""

    sample: str
    ordinal: int
    """In its shard, from 0."""
    message: str


class JobEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One object that is done: of the manifest, and of the node's own record."""

    object: str
    version: str
    """Source version."""
    size: int
    target: str
    bytes: int
    """Of what was stored; of a prefetch, fetched; of an eviction, given back."""
    etag: str | None
    """Of what was stored, as the destination says."""
    checksum: str | None
    result: str
    """64 hex digits over what decides the bytes."""
    made: float
    """Unix time."""
    seed: int | None = None
    """The one that was used; where it was drawn, the URL with it gives these bytes."""
    samples: int | None = None
    """Source samples that gave something."""
    failures: int = 0
    """Samples that were left out by failing."""
    failed: list[SampleFailure] = []
    """The first 100 of them."""


class ObjectFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """An object that could not be done."""

    object: str
    code: str
    """As in an error's answer."""
    message: str
    time: float
    sample: str | None = None
    """Key of the sample that it failed at."""
    traceback: str | None = None
    """The user's own; of the first 100."""


class Manifest(msgspec.Struct, frozen=True):
    """What a job has come to: `.shardmill/jobs/ID.json` in its destination."""

    format: int
    """1"""
    job: str
    kind: JobKind
    state: JobState
    """When it was written; `running` too where a node was killed."""
    source: str
    destination: str
    spec: str | None
    total: int
    """Objects."""
    updated: float
    entries: list[JobEntry]
    """In the order of the job's objects."""
    failures: list[ObjectFailure]


class JobInfo(msgspec.Struct, frozen=True):
    """One job."""

    id: str
    request: JobRequest
    """With bucket names and version in full."""
    state: JobState
    created: float
    """When it was first asked for."""
    started: float | None
    """When it last began to work; what follows counts from there."""
    ended: float | None
    error: str | None
    """Why it ended before its end, or what is missing."""
    total: int
    """Objects; 0 before they are known."""
    done: int
    found: int
    """Of these, done before `started`."""
    failed: int
    running: int
    samples: int
    """Source samples that gave something."""
    failures: int
    """Samples that were left out by failing."""
    bytes: int
    """Of all sources."""
    bytes_done: int
    """Of sources, parts included."""
    bytes_out: int
    """Stored; of a prefetch, fetched; of an eviction, given back."""
    rate: float
    """Bytes of sources a second since `started`."""
    time_left: float | None
    """Seconds, at this rate; None: not known."""
    manifest: str | None
    """URI."""

    @property
    def has_ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class RunningObject(msgspec.Struct, frozen=True):
    """An object in work."""

    object: str
    target: str
    done: float
    """0 to 1."""
    started: float


class FailedSample(msgspec.Struct, frozen=True):
    """A sample that was left out, with its object."""

    object: str
    sample: str
    ordinal: int
    message: str


class JobDetails(msgspec.Struct, frozen=True):
    """`GET /api/jobs/ID`."""

    job: JobInfo
    running: list[RunningObject]
    objects: list[ObjectFailure]
    """Objects that failed, the first 1000."""
    samples: list[FailedSample]
    """Samples that were left out, the first 1000."""


class Jobs(msgspec.Struct, frozen=True):
    """`GET /api/jobs`: the newest first."""

    jobs: list[JobInfo]


def job_id(request: JobRequest) -> str:
    """16 hex digits over a request with its names in full: what a job is known by."""
    return hashlib.blake2b(msgspec.json.encode(request), digest_size=_ID_BYTES).hexdigest()


def check_job_id(text: str) -> str:
    """The id itself if it is one.

    Raises:
        BadRequest: It is none.
    """
    if len(text) != 2 * _ID_BYTES or set(text) - set("0123456789abcdef"):
        raise BadRequest(f"{text!r} is no job's id, which has {2 * _ID_BYTES} hex digits")
    return text


def manifest_key(job: str) -> str:
    """The key of a job's manifest in its destination."""
    return f"{MANIFESTS}{job}.json"


def is_manifest(key: str) -> bool:
    """Whether an object is a job's own record rather than data."""
    return key.startswith(MANIFESTS)
