"""Shares and batches: everything exactly once, as many batches for every rank, also after a change of ranks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.loader.plan import (
    Interval,
    Piece,
    Row,
    Stretch,
    batch_sizes,
    length,
    remaining,
    share,
    window_order,
    windows_of,
)


def samples_of(intervals: list[Interval]) -> list[int]:
    return [sample for start, stop in intervals for sample in range(start, stop)]


def read(intervals: list[Interval], stretch: Stretch, *, seed: int, epoch: int) -> list[list[list[int]]]:
    """Rank → batch → samples, done the long way."""
    total = length(intervals)
    found = []
    for rank in range(stretch.world_size):
        own = samples_of(share(intervals, rank, stretch.world_size))
        sizes = batch_sizes(total, rank, stretch.world_size, stretch.batch_size)
        batches, position = [], 0
        for group in windows_of(sizes, stretch.window):
            samples = own[position : position + sum(group)]
            if stretch.window:
                samples = [samples[offset] for offset in window_order(seed, epoch, samples[0], len(samples))]
            position += sum(group)
            for size in group:
                batches.append(samples[:size])
                samples = samples[size:]
        found.append(batches)
    return found


@given(
    total=st.integers(1, 300), world=st.integers(1, 7), batch=st.integers(1, 40), window=st.sampled_from([0, 10, 64])
)
def test_ranks_cover_everything_once_in_as_many_batches(total: int, world: int, batch: int, window: int) -> None:
    if total < world:
        with pytest.raises(ValueError, match="cannot be shared"):
            batch_sizes(total, 0, world, batch)
        return
    found = read([(0, total)], Stretch(world, batch, window, 0), seed=1, epoch=2)
    assert len({len(batches) for batches in found}) == 1
    assert sorted(sample for batches in found for one in batches for sample in one) == list(range(total))
    assert all(1 <= len(one) <= max(batch, 2 if batch == 1 else batch) for batches in found for one in batches)
    assert all(len(one) == batch for batches in found for one in batches[:-2])


@given(
    total=st.integers(12, 200),
    ranks=st.integers(1, 3),
    workers=st.integers(1, 4),
    batch=st.integers(1, 20),
    window=st.sampled_from([0, 30]),
    data=st.data(),
)
def test_workers_that_take_turns_may_stop_in_the_middle_of_a_round(
    total: int, ranks: int, workers: int, batch: int, window: int, data: st.DataObject
) -> None:
    stretch = Stretch(ranks * workers, batch, window, 0, workers=workers)
    found = read([(0, total)], stretch, seed=3, epoch=0)
    batches = data.draw(st.integers(0, workers * len(found[0])))
    given = []
    for rank in range(ranks):
        turns = [one for round in zip(*found[rank * workers : (rank + 1) * workers], strict=True) for one in round]
        given += [sample for one in turns[:batches] for sample in one]
    stretch = replace(stretch, batches=batches)
    assert sum(stretch.batches_of(rank) for rank in range(ranks * workers)) == ranks * batches
    left = remaining([(0, total)], stretch, seed=3, epoch=0)
    assert sorted(given + samples_of(left)) == list(range(total))


@given(
    total=st.integers(8, 200),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch=st.integers(1, 20),
    window=st.sampled_from([0, 30]),
    data=st.data(),
)
def test_what_is_left_is_exactly_what_was_not_given(
    total: int, worlds: list[int], batch: int, window: int, data: st.DataObject
) -> None:
    intervals: list[Interval] = [(0, total)]
    seen: list[int] = []
    for world in worlds:
        if length(intervals) < world:
            break
        stretch = Stretch(world, batch, window, 0)
        found = read(intervals, stretch, seed=3, epoch=0)
        batches = data.draw(st.integers(0, len(found[0])))
        for rank in found:
            seen += [sample for one in rank[:batches] for sample in one]
        intervals = remaining(intervals, Stretch(world, batch, window, batches), seed=3, epoch=0)
        assert sorted(seen + samples_of(intervals)) == list(range(total))


def test_the_order_of_shards_comes_from_seed_and_epoch() -> None:
    counts = [5, 0, 3, 4, 2, 6]
    plain = Row.build(counts, seed=1, epoch=0, shuffle=False)
    assert plain.order == (0, 1, 2, 3, 4, 5)
    assert plain.pieces([(3, 10)]) == [Piece(0, 3, 2), Piece(2, 0, 3), Piece(3, 0, 2)]
    orders = {Row.build(counts, seed=seed, epoch=epoch, shuffle=True).order for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) > 3
    assert Row.build(counts, seed=1, epoch=1, shuffle=True) == Row.build(counts, seed=1, epoch=1, shuffle=True)
    assert Row.build(counts, seed=1, epoch=1, shuffle=True).size == 20


def test_what_does_not_fill_a_batch_can_be_left_out_of_every_rank() -> None:
    assert batch_sizes(131, 0, 2, 32, drop_last=True) == batch_sizes(131, 1, 2, 32, drop_last=True) == [32, 32]
    assert batch_sizes(129, 0, 2, 64) == [32, 32]
    assert batch_sizes(129, 1, 2, 64) == [64, 1]
