"""Shared memory: regions never overlap, everything given back is free again."""

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardmill.worker.arena import ALIGN, HEADER, Arena, read_progress

SIZE = HEADER + 64 * ALIGN


def new_arena(size: int = SIZE, successor_of: Arena | None = None) -> Arena:
    descriptor = os.memfd_create("arena")
    try:
        os.ftruncate(descriptor, size)
        return Arena(descriptor, size, successor_of=successor_of)
    finally:
        os.close(descriptor)


class ArenaMachine(RuleBasedStateMachine):
    """Against a dictionary of what is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = new_arena()
        self.taken: dict[int, int] = {}

    def teardown(self) -> None:
        self.arena.close()

    @rule(size=st.integers(0, SIZE + 100))
    def allocate(self, size: int) -> None:
        offset = self.arena.allocate(size)
        if offset is None:
            # First fit: no gap between what is taken has room.
            need = -(-max(size, 1) // ALIGN) * ALIGN
            ends = [HEADER, *(start + length for start, length in sorted(self.taken.items()))]
            starts = [*sorted(self.taken), SIZE]
            assert all(start - end < need for end, start in zip(ends, starts, strict=True))
            return
        assert offset >= HEADER
        assert offset % ALIGN == 0
        assert offset + size <= SIZE
        self.taken[offset] = -(-max(size, 1) // ALIGN) * ALIGN

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        del self.taken[offset]
        self.arena.release(offset)

    @rule(offset=st.integers(0, SIZE))
    def release_what_is_not_taken(self, offset: int) -> None:
        if offset not in self.taken:
            self.arena.release(offset)

    @invariant()
    def nothing_overlaps(self) -> None:
        assert self.arena.taken == len(self.taken)
        stop = HEADER
        for start, length in sorted(self.taken.items()):
            assert start >= stop
            stop = start + length


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_empty_arena_holds_what_it_says_fits() -> None:
    arena = new_arena()
    largest = max(size for size in range(SIZE) if arena.fits(size))
    offset = arena.allocate(largest)
    assert offset == HEADER
    arena.close()


def test_progress_is_seen_through_the_memory_and_outlives_a_replacement() -> None:
    arena = new_arena()
    assert read_progress(arena.view) == (0, 0, 0)
    arena.tick(3, 17)
    arena.tick(3, 18)
    assert read_progress(arena.view) == (3, 18, 2)
    larger = new_arena(SIZE * 2, successor_of=arena)
    arena.close()
    assert read_progress(larger.view) == (3, 18, 2)
    larger.tick(3, 19)
    assert read_progress(larger.view) == (3, 19, 3)
    larger.close()
