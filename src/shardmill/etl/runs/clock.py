"""Where the time of runs goes, by the clock: what they waited for, and for how long workers had something to do.

States overlap: a reader may take its time while workers go on. Which of them holds a run up is told from how long each
lasted; see `etl.bottleneck`.
"""

from dataclasses import dataclass

# What is so at one moment of a run. Plain numbers, since flags of an enum cost a microsecond each.
BUSY = 1
"""Workers have something of it to do, or could have."""
QUEUED = 2
"""It has more to do than workers have taken."""
STARVED = 4
"""It waits for the object's bytes."""
KEEPING = 8
"""It waits for its output to be written to disk."""
BEHIND = 16
"""There is output that even its fastest reader has not taken."""


@dataclass(slots=True)
class Times:
    """Seconds by the clock; of several runs their sums."""

    total: float = 0.0
    """From the start until a reader has everything, or nobody reads."""
    busy: float = 0.0
    queued: float = 0.0
    starved: float = 0.0
    keeping: float = 0.0
    behind: float = 0.0
    room: float = 0.0
    """Of workers: busy seconds × the workers that a run can use."""

    def add(self, other: "Times") -> None:
        self.total += other.total
        self.busy += other.busy
        self.queued += other.queued
        self.starved += other.starved
        self.keeping += other.keeping
        self.behind += other.behind
        self.room += other.room


class RunClock:
    """The times of one run.

    Args:
        now: Seconds of a clock that only goes forward, here and in `mark`.
        lanes: Workers that the run can use at once.
    """

    def __init__(self, now: float, lanes: int) -> None:
        self.is_stopped = False
        self._times = Times()
        self._lanes = lanes
        self._since = now
        self._state = 0

    def mark(self, now: float, state: int) -> None:
        """From now on it is so (bits of the above); called whenever something changed."""
        if not self.is_stopped:
            self._count(self._times, now)
            self._since, self._state = now, state

    def stop(self, now: float) -> None:
        """It is over; what comes later does not count."""
        self.mark(now, 0)
        self.is_stopped = True

    def read(self, now: float) -> Times:
        """The times until now."""
        times = Times()
        times.add(self._times)
        if not self.is_stopped:
            self._count(times, now)
        return times

    def _count(self, times: Times, now: float) -> None:
        passed, state = now - self._since, self._state
        times.total += passed
        if state & BUSY:
            times.busy += passed
            times.room += passed * self._lanes
        if state & QUEUED:
            times.queued += passed
        if state & STARVED:
            times.starved += passed
        if state & KEEPING:
            times.keeping += passed
        if state & BEHIND:
            times.behind += passed
