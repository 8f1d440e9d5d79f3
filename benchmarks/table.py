"""Numbers of a run as a table: medians with their range, never a single best."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
    at_least: float | None = None
    """What the median is held to, if anything."""
    at_most: float | None = None
    contest: Literal["", "rate", "cost"] = ""
    """A ratio of shardmill's rate, or cost, to somebody else's."""
    bar: str = ""
    """Its label in the chart, if it has a bar there."""

    @property
    def is_met(self) -> bool | None:
        """Whether the median is what it is held to; None: it is held to nothing."""
        if self.at_least is None and self.at_most is None:
            return None
        median = self.samples.median
        return (self.at_least is None or median >= self.at_least) and (self.at_most is None or median <= self.at_most)

    @property
    def is_lost(self) -> bool:
        """Whether somebody else does it better."""
        median = self.samples.median
        return (self.contest == "rate" and median < 1) or (self.contest == "cost" and median > 1)

    def cells(self) -> tuple[str, ...]:
        values = self.samples.values
        return (
            self.what,
            f"{self._text(self.samples.median)}{f' {self.unit}' if self.unit else ''}",
            f"{self._text(min(values))} – {self._text(max(values))}",
            self._target(),
        )

    def to_json(self) -> dict[str, Any]:
        values = [float(f"{value:.4g}") for value in self.samples.values]
        told: dict[str, Any] = {"what": self.what, "unit": self.unit, "values": values}
        optional = {"at_least": self.at_least, "at_most": self.at_most}
        told |= {name: value for name, value in optional.items() if value is not None}
        return told | ({"contest": self.contest} if self.contest else {}) | ({"bar": self.bar} if self.bar else {})

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Row":
        others = {name: value for name, value in told.items() if name != "values"}
        return cls(samples=Samples(told["values"]), **others)

    def _target(self) -> str:
        if self.is_met is None:
            return ""
        parts = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(parts) + ("" if self.is_met else ", missed")

    def _text(self, value: float) -> str:
        return f"{value:.2f}" if not self.unit else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def ratio_of(upper: Samples, lower: Samples) -> Samples:
    """Round by round."""
    return Samples([one / other for one, other in zip(upper.values, lower.values, strict=True)])


def markdown(rows: Sequence[Row]) -> str:
    has_target = any(row.is_met is not None for row in rows)
    lines = [_line(("", "median", "range", "held to")[: 3 + has_target])]
    lines.append("|---" * (3 + has_target) + "|")
    lines += [_line(row.cells()[: 3 + has_target]) for row in rows]
    return "\n".join(lines)


def wait_quiet() -> None:
    """Let what the last measurement left come to its end."""
    time.sleep(QUIET_SECONDS)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
