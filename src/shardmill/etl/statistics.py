"""Counts and seconds per version since the node started."""

from dataclasses import dataclass, field

from shardmill.core.api import TransformStatistics
from shardmill.core.sources import ResultStatistics


@dataclass(slots=True)
class VersionCounters:
    """One version's running totals; `snapshot` is what others see."""

    runs: int = 0
    samples: int = 0
    failures: int = 0
    dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """read, decode, user, encode"""

    def snapshot(self) -> TransformStatistics:
        read, decode, user, encode = self.seconds
        return TransformStatistics(
            self.runs, self.samples, self.failures, self.bytes_in, self.bytes_out, read, decode, user, encode
        )


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of the engine."""

    outcomes: dict[tuple[str, str], int]
    """(transform name, `ok` | `failed` | `dropped`) → samples."""
    runs: dict[str, int]
    """state (`running`, `ended`, `failed`, `abandoned`) → runs; `running` is now, the others since start."""
    workers: dict[str, int]
    """environment → worker processes now."""
    results: ResultStatistics | None
    """None: results are not kept."""
    reads: dict[str, int]
    """`hit` (a finished result), `joined` (a run of others) or `started` → readers of transformed objects."""
