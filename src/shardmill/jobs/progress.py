"""How a job stands: which item is next, whether it goes on, how fast. Takes values and times; waits for nothing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shardmill.core.jobs import JobEntry, ObjectFailure, RunningObject
from shardmill.jobs.kinds import Item

FIRST_ALL = 8
"""Items that end a job when they are the first and all fail: what comes will fail, too."""

Outcome = Literal["found", "made", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("found", "made", "failed")


@dataclass(slots=True)
class _Begun:
    item: Item
    time: float
    done: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast it goes."""

    rate: float
    """Bytes of sources a second."""
    time_left: float | None
    """Seconds."""


class Progress:
    """One go at a job.

    Args:
        items: All of them.
        now: Unix time.
    """

    def __init__(self, items: Sequence[Item], now: float) -> None:
        self.items = items
        self.entries: dict[str, JobEntry] = {}
        """Of items that are done, by key."""
        self.failures: dict[str, ObjectFailure] = {}
        self.counts: Counter[Outcome] = Counter()
        self.started = now
        self.bytes = sum(item.size for item in items)
        self.stopped_by: str | None = None
        """Why no further item is begun."""
        self.samples = self.sample_failures = self.bytes_out = self.bytes_made = 0
        """Of what is done; `bytes_made` of what was not found done."""
        self._next = 0
        self._begun: dict[str, _Begun] = {}
        self._bytes_by: Counter[Outcome] = Counter()

    def take(self, now: float) -> Item | None:
        """The next item, which is begun by this; None: there is none, or no more are to be begun."""
        if self.stopped_by is not None or self._next == len(self.items):
            return None
        item = self.items[self._next]
        self._next += 1
        self._begun[item.key] = _Begun(item, now)
        return item

    def report(self, item: Item, done: float) -> None:
        """So much of an item is done, 0 to 1."""
        self._begun[item.key].done = done

    def end(self, item: Item, outcome: Literal["found", "made"], entry: JobEntry) -> None:
        """It is done."""
        self.entries[item.key] = entry
        self.samples += entry.samples or 0
        self.sample_failures += entry.failures
        self.bytes_out += entry.bytes
        self.bytes_made += entry.bytes if outcome == "made" else 0
        self._count(item, outcome)

    def fail(self, item: Item, failure: ObjectFailure, *, ends_all: bool) -> None:
        """It could not be done; `ends_all`: nor could any other."""
        self.failures[item.key] = failure
        self._count(item, "failed")
        if ends_all:
            self.stop(failure.message)
        elif self.counts["failed"] == FIRST_ALL and not self.counts["found"] and not self.counts["made"]:
            self.stop(f"the first {FIRST_ALL} objects all failed; the last: {failure.message}")

    def stop(self, reason: str) -> None:
        """Begin no more; the first reason counts."""
        self.stopped_by = self.stopped_by or reason

    def _count(self, item: Item, outcome: Outcome) -> None:
        del self._begun[item.key]
        self.counts[outcome] += 1
        self._bytes_by[outcome] += item.size

    @property
    def error(self) -> str | None:
        """What is wrong when nothing goes on any more; None: nothing is."""
        if self.stopped_by is not None:
            return self.stopped_by
        failed = self.counts["failed"]
        if failed:
            return f"{failed} of {len(self.items)} objects failed"
        return None

    @property
    def running(self) -> list[RunningObject]:
        return [
            RunningObject(begun.item.key, begun.item.target, begun.done, begun.time) for begun in self._begun.values()
        ]

    @property
    def bytes_done(self) -> int:
        """Of sources: what is done, and of what is in work its part."""
        return self._bytes_by["found"] + self._bytes_by["made"] + int(self._bytes_in_work)

    def speed(self, now: float) -> Speed:
        """Since it began; what was found done counts for nothing."""
        rate = (self._bytes_by["made"] + self._bytes_in_work) / max(now - self.started, 1e-9)
        left = self.bytes - self.bytes_done - self._bytes_by["failed"]
        return Speed(rate, left / rate if rate else None)

    def in_order(self) -> Iterator[JobEntry]:
        """Entries in the order of the items."""
        return (self.entries[item.key] for item in self.items if item.key in self.entries)

    @property
    def _bytes_in_work(self) -> float:
        return sum(begun.item.size * begun.done for begun in self._begun.values())
