"""What a run decides, without I/O: events in, batches and sendable bytes out.

Results are taken in sample order whatever the order of arrival. Everything from the last byte of the last non-empty
payload is held back until the next sample is framed, because tar readers take a cut anywhere from there to the end of
the next header for the end of the archive.
"""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from shardmill.core.errors import ServerError, ShardmillError, TransformFailed
from shardmill.core.specs import ErrorPolicy
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.workers.batches import Batch, Dropped, Failed, Loss, Out, Result
from shardmill.shards.framing import end_padding
from shardmill.shards.grouping import Sample

FIRST_ALL = 8  # a run whose first samples all fail is broken, whatever its budget
BATCH_SECONDS = 0.015  # work in one batch: long enough to hide the node's share, short enough to keep order cheap
MAX_BATCH = 64  # samples
_SMALL = 1 << 16  # bytes; output up to this is joined before it is sent
_JOINED = 1 << 18

_MAX_TAIL = 1 << 20  # bytes held back; more than this without a payload is sent all the same

Phase = Literal["running", "ended", "failed"]


@dataclass(frozen=True, slots=True)
class SampleFailed:
    """A failure to be kept: which sample, and what it said."""

    sample: Sample | None
    message: str
    traceback: str | None
    output: str | None = None
    ended_run: bool = False


@dataclass(slots=True)
class Chunk:
    """Bytes that may be sent now: a piece up to its safe cut, or bytes of the heap."""

    heap: bytes = b""
    piece: Piece | None = None
    stop: int = 0
    """Bytes of the piece that may be sent."""
    held: int = 0
    """Bytes that the run counts as outstanding until the chunk is given back."""

    @property
    def size(self) -> int:
        return self.stop if self.piece is not None else len(self.heap)

    @property
    def data(self) -> memoryview | bytes:
        """The bytes; where they stand may change until the chunk is pinned."""
        return self.heap if self.piece is None else self.piece.data[: self.stop]

    def pin(self) -> memoryview | bytes:
        """The bytes, which stay where they are until `unpin`."""
        if self.piece is not None:
            self.piece.is_pinned = True
        return self.data

    def unpin(self) -> None:
        if self.piece is not None:
            self.piece.is_pinned = False


@dataclass(slots=True)
class Budget:
    """Memory that all runs of a node have for what is framed and not yet sent."""

    limit: float = math.inf
    """Bytes. A run that has nothing outstanding may pass it by one batch, so that every reader gets on."""
    used: int = 0

    @property
    def is_spent(self) -> bool:
        return self.used >= self.limit


class OutputState:
    """What a run decides whatever it works on: how it ends, and which bytes may be sent.

    Args:
        window: Bytes that the run may be ahead of its reader.
        budget: Shared with the node's other runs.
    """

    def __init__(self, *, window: int, budget: Budget | None = None) -> None:
        self.phase: Phase = "running"
        self.error: ShardmillError | None = None
        self.failures: list[SampleFailed] = []
        """Failures not yet taken by the driver."""
        self.bytes_out = 0
        self.outstanding = 0
        """Bytes framed and not yet sent."""
        self.framed = 0
        """Bytes framed since the start."""
        self.limit = math.inf
        """Bytes up to which may be framed, as the readers and the disk allow; raised as they go on."""
        self.is_fault_of_input = False
        """The error would come again: it is of the function or the object, not of a worker or the disk."""
        self.window = window
        self.budget = budget or Budget()
        self._chunks: deque[Chunk] = deque()

    def take_chunk(self) -> Chunk | None:
        """The next bytes to send; small ones are joined."""
        if not self._chunks:
            return None
        first = self._chunks.popleft()
        if first.size > _SMALL or not self._chunks:
            return first
        joined, held = bytearray(), 0
        while True:
            joined += first.data
            held += first.held
            if first.piece is not None:
                first.piece.release()
            if len(joined) >= _JOINED or not self._chunks or self._chunks[0].size > _SMALL:
                return Chunk(bytes(joined), held=held)
            first = self._chunks.popleft()

    def give_back(self, chunk: Chunk) -> None:
        """Nobody needs the chunk's bytes any more."""
        self._hold(-chunk.held)
        if chunk.piece is not None:
            chunk.piece.release()

    @property
    def has_chunk(self) -> bool:
        return bool(self._chunks)

    def fail(self, error: ShardmillError, *, again: bool = False) -> None:
        """End with an error; bytes that were allowed to be sent still are.

        Args:
            error: What readers are told.
            again: The same input would give it again.
        """
        if self.phase == "running":
            self.phase, self.error, self.is_fault_of_input = "failed", error, again
            self._drop_work()

    def abandon(self) -> None:
        """Nobody reads any more: give everything back."""
        if self.phase == "running":
            self.phase = "failed"
        self._drop_work()
        while self._chunks:
            self.give_back(self._chunks.popleft())

    def _drop_work(self) -> None:
        """Nothing more is done: forget what is waiting."""

    def _hold(self, size: int) -> None:
        """Bytes that were framed; negative: that nobody needs any more."""
        self.outstanding += size
        self.budget.used += size

    def _push(self, chunk: Chunk) -> None:
        self.bytes_out += chunk.size
        self._chunks.append(chunk)


