"""What holds runs up, told from times alone; and the clock that takes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.api import Stage
from shardmill.etl.runs.bottleneck import WorkSeconds, find_bottleneck, wait_seconds
from shardmill.etl.runs.clock import BEHIND, BUSY, KEEPING, QUEUED, STARVED, RunClock, Times

USER = WorkSeconds(read=0.1, decode=4, user=14, encode=1)


def times(total: float = 10, lanes: int = 2, **states: float) -> Times:
    found = Times(total=total, **states)
    found.room = found.busy * lanes
    return found


@pytest.mark.parametrize(
    ("found", "work", "stage", "label", "figure"),
    [
        # Workers are busy all the time, and readers take what comes.
        (times(busy=10, queued=9, behind=2), USER, "user", "user code", "140.0 ms a sample, 73% of what workers did"),
        (
            times(busy=10, queued=9, behind=3),
            WorkSeconds(0.1, 14, 4, 1),
            "decode",
            "decoding jpg",
            "140.0 ms a sample, 73% of what workers did",
        ),
        (times(busy=10, queued=9), WorkSeconds(0, 2, 3, 14), "encode", "encoding", "140.0 ms a sample"),
        (times(busy=10, queued=9), WorkSeconds(14, 2, 3, 0), "read", "reading", "140.0 ms a sample"),
        # A shard of few samples: all are given to workers at once, so that nothing queues.
        (times(total=1, busy=0.9, queued=0, behind=0.1), WorkSeconds(0, 0.2, 1.2, 0.1), "user", "user code", "12.0 ms"),
        # The reader is slow: its window is full, and workers wait for it.
        (times(busy=3, queued=1, behind=9.8), WorkSeconds(0, 1, 4, 0.5), "send", "the reader", "98% of the time"),
        # The same, but all fits into the window: the run is over before a tenth is read.
        (times(busy=0.5, queued=0.4, behind=9.9), WorkSeconds(0, 0.2, 0.6, 0.1), "send", "the reader", "99%"),
        # The origin is slow: workers have nothing for most of the time.
        (times(busy=2, queued=0.1, starved=8, behind=1), USER, "fetch", "the bucket", "80% of the time"),
        # Other runs have the workers.
        (times(busy=10, queued=10, behind=1), WorkSeconds(0, 1, 3, 0.2), "wait", "worker cores", "79% of the time"),
        (times(busy=10, queued=10), WorkSeconds(0, 1, 3, 0.2), "wait", "worker cores", "mostly user code, 30.0 ms"),
        # Its workers are still being started.
        (times(total=2, busy=2, queued=2), WorkSeconds(), "wait", "worker cores", "100% of the time"),
        # The disk of results is slower than the workers.
        (times(busy=3, queued=0, keeping=7), USER, "keep", "the results' disk", "70% of the time"),
        # Work that reports nothing before its end.
        (times(total=5, busy=5, queued=0, lanes=1), WorkSeconds(), "user", "user code", "0.0 ms a sample"),
    ],
)
def test_the_stage_that_lasted_longest_is_named_with_its_figure(
    found: Times, work: WorkSeconds, stage: Stage, label: str, figure: str
) -> None:
    bottleneck = find_bottleneck(found, work, 100, "jpg")
    assert bottleneck is not None
    assert (bottleneck.stage, bottleneck.label) == (stage, label)
    assert bottleneck.text.startswith(f"{label}: ")
    assert figure in bottleneck.text


def test_before_anything_happened_nothing_is_named() -> None:
    assert find_bottleneck(Times(), WorkSeconds(), 0, "") is None
    assert find_bottleneck(times(total=0.001, busy=0.001), USER, 1, "jpg") is None
    assert find_bottleneck(times(total=5), WorkSeconds(), 0, "") is None, "nobody reads, and nothing is to do"


def test_what_is_not_known_is_not_named() -> None:
    found = find_bottleneck(times(busy=10), WorkSeconds(0, 9, 0, 0), 0, "")
    assert found is not None
    assert found.text == "decoding: no sample is done yet, 100% of what workers did"


SECONDS = st.floats(0, 1e6)


@given(
    total=SECONDS, busy=SECONDS, queued=SECONDS, starved=SECONDS, keeping=SECONDS, behind=SECONDS,
    work=st.builds(WorkSeconds, SECONDS, SECONDS, SECONDS, SECONDS), lanes=st.integers(1, 64), samples=st.integers(0, 9),
)  # fmt: skip
def test_shares_are_shares_whatever_the_times(
    total: float, busy: float, queued: float, starved: float, keeping: float, behind: float,
    work: WorkSeconds, lanes: int, samples: int,
) -> None:  # fmt: skip
    found = times(total, lanes, busy=busy, queued=queued, starved=starved, keeping=keeping, behind=behind)
    assert 0 <= wait_seconds(found, work) <= queued
    bottleneck = find_bottleneck(found, work, samples, "jpg")
    if bottleneck is not None:
        assert 0 < bottleneck.share <= 1


def test_the_clock_counts_each_state_for_as_long_as_it_lasts() -> None:
    clock = RunClock(100.0, lanes=4)
    clock.mark(101, STARVED)
    clock.mark(103, BUSY | QUEUED)
    clock.mark(106, BUSY | BEHIND)
    clock.mark(110, KEEPING | BEHIND)
    read = clock.read(115)
    assert read == Times(total=15, busy=7, queued=3, starved=2, keeping=5, behind=9, room=28)
    assert clock.read(115) == read, "reading changes nothing"
    clock.stop(120)
    assert clock.read(120) == Times(total=20, busy=7, queued=3, starved=2, keeping=10, behind=14, room=28)
    clock.mark(130, BUSY)
    assert clock.read(140).total == 20, "what comes after the end does not count"


def test_times_of_several_runs_add_up() -> None:
    total = Times()
    for _ in range(3):
        total.add(Times(1, 2, 3, 4, 5, 6, 7))
    assert total == Times(3, 6, 9, 12, 15, 18, 21)
