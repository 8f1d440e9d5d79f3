"""Numbers of a run as a table: medians with their range, never a single best."""

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

QUIET_SECONDS = 0.2  # for the node to end what a reader has left


@dataclass
class Samples:
    """Values of one quantity, one a round."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    samples: Samples
    unit: str
    """Empty for a ratio."""

    def cells(self) -> tuple[str, str, str]:
        values = self.samples.values
        return (
            self.what,
            f"{self._text(self.samples.median)}{f' {self.unit}' if self.unit else ''}",
            f"{self._text(min(values))} – {self._text(max(values))}",
        )

    def _text(self, value: float) -> str:
        return f"{value:.2f}" if not self.unit else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def markdown(rows: list[Row]) -> str:
    lines = ["| | median | range |", "|---|---|---|"]
    lines += [f"| {what} | {median} | {extremes} |" for what, median, extremes in (row.cells() for row in rows)]
    return "\n".join(lines)


def resident(pid: int) -> int:
    """Bytes of memory of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_quiet() -> None:
    """Let what the last measurement left come to its end."""
    time.sleep(QUIET_SECONDS)
