"""The run's decisions, with inline workers: order, holding back, budgets, policies, losses."""

import io
import random
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.errors import BadShard, ServerError, ShardmillError
from shardmill.core.specs import ErrorPolicy
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.runs.run_state import Budget, RunState
from shardmill.etl.workers.batches import Batch, Dropped, Failed, Loss, Out, Result
from shardmill.shards.framing import FramedField, frame_into, framed_size
from shardmill.shards.grouping import Field, Sample
from shardmill.shards.payloads import BytesPayload
from shardmill.shards.tar import Member


def build_sample(ordinal: int) -> Sample:
    member = Member(f"{ordinal:04d}.bin", 512, 1, 0, 0, 0o644, 0, 0, "", "")
    return Sample(f"{ordinal:04d}", ordinal, (Field("bin", member),))


def build_piece(key: str, payloads: dict[str, bytes]) -> Piece:
    fields = [FramedField(f"{key}.{name}", BytesPayload(data)) for name, data in payloads.items()]
    data = bytearray(framed_size(fields))
    cut = frame_into(memoryview(data), fields)
    return Piece(memoryview(data), 0, cut, lambda _: None)


def build_out(key: str, payloads: dict[str, bytes]) -> Out:
    return Out([build_piece(key, payloads)], key, key, 1, moved=False)


def new_state(policy: str = "fail", *, window: int = 1 << 20, lanes: int = 2, retries: int = 1) -> RunState:
    return RunState(policy=ErrorPolicy.parse(policy), window=window, lanes=lanes, retries=retries)


def drain(state: RunState) -> bytes:
    data = b""
    while (chunk := state.take_chunk()) is not None:
        data += bytes(chunk.data)
        state.give_back(chunk)
    return data


def finish(state: RunState, batch: Batch, results: list[Result]) -> None:
    """All results of a batch at once."""
    start, batch.done = batch.done, len(batch.samples)
    state.add_results(
        batch, [(sample.ordinal, result) for sample, result in zip(batch.samples[start:], results, strict=True)], 0.001
    )


def run_with(results: list[Result], state: RunState) -> bytes:
    state.add_samples([build_sample(ordinal) for ordinal in range(len(results))])
    state.end_index()
    data = b""
    while (batch := state.next_batch()) is not None:
        finish(state, batch, [results[sample.ordinal] for sample in batch.samples])
        data += drain(state)
    return data + drain(state)


