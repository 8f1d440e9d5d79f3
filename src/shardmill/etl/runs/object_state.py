"""What a run over a whole object decides, without I/O: one task for one worker, its output held back until it is safe.

The output cannot be made again from its middle, so a worker that is lost is replaced only while nothing of the output
was given out.
"""

from shardmill.core.errors import TransformFailed
from shardmill.etl.processes.arenas import Piece
from shardmill.etl.runs.holding import Holding
from shardmill.etl.runs.run_state import Budget, Chunk, OutputState, SampleFailed
from shardmill.etl.workers.batches import Batch, Failed, Loss
from shardmill.shards.grouping import Sample

OBJECT = Sample("", 0, ())
"""The whole object, where batches have samples."""

_SMALL = 1 << 16  # bytes; of shorter pieces a copy is kept, so that their place in the arena is free at once


class ObjectState(OutputState):
    """One spec over one whole object.

    Args:
        window: Bytes that the run may be ahead of its reader.
        max_output: Bytes of output at most.
        retries: How often it may lose its worker.
        budget: Shared with the node's other runs.
    """

    def __init__(self, *, window: int, max_output: int, retries: int = 1, budget: Budget | None = None) -> None:
        super().__init__(window=window, budget=budget)
        self._max_output = max_output
        self._retries = retries
        self._attempt = 0
        self._numbers = 0
        self.is_in_work = False
        """A worker has it."""
        self._holding = Holding()
        self._tail = bytearray()

    # What a worker does.

    def has_batch(self) -> bool:
        return self.phase == "running" and not self.is_in_work

    def next_batch(self) -> Batch | None:
        if not self.has_batch():
            return None
        self.is_in_work = True
        self._numbers += 1
        return Batch(self._numbers, [OBJECT], self._attempt)

    @property
    def allowed(self) -> int:
        """Bytes of output that the worker may give, from the first on: as far as window, readers and disk have room."""
        # What is held back counts for neither: without more of it nothing could go on.
        room = min(self.window - self.outstanding, self.limit - self.bytes_out)
        if self.outstanding:
            room = min(room, self.budget.limit - self.budget.used)
        return self.framed + int(max(0, room))

    def add_pieces(self, pieces: list[Piece]) -> None:
        """More output, in order."""
        for piece in pieces:
            if self.phase == "running":
                self._add(piece)
            else:
                piece.release()

    def _add(self, piece: Piece) -> None:
        start, self.framed = self.framed, self.framed + piece.size
        if self.framed > self._max_output:
            piece.release()
            message = f"the function gave more than {self._max_output >> 20} MiB for one object (max_object_output)"
            self.fail(TransformFailed(message), again=True)
            return
        safe = self._holding.feed(piece.data)
        if safe - start > _SMALL:
            self._push_tail(len(self._tail))
            self._tail += piece.data[safe - start :]
            self._hold(piece.size)
            self._push(Chunk(piece=piece, stop=safe - start, held=piece.size))
            return
        self._tail += piece.data
        piece.release()
        self._push_tail(safe - self.bytes_out)

    def _push_tail(self, size: int) -> None:
        """Let go of the oldest bytes that were held back."""
        if size:
            self._hold(size)
            self._push(Chunk(bytes(self._tail[:size]), held=size))
            del self._tail[:size]

    def finish(self) -> None:
        """The output is whole."""
        if self.phase == "running":
            self._push_tail(len(self._tail))
            self.phase = "ended"

    def add_failure(self, failure: Failed) -> None:
        """The user's code failed."""
        if self.phase == "running":
            error = TransformFailed(failure.message, traceback=failure.traceback)
            self._end(error, failure.output, again=True)

    def lose(self, batch: Batch, loss: Loss | None) -> None:
        """The worker is gone; None: not by the fault of what it did."""
        if self.phase != "running":
            return
        self._attempt = batch.attempt + (loss is not None)
        if not self.bytes_out and self._attempt <= self._retries:
            self.is_in_work = False
            self.framed = 0
            self._holding = Holding()
            self._tail.clear()
            return
        message = loss.message if loss is not None else "the worker process was stopped"
        if self._attempt > 1:
            message += f"; it was tried {self._attempt} times"
        self._end(TransformFailed(message), loss.output if loss is not None else None)

    def _end(self, error: TransformFailed, output: str | None, *, again: bool = False) -> None:
        self.failures.append(SampleFailed(None, error.message, error.traceback, output, ended_run=True))
        self.fail(error, again=again)

    def _drop_work(self) -> None:
        self._tail.clear()
