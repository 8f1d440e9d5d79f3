"""Reading a node's metrics, as far as commands show them."""

import re
from dataclasses import dataclass, field

_LINE = re.compile(r"(\w+)(?:\{(.*)\})? ([0-9.eE+-]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Series:
    """One value of one metric."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """All that `/metrics` said at one time."""

    series: list[Series] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> "Metrics":
        """Read Prometheus' text format; what is no value is passed over."""
        found = []
        for line in text.splitlines():
            match = _LINE.fullmatch(line.strip())
            if match:
                found.append(Series(match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])))
        return cls(found)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of a metric that have these labels; 0 if there is none."""
        return sum(item.value for item in self.series if item.name == name and item.labels.items() >= labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Values of a metric by one of its labels."""
        found: dict[str, float] = {}
        for item in self.series:
            if item.name == name:
                key = item.labels.get(label, "")
                found[key] = found.get(key, 0.0) + item.value
        return found
