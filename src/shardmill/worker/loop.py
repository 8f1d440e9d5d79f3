"""A worker's life: load one function, then turn batches of samples into framed bytes in the arena.

read → decode → seed → user's function → encode → frame. What the function raises belongs to one sample; what breaks
this process belongs to the node, which starts another. Whole objects are the business of `tasks`.
"""

import contextlib
import os
import resource
import socket
import time
from typing import Any

from shardmill.shards.decoding import Decoder
from shardmill.worker import wire
from shardmill.worker.arena import Arena
from shardmill.worker.calls import Function, SampleFailure, load_functions
from shardmill.worker.exchange import Exchange
from shardmill.worker.objects import Task
from shardmill.worker.samples import Output, SampleWork, SourceChanged, SourceSample
from shardmill.worker.seeding import Seeder, sample_seed
from shardmill.worker.tasks import load_task

FLUSH_SECONDS = 0.01  # results are reported at least this often, so that a reader sees a slow batch's first samples
MAX_RESULTS = 64  # results in one report


class OutputTooLarge(Exception):
    """The node refused room for this sample's output."""


class MemoryLimit(Exception):
    """The function used up the memory of this process."""


def serve(sock: socket.socket, arena: int, arena_size: int, layers: dict[str, bool]) -> int:
    """Serve one node until it closes the socket; returns the exit status."""
    worker = Worker(wire.Connection(sock), Arena(arena, arena_size))
    os.close(arena)
    try:
        worker.run(layers)
    except (ConnectionError, BrokenPipeError):
        return 0
    return 0