class RunState(OutputState):
    """One spec over one shard.

    Args:
        policy: What a failing sample means.
        window: Bytes that the run may be ahead of its reader.
        lanes: Workers it may get; the first 2 × lanes batches are single samples.
        start: First source sample.
        count: Source samples at most, or None.
        retries: How often a batch may lose its worker.
        budget: Shared with the node's other runs.
    """

    def __init__(
        self,
        *,
        policy: ErrorPolicy,
        window: int,
        lanes: int,
        start: int = 0,
        count: int | None = None,
        retries: int = 1,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(window=window, budget=budget)
        self.samples_out = 0
        self.processed = 0
        """Source samples whose result was taken, in order."""
        self.offset = 0
        """Where the last of these ends in the shard, bytes."""
        self._policy = policy
        self._retries = retries
        self._ramp = 2 * lanes
        self._next = start
        self._stop = None if count is None else start + count
        self._indexed: deque[Sample] = deque()
        self._index_ended = False
        self._index_error: ShardmillError | None = None
        self._again: deque[Batch] = deque()
        self._in_flight: dict[int, Batch] = {}
        self._samples: dict[int, Sample] = {}
        self._results: dict[int, Result] = {}
        self._numbers = 0
        self._failed = 0
        self._last_failure = Failed("no sample failed", None)
        self._last_key: str | None = None
        self._tail = bytearray()
        self._seconds = 0.0
        self._timed = 0
        self._average_out = 0.0

    # What the index found.

    def add_samples(self, samples: list[Sample]) -> None:
        """Samples in shard order, from `start` on and cut to `count`."""
        self._indexed.extend(samples)
        for sample in samples:
            self._samples[sample.ordinal] = sample

    def end_index(self, error: ShardmillError | None = None) -> None:
        """The shard has no more samples, or cannot be read on; what was found before is still delivered."""
        self._index_ended = True
        self._index_error = error
        self._advance()

    def wants_index(self) -> bool:
        """Whether samples should be indexed ahead."""
        return self.phase == "running" and not self._index_ended and len(self._indexed) < 2 * MAX_BATCH

    @property
    def is_at_work(self) -> bool:
        """Whether workers have samples of it."""
        return bool(self._in_flight)

    @property
    def is_starved(self) -> bool:
        """Whether there is nothing for workers because the shard's bytes have not come."""
        return not self._indexed and not self._index_ended

    @property
    def is_ending(self) -> bool:
        """What is left goes to workers that have nothing else to do: behind others it would be waited for longest."""
        return self._index_ended and 2 * len(self._indexed) <= self._ramp

    # What workers do.

    def has_batch(self) -> bool:
        if self.phase != "running":
            return False
        if self._again:
            return True
        if not self._indexed:
            return False
        if not self._in_flight and not self._results:
            # Whatever is outstanding, the sample that the reader waits for next must be on its way.
            has_room = self.outstanding < self.window and self.framed < self.limit
            return has_room and not (self.budget.is_spent and self.outstanding)
        if self.budget.is_spent:
            return False
        waiting = sum(len(batch.samples) - batch.done for batch in self._in_flight.values()) * self._average_out
        return self.outstanding + waiting < self.window and self.framed + waiting < self.limit

    def next_batch(self) -> Batch | None:
        if not self.has_batch():
            return None
        if self._again:
            batch = self._again.popleft()
        else:
            samples = [self._indexed.popleft() for _ in range(min(self._batch_size(), len(self._indexed)))]
            self._numbers += 1
            batch = Batch(self._numbers, samples)
        self._in_flight[batch.number] = batch
        return batch

    def _batch_size(self) -> int:
        if self._numbers < self._ramp or not self._timed:
            return 1
        size = BATCH_SECONDS * self._timed / max(self._seconds, 1e-9)
        if self._index_ended:
            # Towards the end workers get less at a time, so that none is left alone with what was given to it last.
            size = min(size, len(self._indexed) / self._ramp)
        if self._average_out:
            # A batch of large samples would hold up the ones behind it in the window.
            room = min(self.window, max(0, self.budget.limit - self.budget.used))
            size = min(size, room / (2 * self._ramp * self._average_out))
        return max(1, min(MAX_BATCH, int(size)))

    def add_results(self, batch: Batch, results: list[tuple[int, Result]], seconds: float) -> None:
        """Results of a batch, in order; `seconds` of work they took."""
        if batch.done == len(batch.samples):
            self._in_flight.pop(batch.number, None)
        self._seconds += seconds
        self._timed += len(results)
        for ordinal, result in results:
            if self.phase != "running":
                _release(result)
                continue
            if isinstance(result, Out):
                size = sum(piece.size for piece in result.pieces)
                self._hold(size)
                self.framed += size
                self._average_out = self.framed / self._timed
            self._results[ordinal] = result
        self._advance()

    def lose(self, batch: Batch, loss: Loss | None) -> None:
        """A worker is gone; what the batch had left is done again, once with blame and always without."""
        self._in_flight.pop(batch.number, None)
        left = batch.samples[batch.done :]
        if self.phase != "running" or not left:
            return
        attempt = batch.attempt + (loss is not None)
        if loss is not None and attempt > self._retries:
            culprit = self._samples.get(loss.ordinal) if loss.ordinal is not None else None
            culprit = culprit or left[0]
            self.failures.append(SampleFailed(culprit, loss.message, None, loss.output, ended_run=True))
            self.fail(TransformFailed(f"sample {culprit.key!r}: {loss.message}; it was tried {attempt} times"))
            return
        self._numbers += 1
        self._again.append(Batch(self._numbers, left, attempt))

    def _drop_work(self) -> None:
        for result in self._results.values():
            self._drop(result)
        self._results.clear()
        self._indexed.clear()
        self._again.clear()

    def _advance(self) -> None:
        while self.phase == "running" and (result := self._results.pop(self._next, None)) is not None:
            sample = self._samples.pop(self._next)
            self._next += 1
            self.processed += 1
            self.offset = sample.fields[-1].member.offset if sample.fields else self.offset
            self._take(sample, result)
        if (
            self.phase == "running"
            and self._index_ended
            and not self._in_flight
            and not self._indexed
            and not self._again
        ):
            self._finish()

    def _take(self, sample: Sample, result: Result) -> None:
        if isinstance(result, Out) and result.first_key == self._last_key:
            self._drop(result)
            message = f"two adjacent samples have the key {result.first_key!r}; give each its own __key__"
            result = Failed(message, None)
        match result:
            case Out():
                self._last_key = result.last_key
                self.samples_out += len(result.pieces)
                for piece in result.pieces:
                    self._emit(piece)
            case Failed():
                self._count_failure(sample, result)
            case Dropped():
                pass

    def _count_failure(self, sample: Sample, failure: Failed) -> None:
        self._failed += 1
        self._last_failure = failure
        self.failures.append(SampleFailed(sample, failure.message, failure.traceback))
        ratio = self._policy.ratio
        if failure.fatal or ratio is None:
            self.fail(TransformFailed(failure.message, traceback=failure.traceback), again=True)
        elif self._failed > math.ceil(round(ratio * max(self.processed, 100), 9)):
            message = f"{self._failed} of {self.processed} samples failed, more than {self._policy} allows; the last: "
            self.fail(TransformFailed(message + failure.message, traceback=failure.traceback), again=True)
        elif self._failed == self.processed == FIRST_ALL:
            self._fail_all()
        if self.phase == "failed":
            self.failures[-1] = replace(self.failures[-1], ended_run=True)

    def _fail_all(self) -> None:
        failure = self._last_failure
        message = f"the first {self._failed} samples all failed; the last: {failure.message}"
        self.fail(TransformFailed(message, traceback=failure.traceback), again=True)

    def _emit(self, piece: Piece) -> None:
        """Queue what may be sent and hold back the rest."""
        if piece.cut == 0:
            # No payload at all: a reader could take any of it for the end.
            self._tail += piece.data
            self._hold(-piece.size)
            piece.release()
            if len(self._tail) > _MAX_TAIL:
                self._push_tail()
            return
        self._push_tail()
        self._tail += piece.data[piece.cut :]
        self._push(Chunk(piece=piece, stop=piece.cut, held=piece.size))

    def _finish(self) -> None:
        if self._index_error is not None:
            self.fail(self._index_error, again=isinstance(self._index_error, TransformFailed))
            return
        if self._samples:
            # Never so by what is above; but a short shard that looks whole would be worse than any error.
            self.fail(ServerError(f"the results of {len(self._samples)} samples are missing"))
            return
        if self._failed and self._failed == self.processed:
            self._fail_all()
            return
        self._push_tail()
        self._push(Chunk(bytes(end_padding(self.bytes_out))))
        self.phase = "ended"

    def _push_tail(self) -> None:
        if self._tail:
            size = len(self._tail)
            self._hold(size)
            self._push(Chunk(bytes(self._tail), held=size))
            self._tail.clear()

    def _drop(self, result: Result) -> None:
        """A result that was held is not needed."""
        if isinstance(result, Out):
            self._hold(-sum(piece.size for piece in result.pieces))
        _release(result)


def _release(result: Result) -> None:
    if isinstance(result, Out):
        for piece in result.pieces:
            piece.release()