def is_clean_end(data: bytes) -> bool:
    """Whether tarfile takes the bytes for a complete archive; it is the most lenient of the readers."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and len(file.read()) < member.size:
                    return False
    except (tarfile.TarError, EOFError):
        return False
    return True


@given(order=st.randoms(use_true_random=False), sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=20))
def test_output_is_in_sample_order_whatever_the_order_of_arrival(order: random.Random, sizes: list[int]) -> None:
    state = new_state(window=1 << 30)
    state.add_samples([build_sample(ordinal) for ordinal in range(len(sizes))])
    state.end_index()
    waiting: list[Batch] = []
    data = b""
    while True:
        while (batch := state.next_batch()) is not None:
            waiting.append(batch)
        if not waiting:
            break
        batch = waiting.pop(order.randrange(len(waiting)))
        if order.random() < 0.2 and batch.attempt == 0:
            state.lose(batch, Loss("exited", "killed"))
        else:
            finish(
                state,
                batch,
                [build_out(sample.key, {"a": bytes(sizes[sample.ordinal]), "b": b""}) for sample in batch.samples],
            )
        data += drain(state)
    data += drain(state)
    assert state.phase == "ended"
    assert state.outstanding == 0
    assert len(data) % 10240 == 0
    names = tarfile.open(fileobj=io.BytesIO(data)).getnames()
    assert names == [f"{ordinal:04d}.{field}" for ordinal in range(len(sizes)) for field in "ab"]


@pytest.mark.parametrize(
    "payloads", [{"a": b"x" * 700, "b": b"yy"}, {"a": b"x" * 512, "b": b""}, {"a": b"", "b": b"z"}]
)
def test_no_stop_before_the_end_looks_like_one(payloads: dict[str, bytes]) -> None:
    state = new_state()
    state.add_samples([build_sample(ordinal) for ordinal in range(4)])
    sent = b""
    for ordinal in range(4):
        batch = state.next_batch()
        assert batch is not None
        finish(state, batch, [build_out(f"{ordinal:04d}", payloads)])
        sent += drain(state)
        assert sent
        assert not is_clean_end(sent)
    state.end_index()
    sent += drain(state)
    assert is_clean_end(sent)
    assert len(tarfile.open(fileobj=io.BytesIO(sent)).getmembers()) == 8


def test_a_sample_without_any_payload_is_held_back_whole() -> None:
    state = new_state()
    state.add_samples([build_sample(0), build_sample(1)])
    batch = state.next_batch()
    assert batch is not None
    finish(state, batch, [build_out("0000", {"a": b""})])
    assert drain(state) == b""
    assert state.outstanding == 0


def test_a_shard_whose_samples_are_all_dropped_is_a_valid_empty_tar() -> None:
    state = new_state()
    data = run_with([Dropped(1, moved=False)] * 3, state)
    assert data == bytes(10240)
    assert state.phase == "ended"


def test_fail_ends_at_the_first_failure_and_keeps_it() -> None:
    state = new_state("fail")
    run_with([build_out("0000", {"a": b"x"}), Failed("bad", "Traceback"), build_out("0002", {"a": b"x"})], state)
    assert state.phase == "failed"
    assert state.error is not None
    assert state.error.traceback == "Traceback"
    assert [failure.sample.key for failure in state.failures if failure.sample] == ["0001"]


@pytest.mark.parametrize(
    ("policy", "failing", "total", "phase"),
    [
        ("skip:0.01", [5], 100, "ended"),
        ("skip:0.01", [5, 6], 100, "failed"),
        ("skip:0.02", [5, 6], 100, "ended"),
        ("skip:0.02", [5, 6, 7], 150, "failed"),
        ("skip:0.02", [5, 50, 149], 150, "ended"),
        ("skip:1", list(range(7)), 20, "ended"),
        ("skip:1", list(range(8)), 20, "failed"),
        ("skip:1", [0, 1, 2], 3, "failed"),
        ("skip:1", [0, 2], 3, "ended"),
    ],
)
def test_skip_drops_within_its_budget(policy: str, failing: list[int], total: int, phase: str) -> None:
    state = new_state(policy)
    results: list[Result] = [
        Failed(f"bad {ordinal}", "trace") if ordinal in failing else build_out(f"{ordinal:04d}", {"a": b"x"})
        for ordinal in range(total)
    ]
    data = run_with(results, state)
    assert state.phase == phase
    if phase == "ended":
        assert len(tarfile.open(fileobj=io.BytesIO(data)).getmembers()) == total - len(failing)
    else:
        assert not is_clean_end(data) or data == b""


def test_a_fatal_failure_is_never_skipped() -> None:
    state = new_state("skip:1")
    run_with([build_out("0000", {"a": b"x"}), Failed("too large", None, fatal=True)], state)
    assert state.phase == "failed"


def test_a_batch_is_tried_on_two_workers_and_then_fails_the_run() -> None:
    state = new_state("skip:1")
    state.add_samples([build_sample(0)])
    state.end_index()
    first = state.next_batch()
    assert first is not None
    state.lose(first, Loss("late", "took longer than 2 s", 0))
    second = state.next_batch()
    assert second is not None
    assert second.number != first.number
    state.lose(second, Loss("late", "took longer than 2 s", 0))
    assert state.phase == "failed"
    assert "'0000'" in str(state.error)
    assert state.failures[0].sample == build_sample(0)


def test_a_loss_that_is_not_its_fault_costs_a_batch_nothing() -> None:
    state = new_state()
    state.add_samples([build_sample(0)])
    state.end_index()
    for _ in range(10):
        batch = state.next_batch()
        assert batch is not None
        state.lose(batch, None)
    assert state.phase == "running"


def test_only_what_was_not_delivered_is_done_again() -> None:
    state = new_state()
    batch = Batch(1, [build_sample(ordinal) for ordinal in range(3)])
    state.add_samples(batch.samples)
    state.end_index()
    taken = [state.next_batch() for _ in range(3)]
    assert taken[0] is not None
    joined = Batch(99, batch.samples)
    joined.done = 2
    state.lose(joined, Loss("exited", "killed"))
    again = state.next_batch()
    assert again is not None
    assert [sample.ordinal for sample in again.samples] == [2]


def test_a_result_that_never_came_is_not_a_clean_end() -> None:
    """Whatever goes wrong between node and worker, a shard that misses a sample is never complete."""
    state = new_state()
    state.add_samples([build_sample(ordinal) for ordinal in range(4)])
    state.end_index()
    data = b""
    while (batch := state.next_batch()) is not None:
        if batch.samples[0].ordinal == 1:
            batch.done = 1
            state.lose(batch, Loss("protocol", "it said too much", 1))
            continue
        finish(state, batch, [build_out(sample.key, {"bin": b"x" * 600}) for sample in batch.samples])
        data += drain(state)
    assert state.phase == "failed"
    assert isinstance(state.error, ServerError)
    assert not is_clean_end(data + drain(state))


def test_adjacent_equal_keys_are_an_error() -> None:
    state = new_state()
    run_with([build_out("same", {"a": b"x"}), build_out("same", {"a": b"x"})], state)
    assert state.phase == "failed"
    assert "same" in str(state.error)


def test_a_reader_that_stalls_stops_the_workers_at_the_window() -> None:
    state = new_state(window=10_000)
    state.add_samples([build_sample(ordinal) for ordinal in range(64)])
    submitted = 0
    while (batch := state.next_batch()) is not None:
        submitted += len(batch.samples)
        finish(state, batch, [build_out(sample.key, {"a": bytes(2000)}) for sample in batch.samples])
    assert state.outstanding >= 10_000
    assert submitted < 10
    drain(state)
    assert state.has_batch()


def test_samples_before_a_damaged_part_are_delivered_and_then_the_run_fails() -> None:
    state = new_state()
    state.add_samples([build_sample(0)])
    state.end_index(BadShard("truncated"))
    batch = state.next_batch()
    assert batch is not None
    finish(state, batch, [build_out("0000", {"a": b"x" * 100})])
    assert state.phase == "failed"
    assert isinstance(state.error, BadShard)
    data = drain(state)
    assert data
    assert not is_clean_end(data)


def test_batches_ramp_from_one_to_what_fills_their_time() -> None:
    state = new_state(lanes=2, window=1 << 30)
    state.add_samples([build_sample(ordinal) for ordinal in range(200)])
    sizes = []
    while (batch := state.next_batch()) is not None:
        sizes.append(len(batch.samples))
        start, batch.done = batch.done, len(batch.samples)
        outs: list[tuple[int, Result]] = [
            (sample.ordinal, build_out(sample.key, {"a": b"x"})) for sample in batch.samples[start:]
        ]
        state.add_results(batch, outs, 0.001 * len(outs))
    assert sizes[:4] == [1, 1, 1, 1]
    assert max(sizes) == 15


def test_towards_the_end_batches_get_smaller_and_none_queues() -> None:
    state = new_state(lanes=2, window=1 << 30)
    state.add_samples([build_sample(ordinal) for ordinal in range(100)])
    state.end_index()
    sizes, queued = [], []
    while (batch := state.next_batch()) is not None:
        sizes.append(len(batch.samples))
        batch.done = len(batch.samples)
        outs: list[tuple[int, Result]] = [(it.ordinal, build_out(it.key, {"a": b"x"})) for it in batch.samples]
        state.add_results(batch, outs, 0.001 * len(outs))
        queued.append(not state.is_ending)
    assert max(sizes) == 15
    assert sizes[-4:] == [1, 1, 1, 1]
    assert all(queued[:-3])
    assert not any(queued[-3:])
    assert state.phase == "ended"


def test_an_abandoned_run_gives_everything_back() -> None:
    state = new_state()
    released: list[int] = []
    state.add_samples([build_sample(ordinal) for ordinal in range(4)])
    batches = [state.next_batch() for _ in range(4)]
    for position in (0, 2, 3):
        batch = batches[position]
        assert batch is not None
        data = bytearray(1024)
        piece = Piece(memoryview(data), position, 600, lambda piece: released.append(piece.offset))
        finish(state, batch, [Out([piece], str(position), str(position), 1, moved=False)])
    state.abandon()
    assert sorted(released) == [0, 2, 3]


def test_errors_of_a_state_are_the_users() -> None:
    state = new_state()
    run_with([Failed("boom", "trace")], state)
    assert isinstance(state.error, ShardmillError)
    assert state.error.status == 422


def large(ordinal: int) -> Out:
    return build_out(f"{ordinal:04d}", {"bin": bytes(100_000)})


def test_runs_share_a_budget_and_each_reader_still_gets_on() -> None:
    budget = Budget(250_000)
    stalled, going = (RunState(policy=ErrorPolicy(), window=1 << 30, lanes=2, budget=budget, start=0) for _ in range(2))
    for state in (stalled, going):
        state.add_samples([build_sample(ordinal) for ordinal in range(50)])
    taken = 0
    while (batch := stalled.next_batch()) is not None:
        finish(stalled, batch, [large(sample.ordinal) for sample in batch.samples])
        taken += len(batch.samples)
    assert taken == 3
    assert budget.used == stalled.outstanding > budget.limit
    for _ in range(5):
        batch = going.next_batch()
        assert batch is not None
        assert len(batch.samples) == 1
        assert going.next_batch() is None
        finish(going, batch, [large(batch.samples[0].ordinal)])
        assert going.next_batch() is None
        assert drain(going)
        assert budget.used == stalled.outstanding
    going.abandon()
    stalled.abandon()
    assert budget.used == 0


def test_what_a_failed_run_held_is_given_back() -> None:
    budget = Budget()
    state = RunState(policy=ErrorPolicy(), window=1 << 30, lanes=2, budget=budget)
    state.add_samples([build_sample(ordinal) for ordinal in range(4)])
    batches = [state.next_batch() for _ in range(4)]
    for ordinal in (3, 2, 1):
        batch = batches[ordinal]
        assert batch is not None
        finish(state, batch, [large(ordinal)])
    assert budget.used > 300_000
    first = batches[0]
    assert first is not None
    finish(state, first, [Failed("no", None)])
    assert state.phase == "failed"
    assert budget.used == state.outstanding == 0


def test_samples_without_a_payload_are_not_held_back_without_bound() -> None:
    state = new_state()
    count = 5000
    state.add_samples([build_sample(ordinal) for ordinal in range(count)])
    sent = 0
    while (batch := state.next_batch()) is not None:
        finish(state, batch, [build_out(sample.key, {"cls": b""}) for sample in batch.samples])
        sent += len(drain(state))
        assert batch.samples[-1].ordinal * 512 - sent < 2 << 20
    state.end_index()
    data = drain(state)
    assert sent + len(data) >= count * 512
    assert state.outstanding == state.budget.used == 0
