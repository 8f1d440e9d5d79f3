"""What each rank reads in an epoch, and in which batches: pure arithmetic over numbers of source samples.

An epoch is one long row of source samples: the shards in their order, each from first sample to last. Ranks take
contiguous shares of it whose sizes differ by one at most, cut into the same number of batches. Where ranks stopped is
a matter of how many batches each has had, so what is left can be shared out anew among any number of ranks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Interval = tuple[int, int]
"""Samples [start, stop) of an epoch's row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive samples of one shard."""

    shard: int
    """Its place in the list of URLs."""
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Row:
    """The shards of an epoch, one behind the other."""

    order: tuple[int, ...]
    """Numbers of shards."""
    starts: tuple[int, ...]
    """Where each begins, and one past the last sample."""

    @classmethod
    def build(cls, counts: Sequence[int], *, seed: int, epoch: int, shuffle: bool) -> "Row":
        """The row of an epoch; `shuffle`: shards in an order drawn from seed and epoch."""
        order = list(range(len(counts)))
        if shuffle:
            random.Random(f"{seed}/{epoch}").shuffle(order)
        return cls(tuple(order), tuple(accumulate((counts[shard] for shard in order), initial=0)))

    @property
    def size(self) -> int:
        return self.starts[-1]

    def pieces(self, intervals: Sequence[Interval]) -> list[Piece]:
        """The intervals as parts of shards, in the same order."""
        found = []
        for start, stop in intervals:
            for position, shard in enumerate(self.order):
                begin, end = max(start, self.starts[position]), min(stop, self.starts[position + 1])
                if begin < end:
                    found.append(Piece(shard, begin - self.starts[position], end - begin))
        return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """How a part of an epoch was read: by so many ranks, so many batches each.

    `workers` consecutive ranks may be one group, whose batches are taken in turn; `batches` are then those of a group.
    """

    world_size: int
    batch_size: int
    window: int
    batches: int
    drop_last: bool = False
    workers: int = 1

    def batches_of(self, rank: int) -> int:
        """How many of them were of this rank."""
        turn = rank % self.workers
        return (self.batches + self.workers - 1 - turn) // self.workers


def share(intervals: Sequence[Interval], rank: int, world_size: int) -> list[Interval]:
    """The contiguous share of one rank; sizes differ by one at most."""
    total = length(intervals)
    return cut(intervals, total * rank // world_size, total * (rank + 1) // world_size)


def length(intervals: Sequence[Interval]) -> int:
    """Samples in all."""
    return sum(stop - start for start, stop in intervals)


def batch_sizes(total: int, rank: int, world_size: int, batch_size: int, *, drop_last: bool = False) -> list[int]:
    """Sizes of one rank's batches; every rank has the same number of them.

    All are full but the last. Where some ranks have one sample more than fills their batches, the last two batches of
    the others share what is left, so that nobody has a batch less; with `batch_size` 1 their last ones have two.

    Args:
        total: Samples of all ranks.
        rank: Whose.
        world_size: Ranks.
        batch_size: Samples.
        drop_last: Leave out what does not fill a batch, of every rank.

    Raises:
        ValueError: There are fewer samples than ranks.
    """
    if total and total < world_size:
        raise ValueError(f"{total} samples cannot be shared among {world_size} ranks; each needs at least one")
    shortest, longest = total // world_size, -(-total // world_size)
    own = total * (rank + 1) // world_size - total * rank // world_size
    if drop_last:
        return [batch_size] * (shortest // batch_size)
    count = -(-longest // batch_size)
    if batch_size == 1:
        count = shortest
    if not count:
        return []
    full = [batch_size] * (count - 1)
    rest = own - batch_size * (count - 1)
    if rest > 0:
        return [*full, rest]
    half = batch_size // 2
    return [*full[:-1], batch_size - half, half]


def window_order(seed: int, epoch: int, first: int, size: int) -> list[int]:
    """The order in which the samples of a window are given, drawn from seed, epoch and its first sample."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}/{first}").shuffle(order)
    return order


def windows_of(sizes: Sequence[int], window: int) -> list[list[int]]:
    """Batches by window: consecutive ones of about `window` samples together; 0: each for itself."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= window:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def remaining(intervals: Sequence[Interval], stretch: Stretch, *, seed: int, epoch: int) -> list[Interval]:
    """What is left of the intervals after every group of ranks has had `stretch.batches`, rank behind rank."""
    total, left = length(intervals), []
    for rank in range(stretch.world_size):
        own = share(intervals, rank, stretch.world_size)
        sizes = batch_sizes(total, rank, stretch.world_size, stretch.batch_size, drop_last=stretch.drop_last)
        left += _left_of(own, sizes, stretch.batches_of(rank), window=stretch.window, seed=seed, epoch=epoch)
    return left


def _left_of(
    own: list[Interval], sizes: list[int], batches: int, *, window: int, seed: int, epoch: int
) -> list[Interval]:
    done, position = batches, 0
    for group in windows_of(sizes, window):
        if done >= len(group):
            done -= len(group)
            position += sum(group)
            continue
        if not done:
            break
        size, given = sum(group), sum(group[:done])
        if not window:
            position += given
            break
        first = cut(own, position, position + 1)[0][0]
        order = window_order(seed, epoch, first, size)
        kept = sorted(order[given:])
        left = [piece for offset in kept for piece in cut(own, position + offset, position + offset + 1)]
        return _merged([*left, *cut(own, position + size, length(own))])
    return cut(own, position, length(own))


def cut(intervals: Sequence[Interval], start: int, stop: int) -> list[Interval]:
    """Samples [start, stop) of the intervals put one behind the other."""
    found, offset = [], 0
    for begin, end in intervals:
        low, high = max(start - offset, 0), min(stop - offset, end - begin)
        if low < high:
            found.append((begin + low, begin + high))
        offset += end - begin
    return found


def _merged(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
