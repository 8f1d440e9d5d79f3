"""Counts and seconds, of one run or of all runs of a version since the node started."""

from dataclasses import dataclass, field

from shardmill.core.api import TransformStatistics
from shardmill.core.sources import ResultStatistics
from shardmill.etl.runs.bottleneck import WorkSeconds, find_bottleneck, wait_seconds
from shardmill.etl.runs.clock import Times
from shardmill.etl.workers.batches import StageSeconds


@dataclass(slots=True)
class Counters:
    """Running totals; `snapshot` is what others see."""

    runs: int = 0
    samples: int = 0
    failures: int = 0
    dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """read, decode, user, encode"""
    times: Times = field(default_factory=Times)
    """Of runs that are over."""
    decoded: str = ""
    """What is decoded: the name of the largest field of a sample."""

    @property
    def done(self) -> int:
        """Source samples, whatever became of them."""
        return self.samples + self.failures + self.dropped

    def add_seconds(self, seconds: StageSeconds) -> None:
        for position, value in enumerate((seconds.read, seconds.decode, seconds.user, seconds.encode)):
            self.seconds[position] += value

    def add(self, other: "Counters") -> None:
        self.runs += other.runs
        self.samples += other.samples
        self.failures += other.failures
        self.dropped += other.dropped
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        for position, value in enumerate(other.seconds):
            self.seconds[position] += value
        if other.times.total:
            self.times.add(other.times)
        self.decoded = other.decoded or self.decoded

    def snapshot(self) -> TransformStatistics:
        work = WorkSeconds(*self.seconds)
        times = self.times
        return TransformStatistics(
            runs=self.runs,
            samples=self.samples,
            failures=self.failures,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            seconds_read=work.read,
            seconds_decode=work.decode,
            seconds_user=work.user,
            seconds_encode=work.encode,
            dropped=self.dropped,
            seconds=times.total,
            seconds_fetch=times.starved,
            seconds_wait=wait_seconds(times, work),
            seconds_send=times.behind,
            seconds_keep=times.keeping,
            bottleneck=find_bottleneck(times, work, self.done, self.decoded),
        )


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of the engine."""

    transforms: dict[str, TransformStatistics]
    """Name of a transform → totals of all its versions."""
    runs: dict[str, int]
    """state (`running`, `ended`, `failed`, `abandoned`) → runs; `running` is now, the others since start."""
    workers: dict[str, int]
    """environment → worker processes now."""
    busy: int
    """Workers at work now."""
    results: ResultStatistics | None
    """None: results are not kept."""
    reads: dict[str, int]
    """`hit` (a finished result), `joined` (a run of others) or `started` → readers of transformed objects."""
