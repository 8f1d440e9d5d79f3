"""Work units between runs and workers, and the protocol by which a pool works for a run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from shardmill.etl.environments.environments import Environment
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.versions.registry import Version
from shardmill.shards.grouping import Sample

LossKind = Literal["late", "memory", "printed", "processes", "exited", "protocol"]


@dataclass(slots=True)
class Batch:
    """Consecutive samples given to one worker. Results come in parts; what is not done yet is `samples`."""

    number: int
    samples: list[Sample]
    attempt: int = 0
    """How often a worker was lost over it."""
    done: int = 0


@dataclass(frozen=True, slots=True)
class Out:
    """A sample that gave one or more output samples."""

    pieces: list[Piece]
    first_key: str
    last_key: str
    bytes_in: int
    moved: bool
    """A random generator was used (probes only)."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A sample that gave nothing, by the function's choice."""

    bytes_in: int
    moved: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample whose decoding, function or encoding raised."""

    message: str
    traceback: str | None
    fatal: bool = False
    """Not to be skipped: a cap was passed, or the shard changed."""
    output: str | None = field(default=None, repr=False)
    """The end of what a command wrote to its standard error."""


Result = Out | Dropped | Failed


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a worker is gone."""

    kind: LossKind
    message: str
    ordinal: int | None = None
    """The sample in work, if one was."""
    output: str | None = field(default=None, repr=False)
    """The end of what it printed."""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds a worker spent on a part of a batch."""

    read: float
    decode: float
    user: float
    encode: float


@dataclass(slots=True)
class Whole:
    """A whole object in one worker's hands: what of it may be read, and how much may be given."""

    size: int
    """Bytes of the object."""
    want: Callable[[int], None]
    """Told up to where the worker wants to read."""
    take: Callable[[list[Piece]], None]
    """Given the output, in order."""
    available: int = 0
    """Bytes of the object that are in place."""
    allowed: int = 0
    """Bytes of output that may be given, from the first on; never falls for one worker."""


class Work(Protocol):
    """What a pool works for: a run, or a probe."""

    @property
    def number(self) -> int:
        """Unique in the process; names the source to workers."""
        ...

    @property
    def version(self) -> Version: ...

    @property
    def environment(self) -> Environment: ...

    @property
    def environment_id(self) -> str:
        """What the environment must still be: its bytes are known by it."""
        ...

    @property
    def probing(self) -> bool: ...

    @property
    def is_ahead(self) -> bool:
        """It is done before anybody needs it, so it gives way to all that is needed."""
        ...

    @property
    def seed(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def source_key(self) -> str: ...

    @property
    def source_url(self) -> str: ...

    @property
    def source_descriptor(self) -> int: ...

    @property
    def whole(self) -> Whole | None:
        """The object, if it is given to a worker as a whole; None: it is given in batches of samples."""
        ...

    def has_batch(self, *, queued: bool = False) -> bool:
        """Whether `next_batch` would give one now; `queued`: to a worker that still has another one to do."""
        ...

    def next_batch(self) -> Batch | None: ...

    def on_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: StageSeconds) -> None:
        """Results of consecutive samples of a batch, in order."""
        ...

    def on_lost(self, batch: Batch, loss: Loss | None) -> None:
        """The worker is gone; None: the batch had not been started, or the loss was not its fault."""
        ...

    def on_load_failed(self, failure: Failed) -> None:
        """The function cannot be loaded in its environment."""
        ...

    def on_no_worker(self, error: Exception) -> None:
        """No worker could be started for it."""
        ...

    def on_tick(self, seconds: float, busy: bool) -> None:
        """Time passed; `busy`: workers have batches of it."""
        ...
