"""What a run over a whole object decides, without workers: what may be given, what is sent, what is tried again."""

import math
import random

import pytest

from shardmill.core.errors import TransformFailed
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.runs.holding import HOLD
from shardmill.etl.runs.object_state import ObjectState
from shardmill.etl.workers.batches import Batch, Failed, Loss

MIB = 1 << 20


class Arena:
    """Counts the pieces that are out."""

    def __init__(self) -> None:
        self.out = 0

    def piece(self, data: bytes) -> Piece:
        self.out += 1
        return Piece(memoryview(data), self.out, 0, self._on_release)

    def _on_release(self, _: Piece) -> None:
        self.out -= 1


def state_of(*, window: int = 4 * MIB, max_output: int = 1 << 40) -> ObjectState:
    return ObjectState(window=window, max_output=max_output)


def taken(state: ObjectState) -> bytes:
    """All that may be sent, given back at once."""
    data = bytearray()
    while (chunk := state.take_chunk()) is not None:
        data += chunk.data
        state.give_back(chunk)
    return bytes(data)


def begun(state: ObjectState) -> Batch:
    batch = state.next_batch()
    assert batch is not None
    return batch


@pytest.mark.parametrize("largest", [1000, 70_000, 600_000])
def test_what_is_sent_is_what_was_given_whatever_the_pieces(largest: int) -> None:
    order, arena = random.Random(largest), Arena()
    state, given, sent = state_of(), bytearray(), bytearray()
    begun(state)
    while len(given) < 3 * MIB:
        data = order.randbytes(order.randint(1, largest))
        given += data
        state.add_pieces([arena.piece(data)])
        sent += taken(state)
        assert len(given) - len(sent) >= min(HOLD, len(given))
        assert len(given) - len(sent) <= HOLD + 1
        assert state.outstanding == 0
        assert arena.out == 0
    state.finish()
    sent += taken(state)
    assert state.phase == "ended"
    assert sent == given
    assert state.bytes_out == len(given)


def test_only_one_worker_gets_the_object() -> None:
    state = state_of()
    assert state.has_batch()
    begun(state)
    assert not state.has_batch()
    assert state.next_batch() is None


def test_output_is_allowed_as_far_as_the_window_has_room() -> None:
    state, arena = state_of(window=2 * MIB), Arena()
    begun(state)
    assert state.allowed == 2 * MIB
    while state.framed < state.allowed:
        state.add_pieces([arena.piece(b"\xff" * min(400_000, state.allowed - state.framed))])
    assert state.outstanding >= 2 * MIB - 1
    assert state.allowed == state.framed
    taken(state)
    assert state.allowed == state.framed + 2 * MIB


def test_output_is_allowed_as_far_as_readers_and_disk_are() -> None:
    state, arena = state_of(), Arena()
    begun(state)
    state.limit = MIB
    assert state.allowed == MIB
    state.add_pieces([arena.piece(b"\xff" * MIB)])
    taken(state)
    # What is held back does not count, or a small limit could never be reached.
    assert state.allowed == MIB + (MIB - state.bytes_out)
    state.limit = math.inf
    assert state.allowed == MIB + 4 * MIB


def test_the_cap_on_output_ends_it_and_would_again() -> None:
    state, arena = state_of(max_output=MIB), Arena()
    begun(state)
    state.add_pieces([arena.piece(b"\xff" * MIB)])
    state.add_pieces([arena.piece(b"\xff"), arena.piece(b"\xff")])
    assert state.phase == "failed"
    assert state.is_fault_of_input
    assert state.error is not None
    assert "max_object_output" in state.error.message
    assert len(taken(state)) == MIB - HOLD - 1
    assert arena.out == 0


def test_a_failure_sends_nothing_of_what_was_held_back() -> None:
    state, arena = state_of(), Arena()
    begun(state)
    state.add_pieces([arena.piece(b"\xff" * HOLD)])
    state.add_failure(Failed("no", "Traceback", output="words"))
    state.finish()
    assert taken(state) == b""
    (failure,) = state.failures
    assert (failure.message, failure.traceback, failure.output, failure.ended_run) == ("no", "Traceback", "words", True)
    assert isinstance(state.error, TransformFailed)
    assert state.is_fault_of_input


@pytest.mark.parametrize("given", [0, HOLD])
def test_a_lost_worker_is_replaced_once_while_nothing_was_given_out(given: int) -> None:
    state, arena = state_of(), Arena()
    loss = Loss("exited", "was killed")
    state.add_pieces([])
    first = begun(state)
    state.add_pieces([arena.piece(b"\xff" * given)] if given else [])
    state.lose(first, loss)
    second = begun(state)
    assert (second.attempt, state.framed) == (1, 0)
    # Not by its own fault: that costs no attempt.
    state.lose(second, None)
    third = begun(state)
    assert third.attempt == 1
    state.lose(third, loss)
    assert state.phase == "failed"
    assert not state.is_fault_of_input
    assert state.error is not None
    assert state.error.message == "was killed; it was tried 2 times"
    assert [failure.message for failure in state.failures] == [state.error.message]


@pytest.mark.parametrize("loss", [Loss("exited", "was killed"), None])
def test_a_lost_worker_is_not_replaced_once_bytes_were_given_out(loss: Loss | None) -> None:
    state, arena = state_of(), Arena()
    batch = begun(state)
    state.add_pieces([arena.piece(b"\xff" * (HOLD + 2))])
    state.lose(batch, loss)
    assert state.phase == "failed"
    assert not state.has_batch()


def test_nothing_is_kept_when_nobody_reads() -> None:
    state, arena = state_of(), Arena()
    begun(state)
    state.add_pieces([arena.piece(b"\xff" * MIB)])
    assert arena.out == 1
    state.abandon()
    state.add_pieces([arena.piece(b"late")])
    assert arena.out == 0
    assert state.outstanding == 0
