"""How many reads at once: as many as bring more, tried again later, never none and never too many."""

import pytest

from shardmill.storage.cache.width import MOST, Width

MIB = 1 << 20


def play(width: Width, seconds: int, useful: int, start: float = 0.0) -> list[int]:
    """Reads of 10 MiB/s each, of which only so many bring more; returns the widths once a second."""
    found = []
    for tenth in range(seconds * 10):
        reads = width.reads
        width.add(min(reads, useful) * MIB, start + tenth / 10, reads)
        if tenth % 10 == 0:
            found.append(width.reads)
    return found


@pytest.mark.parametrize("useful", [2, 3, 5, 7])
def test_it_becomes_as_wide_as_brings_more_and_tries_one_more_now_and_then(useful: int) -> None:
    settled = play(Width(), 80, useful)[20:]
    assert set(settled) == {useful, useful + 1}
    assert settled.count(useful) > 10 * settled.count(useful + 1)


def test_where_more_reads_bring_nothing_there_are_few() -> None:
    assert max(play(Width(), 80, 1)) <= 3


def test_a_store_that_gives_more_without_end_is_asked_by_no_more_than_the_most() -> None:
    assert max(play(Width(), 120, 1000)) == MOST


def test_a_store_that_gets_faster_later_is_noticed() -> None:
    width = Width()
    assert max(play(width, 40, 1)) <= 3
    assert play(width, 80, 4, start=40.0)[-1] >= 4


def test_what_came_with_fewer_reads_under_way_teaches_nothing() -> None:
    width = Width(4)
    for tenth in range(100):
        width.add(MIB, tenth / 10, 3)
    assert width.reads == 4