class OpenSample:
    """The sample in work: what it has given so far and the node was not told of."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.pieces: list[tuple[int, int, int]] = []
        self.keys: list[str] = []


class Worker:
    """One function over samples of any source."""

    def __init__(self, connection: wire.Connection, arena: Arena) -> None:
        self._connection = connection
        self._arena = arena
        self._sources: dict[int, int] = {}
        self._urls: dict[int, tuple[str, str]] = {}
        self._pending: list[wire.Frame] = []
        self._results: list[list[Any]] = []
        self._open: OpenSample | None = None
        self._batch = 0
        self._flushed = 0.0
        self._seeder = Seeder()
        self._functions: list[Function] = []
        self._work: SampleWork | None = None
        self._task: Task | None = None
        self._probing = False
        self._memory = resource.getrlimit(resource.RLIMIT_DATA)[0]

    def run(self, layers: dict[str, bool]) -> None:
        self._connection.send({"t": "ready", "version": wire.VERSION, "layers": layers})
        while True:
            frame = self._pending.pop(0) if self._pending else self._connection.receive()
            if frame is None:
                return
            if not self._handle_side(frame):
                self._handle(frame)

    def _handle_side(self, frame: wire.Frame) -> bool:
        """Messages that may be handled in the middle of a batch."""
        head = frame.head
        match head["t"]:
            case "release":
                for offset in head["regions"]:
                    self._arena.release(offset)
            case "source":
                descriptor, former = self._connection.descriptors.popleft(), self._sources.get(head["source"])
                if former is not None:
                    # Its bytes are elsewhere now; whoever is in the middle of them goes on there.
                    os.dup2(descriptor, former, inheritable=os.get_inheritable(former))
                    os.close(descriptor)
                    descriptor = former
                self._sources[head["source"]] = descriptor
                self._urls[head["source"]] = (head["key"], head["url"])
            case "forget":
                self._urls.pop(head["source"], None)
                former = self._sources.pop(head["source"], None)
                if former is not None:
                    with contextlib.suppress(OSError):
                        os.close(former)
            case _:
                return False
        return True

    def _handle(self, frame: wire.Frame) -> None:
        match frame.head["t"]:
            case "load":
                self._load(frame)
            case "batch":
                self._run_batch(frame.head)
            case "object":
                self._run_object(frame.head)

    def _load(self, frame: wire.Frame) -> None:
        head = frame.head
        self._seeder.install()
        try:
            if head["kind"] == "sample":
                self._functions = load_functions(head["encoding"], frame.blob, head["args"])
                self._work = SampleWork(Decoder(head["decoder"], head["fields"], head["allow_pickle"]))
            else:
                self._task = load_task(head, frame.blob)
        except SampleFailure as failure:
            self._connection.send({"t": "load_failed", "message": failure.message, "traceback": failure.traceback})
            return
        self._probing = head["probe"]
        self._connection.send({"t": "loaded"})

    def _run_batch(self, head: dict[str, Any]) -> None:
        for offset in head["release"]:
            self._arena.release(offset)
        self._batch = head["batch"]
        source = head["source"]
        descriptor, (object_key, url) = self._sources[source], self._urls[source]
        self._flushed = time.monotonic()
        assert self._work is not None
        self._work.start_clock()
        for ordinal, key, fields in head["samples"]:
            # Before a sample and not behind it: the last one's result comes with the word that the batch is done.
            if len(self._results) >= MAX_RESULTS or time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush(final=False)
            self._arena.tick(self._batch, ordinal)
            sample = SourceSample(key, ordinal, url, descriptor, fields)
            seed = sample_seed(head["seed"], head["epoch"], object_key, ordinal, key)
            # Transforming may report and empty the list, so the list is looked up afterwards.
            result = self._transform(sample, seed)
            self._results.append(result)
        self._flush(final=True)

    def _run_object(self, head: dict[str, Any]) -> None:
        for offset in head["release"]:
            self._arena.release(offset)
        descriptor, (key, ref) = self._sources[head["source"]], self._urls[head["source"]]
        self._arena.tick(head["batch"], 0)
        exchange = Exchange(self._connection, self._arena, self._handle_meanwhile, head, descriptor)
        assert self._task is not None
        seed = sample_seed(head["seed"], head["epoch"], key, 0, "")
        self._seeder.seed(seed)
        if self._probing:
            self._seeder.mark()
        try:
            self._task(exchange, key=key, ref=ref, seed=seed)
            moved = self._probing and self._seeder.has_moved()
            result: list[Any] = [0, "out", [], "", "", exchange.bytes_in, moved]
        except SampleFailure as failure:
            outcome = "memory" if failure.out_of_memory and self._is_at_memory_limit() else "fail"
            result = [0, outcome, failure.message, failure.traceback, failure.output]
        exchange.finish(result)

    def _handle_meanwhile(self, frame: wire.Frame) -> None:
        """A message in the middle of a batch: other batches wait."""
        if self._handle_side(frame):
            return
        # What it gives back is of the arena that there is now, which may have been replaced when its turn comes.
        for offset in frame.head.get("release", ()):
            self._arena.release(offset)
        frame.head["release"] = []
        self._pending.append(frame)

    def _transform(self, sample: SourceSample, seed: int) -> list[Any]:
        """One sample's result: `[ordinal, "out", pieces, first key, last key, bytes read, moved]`, or a failure."""
        assert self._work is not None
        given = self._open = OpenSample(sample.ordinal)
        moved = False
        try:
            values = self._work.decode(sample)
            self._seeder.seed(seed)
            if self._probing:
                self._seeder.mark()
            for output in self._work.apply(self._functions, sample, values):
                if given.keys and given.keys[-1] == output.key:
                    raise SampleFailure(f"two adjacent samples have the key {output.key!r}; give each its own __key__")
                given.keys.append(output.key)
                # Placing may report and empty the list, so the list is looked up afterwards.
                piece = self._place(output)
                given.pieces.append(piece)
            moved = self._probing and self._seeder.has_moved()
        except SampleFailure as failure:
            self._give_back(given)
            outcome = "memory" if failure.out_of_memory and self._is_at_memory_limit() else "fail"
            return [sample.ordinal, outcome, failure.message, failure.traceback, None]
        except (OutputTooLarge, SourceChanged) as error:
            self._give_back(given)
            return [sample.ordinal, "fatal", str(error), None, None]
        finally:
            self._open = None
        if not given.keys:
            return [sample.ordinal, "drop", sample.size, moved]
        return [sample.ordinal, "out", given.pieces, given.keys[0], given.keys[-1], sample.size, moved]

    def _place(self, output: Output) -> tuple[int, int, int]:
        """Frame one output sample into the arena: `offset, length, safe cut`."""
        offset = self._room(output.size)
        with self._arena.view[offset : offset + output.size] as view:
            try:
                cut = output.frame_into(view)
            except BaseException:
                self._arena.release(offset)
                raise
        return offset, output.size, cut

    def _room(self, size: int) -> int:
        offset = self._arena.allocate(size)
        while offset is None:
            self._drain()
            offset = self._arena.allocate(size)
            if offset is None:
                self._wait_for_room(size)
                offset = self._arena.allocate(size)
        return offset

    def _drain(self) -> None:
        while (frame := self._connection.receive_nowait()) is not None:
            self._handle_meanwhile(frame)

    def _wait_for_room(self, size: int) -> None:
        """Ask the node to take away what is in the arena, or for a larger one."""
        if self._open is not None and self._open.pieces:
            self._results.append([self._open.ordinal, "more", self._open.pieces])
            self._open.pieces = []
        self._flush(final=False)
        self._connection.send({"t": "need", "bytes": size, "fits": self._arena.fits(size)})
        while True:
            frame = self._connection.receive()
            if frame is None:
                raise ConnectionError("the node closed the socket")
            match frame.head["t"]:
                case "room":
                    for offset in frame.head["regions"]:
                        self._arena.release(offset)
                    if frame.head["size"] is not None:
                        self._replace_arena(frame.head["size"])
                    return
                case "refuse":
                    raise OutputTooLarge(frame.head["message"])
                case _:
                    self._handle_meanwhile(frame)

    def _replace_arena(self, size: int) -> None:
        descriptor = self._connection.descriptors.popleft()
        replaced, self._arena = self._arena, Arena(descriptor, size, successor_of=self._arena)
        replaced.close()
        os.close(descriptor)

    def _give_back(self, given: OpenSample) -> None:
        for offset, _, _ in given.pieces:
            self._arena.release(offset)

    def _flush(self, *, final: bool) -> None:
        assert self._work is not None
        if not final and not self._results:
            return
        head = {
            "t": "part",
            "batch": self._batch,
            "results": self._results,
            "final": final,
            "seconds": self._work.take_clock(),
        }
        self._connection.send(head)
        self._results = []
        self._flushed = time.monotonic()

    def _is_at_memory_limit(self) -> bool:
        """Whether a MemoryError came from this process's limit rather than from one absurd allocation."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self._memory != resource.RLIM_INFINITY and peak > self._memory // 2
