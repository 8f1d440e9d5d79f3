"""Which stage holds runs up, and the figure that says so.

A stage holds a run up when what comes before it has work ready and what comes after it has none. By the clock that is
the state that lasted longest: readers who leave output lying, bytes of the object that do not come, a queue for
workers, or workers at work, and then the stage that takes most of that.
"""

from dataclasses import dataclass

from shardmill.core.api import Bottleneck, Stage
from shardmill.etl.runs.clock import Times

_LEAST_SECONDS = 0.01  # below, nothing can be told from the times

_LABELS: dict[Stage, str] = {
    "fetch": "the bucket",
    "read": "reading",
    "decode": "decoding",
    "user": "user code",
    "encode": "encoding",
    "wait": "worker cores",
    "send": "the reader",
    "keep": "the results' disk",
}
_FIGURES: dict[Stage, str] = {
    "fetch": "its bytes were waited for {share:.0%} of the time",
    "wait": "{share:.0%} of the time there was work and no worker free; what they do is mostly {work}",
    "send": "{share:.0%} of the time there was output that it had not taken",
    "keep": "it was waited for {share:.0%} of the time",
}


@dataclass(frozen=True, slots=True)
class WorkSeconds:
    """Seconds of workers, summed over them."""

    read: float = 0.0
    decode: float = 0.0
    user: float = 0.0
    encode: float = 0.0

    @property
    def total(self) -> float:
        return self.read + self.decode + self.user + self.encode


def wait_seconds(times: Times, work: WorkSeconds) -> float:
    """Seconds by the clock for which a run had work ready and no worker took it.

    While it queues, it gets the share of its workers that it gets all the time it is busy: what they worked, of what
    they could have worked. The rest of the queue's time it waited.
    """
    if not times.room:
        return 0.0
    return times.queued * max(0.0, 1.0 - work.total / times.room)


def find_bottleneck(times: Times, work: WorkSeconds, samples: int, decoded: str) -> Bottleneck | None:
    """The stage that holds runs up; None: too little has happened.

    Args:
        times: By the clock.
        work: Of workers.
        samples: That they worked on.
        decoded: What is decoded, for the name: `jpg`; empty if not known.
    """
    if times.total < _LEAST_SECONDS:
        return None
    waited = wait_seconds(times, work)
    working, part = _largest_of(work)
    lasted: dict[Stage, float] = {
        working: times.busy - waited,
        "fetch": times.starved,
        "wait": waited,
        "send": times.behind,
        "keep": times.keeping,
    }
    stage = max(lasted, key=lambda name: lasted[name])
    if lasted[stage] <= 0:
        return None
    share = min(1.0, lasted[stage] / times.total)
    label = _LABELS[working] + (f" {decoded}" if working == "decode" and decoded else "")
    each = f"{part / samples * 1000:.1f} ms a sample" if samples else "no sample is done yet"
    if stage == working:
        of_all = f", {part / work.total:.0%} of what workers did" if work.total else ""
        return Bottleneck(stage, label, share, f"{label}: {each}{of_all}")
    figure = _FIGURES[stage].format(share=share, work=f"{label}, {each}")
    return Bottleneck(stage, _LABELS[stage], share, f"{_LABELS[stage]}: {figure}")


def _largest_of(work: WorkSeconds) -> tuple[Stage, float]:
    """The worker's stage that took longest, the function itself where nothing is known."""
    parts: dict[Stage, float] = {"user": work.user, "decode": work.decode, "encode": work.encode, "read": work.read}
    stage = max(parts, key=lambda name: parts[name])
    return stage, parts[stage]
