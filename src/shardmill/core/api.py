"""Wire types of the JSON API; version 1. Both ends validate against them and unknown fields are refused.

Bytes travel as base64 (msgspec's JSON rule). Times are Unix seconds, sizes bytes.
"""

from typing import Literal

import msgspec

Kind = Literal["sample", "bytes", "stream", "command"]
"""What a transform works on: `sample` on the samples of a shard; the others on a whole object, which a function gets as
`bytes` or as files (`stream`), or a command line on its standard input."""


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error answer."""

    code: str
    message: str
    request_id: str
    traceback: str | None = None
    """The user's own traceback."""


class BucketInfo(msgspec.Struct, frozen=True):
    uri: str
    backing: str
    """`pool`, `dir` or the remote store; never a path."""
    writable: bool


class Buckets(msgspec.Struct, frozen=True):
    buckets: list[BucketInfo]


class ObjectInfo(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    key: str
    size: int
    modified: float
    etag: str | None = None
    checksum: str | None = None
    user: dict[str, str] = {}
    cached: int | None = None
    """Bytes of it on the node's disk; None: no store is behind the bucket, so all of them."""


class CopyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/objects/copy`."""

    source: str
    """`provider://bucket/key`."""
    destination: str
    """`provider://bucket/key`; replaced if there is one."""
    if_absent: bool = False
    """Leave an existing object alone, and fail."""


class ObjectPage(msgspec.Struct, frozen=True, omit_defaults=True):
    objects: list[ObjectInfo]
    prefixes: list[str]
    next: str | None
    stale: bool = False
    """The bucket's store could not be asked: this is what was known of it. Only where that was asked for."""
    complete: bool = True
    """False: nothing was known of this page but what is on the node's disk, so there may be more."""
    reason: str | None = None
    """Of a stale page: why the store could not be asked."""


class MemberInfo(msgspec.Struct, frozen=True, gc=False):
    """One member of a shard: a regular file of the tar."""

    name: str
    """Bytes of it that are no UTF-8 are shown as U+FFFD."""
    offset: int
    """Of its first byte in the shard."""
    size: int


class MemberPage(msgspec.Struct, frozen=True):
    """`GET /api/members`: in the shard's order."""

    members: list[MemberInfo]
    total: int
    """Members of the whole shard."""
    etag: str | None
    """Of the shard; pages of one listing are of one version only if they agree in it."""
    next: str | None
    """Pass as `after` for the next page; None at the end."""


class BatchEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An object, or members of it."""

    object: str
    """`provider://bucket/key`."""
    members: list[str] | None = None
    """By their names in the tar; None: the object as it is."""


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/batch`: what is answered, in this order, as one tar."""

    entries: list[BatchEntry]
    missing: Literal["fail", "skip"] = "fail"
    """What becomes of it when an object or a member does not exist: an error before the first byte, or it is left
    out."""
    naming: Literal["full", "member"] = "full"
    """Names in the answer: `provider/bucket/key/member`, or as in the shard (of an object: its key)."""


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function as it travels: opaque to all but the worker."""

    encoding: Literal["cloudpickle", "source", "command", "pipeline"]
    payload: bytes
    """Of a command: its items as JSON, see `core.commands`; of a pipeline, which only a node makes: its parts."""
    form: str
    """64 hex digits: hash of the code's normal form."""
    python: str
    """The client's Python minor, e.g. `3.11`; empty for a command."""
    modules: list[str] = []
    """Top-level installed modules that the code imports."""
    label: str = ""
    """`file:line` of the function on the client, for messages."""


class TransformRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/transforms`."""

    name: str
    code: Code
    kind: Kind = "sample"
    decoder: str | None = "pil"
    """What WebDataset's `decode` would be given; None leaves fields as bytes."""
    fields: list[str] | None = None
    """Decode only these fields."""
    by_path: bool = False
    """Of kind `bytes`: the function gets the path of a file."""
    args: dict[str, object] | None = None
    """Keyword arguments of the function, JSON; of a command, what its placeholders stand for."""
    environment: str | None = None
    packages: list[str] = []
    """Requirements (PEP 508): it runs in an environment of these and nothing else; `environment` names its Python."""
    allow_pickle: bool = False
    probe: str | None = None
    """`provider://bucket/key` of a shard to try a few samples of."""


class PipelineRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/pipelines`: registered functions, one after the other."""

    name: str
    parts: list[str]
    """`name@digits` (+ `,args=`) of each."""
    probe: str | None = None
    """`provider://bucket/key` of a shard or object to try it on."""


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/lookahead`: what will be read soon, in order."""

    paths: list[str]
    """`/t/...` and `/o/...` of data URLs, percent-encoded."""


class ShardNames(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/samples`: shards whose samples are to be counted."""

    objects: list[str]
    """`provider://bucket/key`."""


class SampleCounts(msgspec.Struct, frozen=True):
    """Source samples of each shard, in the order asked for."""

    counts: list[int]


class ProbeReport(msgspec.Struct, frozen=True):
    """What a probe of a few samples found."""

    samples: int
    deterministic: bool
    """Ran twice with other seeds: same bytes, and no generator moved."""
    reproducible: bool
    """Same seed, other order, fresh worker: same bytes."""
    seconds_per_sample: float
    bytes_in: int
    bytes_out: int


class TransformInfo(msgspec.Struct, frozen=True):
    """One registered version."""

    name: str
    digest: str
    """All 64 hex digits."""
    uuid: str
    """`name@` + 12 digits (+ `,args=`), the start of a spec."""
    kind: Kind
    decoder: str | None
    fields: list[str] | None
    python: str
    modules: list[str]
    environment: str
    label: str
    created: float
    by_path: bool = False
    args: dict[str, object] | None = None
    parts: list[str] = []
    """Of a pipeline: the uuids of its parts, in order."""
    probe: ProbeReport | None = None
    packages: list[str] = []
    """As asked for, in normal form."""
    locked: list[str] = []
    """What they were resolved to, `name==version` each."""


Stage = Literal["fetch", "read", "decode", "user", "encode", "wait", "send", "keep"]
"""Where time goes: in the bucket, in workers (four), in the queue for one, at the reader, on the results' disk."""


class Bottleneck(msgspec.Struct, frozen=True):
    """The stage that holds runs up."""

    stage: Stage
    label: str
    """For people: `user code`, `the reader`."""
    share: float
    """Of the time by the clock, 0 to 1."""
    text: str
    """A sentence with the figure that it rests on."""


class TransformStatistics(msgspec.Struct, frozen=True):
    """Totals of one version since the node started.

    Seconds in read, decode, user and encode are summed over workers; all others are by the clock, summed over runs.
    """

    runs: int = 0
    samples: int = 0
    failures: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds_read: float = 0.0
    seconds_decode: float = 0.0
    seconds_user: float = 0.0
    seconds_encode: float = 0.0
    dropped: int = 0
    """Samples that the function left out."""
    seconds: float = 0.0
    """Of runs, until a reader has everything."""
    seconds_fetch: float = 0.0
    """Waited for the object's bytes."""
    seconds_wait: float = 0.0
    """Waited for a worker."""
    seconds_send: float = 0.0
    """The fastest reader had not taken what was ready."""
    seconds_keep: float = 0.0
    """Waited for the disk that results are kept on."""
    bottleneck: Bottleneck | None = None
    """None: too little has happened."""


class RunInfo(msgspec.Struct, frozen=True):
    """One run that goes on, or whose readers do."""

    id: str
    """As in `Shardmill-Run`."""
    transform: str
    """`name@` + 12 digits (+ `,args=`)."""
    spec: str
    bucket: str
    object: str
    state: Literal["running", "ended", "failed"]
    readers: int
    ahead: bool
    """Begun because it was announced; nobody has asked for it yet."""
    shared: bool
    """Others who ask for the same join it."""
    started: float
    done: float
    """Of the object, 0 to 1; 0 where it is not known."""
    statistics: TransformStatistics
    """Of this run."""
    rate: float
    """Samples a second from the start to the last one, whatever their outcome."""
    published: int
    """Bytes that readers may have."""
    taken: int
    """Bytes that the fastest reader has."""


class Runs(msgspec.Struct, frozen=True):
    """`GET /api/runs`: the oldest first."""

    time: float
    runs: list[RunInfo]
    lanes: int
    """Workers that may be at work at once."""
    busy: int
    """Workers at work now."""
    workers: dict[str, int]
    """Environment → processes, those that wait for work included."""
    transforms: dict[str, TransformStatistics]
    """Name → totals of all its versions since the node started, if any ran."""


class TransformDetails(msgspec.Struct, frozen=True):
    transform: TransformInfo
    statistics: TransformStatistics

    @property
    def uuid(self) -> str:
        """Of the version, for URLs: `client.object_url(bucket, name, client.transforms.get("augment").uuid)`."""
        return self.transform.uuid


class Transforms(msgspec.Struct, frozen=True):
    transforms: list[TransformInfo]


class FailureInfo(msgspec.Struct, frozen=True):
    """One failed sample or run."""

    time: float
    request: str
    transform: str
    """`name@` + 12 digits (+ `,args=`)."""
    bucket: str
    object: str
    """Key of the shard."""
    version: str
    """Source version of the shard."""
    sample: str | None
    """Key of the sample; None when the run itself failed."""
    ordinal: int | None
    message: str
    traceback: str | None
    seed: int | None = None
    output: str | None = None
    """The end of what the function printed."""
    ended_run: bool = False
    """The run failed by it; otherwise the sample was left out."""


class Failures(msgspec.Struct, frozen=True):
    failures: list[FailureInfo]
    total: int
    """All that matched; the first 100 of a version are kept in full, later ones only counted."""


class ResultInfo(msgspec.Struct, frozen=True):
    """One kept result: a transformed object, finished."""

    key: str
    """64 hex digits over what decides its bytes."""
    transform: str
    """`name@` + 12 digits (+ `,args=`)."""
    spec: str
    """As in its URLs, without `k`."""
    bucket: str
    object: str
    """Key of the object that was transformed."""
    version: str
    """Its source version."""
    environment: str
    size: int
    etag: str
    made: float
    used: float
    """Of the last reader who opened it."""
    scratch: bool
    """Kept for a while only, unless a second reader comes."""
    readers: int
    """Who have it open now; as long as there is one it is not evicted."""


class Results(msgspec.Struct, frozen=True):
    """`GET /api/results`: those that match, the last used first."""

    results: list[ResultInfo]
    total: int
    """All that match, those beyond `limit` included."""
    bytes: int
    """Of all that match."""
    used: int
    """Bytes that all results and those in the making take."""
    capacity: int
    """Bytes that they may take; 0 where none are kept."""


class RemovedResults(msgspec.Struct, frozen=True):
    """`DELETE /api/results`."""

    removed: int
    bytes: int


class CacheBucket(msgspec.Struct, frozen=True):
    """What is on the disk of a bucket with a store behind it, and what happened since the node started."""

    bucket: str
    objects: int
    bytes: int
    """Of the disk, with what is reserved for what arrives."""
    hits: int
    """Readings that found all they wanted on the disk."""
    misses: int
    passed: int
    """Of these, served through memory and not kept, for want of room."""
    revalidated: int
    """Versions that the store was asked about, and still had."""
    served: int
    """Bytes for readers, transforms included."""
    filling: int
    """Objects that arrive."""
    evicted: int
    """Objects that left for others."""
    repaired: int
    """Blocks that were found damaged on the disk, and fetched again."""
    reads: int
    """Of the store at once that a large object is brought with; found by trying."""
    fetched: int
    """Bytes from the store that were kept or passed on."""
    fetches: int
    """Readings of the store."""
    fetch_seconds: float
    """Until the heads of their answers, all together."""
    requests: dict[str, int]
    """All calls of the store by how they ended: `ok` or the code of the error."""
    written: int
    """Bytes put into the store."""


class CacheInfo(msgspec.Struct, frozen=True):
    """`GET /api/cache`."""

    used: int
    """Bytes of the disk."""
    high: int
    """Bytes that are never passed."""
    capacity: int
    buckets: list[CacheBucket]


class CachedInfo(msgspec.Struct, frozen=True):
    """An object of which something is on the disk."""

    key: str
    size: int
    cached: int
    """Bytes of it that are on the disk."""
    version: str
    """Source version."""
    etag: str | None
    used: float
    """Unix time of the last reading."""
    age: float | None
    """Seconds since the store was asked whether it is current; None: not since the node started."""
    readers: int
    """Who have it open now; as long as there is one it is not evicted."""
    pinned: bool


class CachedPage(msgspec.Struct, frozen=True):
    """`GET /api/cache/objects`: by key."""

    objects: list[CachedInfo]
    next: str | None
    """Pass as `after` for the next page; None at the end."""


class CachedDetails(msgspec.Struct, frozen=True):
    """`GET /api/cache/object`."""

    object: CachedInfo | None
    """None: nothing of it is on the disk, or there is no store behind its bucket."""
    ranges: list[tuple[int, int]]
    """Bytes [start, stop) that are there, in order."""


class EnvironmentInfo(msgspec.Struct, frozen=True):
    name: str
    state: Literal["cold", "starting", "warm", "failed"]
    python: str | None
    id: str | None
    """Hash of Python, ABI, architecture, CPU level and the installed distributions."""
    interpreter: str
    """File name of the interpreter, and the virtual environment it is of: `python of torch-venv`; no directories."""
    preloaded: list[str]
    error: str | None = None
    transforms: list[str] = []
    """Versions that run in it, `name@` + 12 digits (+ `,args=`)."""
    packages: list[str] | None = None
    """What the node has built it of, `name==version` each; None: it was given to the node."""
    bytes: int | None = None
    """On disk, of one that the node has built."""
    distributions: int | None = None
    """How many it can import from, once it has started."""
    created: float | None = None
    used: float | None = None


class EnvironmentList(msgspec.Struct, frozen=True):
    environments: list[EnvironmentInfo]


class ConfigInfo(msgspec.Struct, frozen=True):
    """`GET /api/config`; secrets are masked."""

    version: str
    workers: int
    settings: dict[str, object]
    environments: list[EnvironmentInfo]
    isolation: dict[str, bool]
    """Layers around user code: name → active."""
