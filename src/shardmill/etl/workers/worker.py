"""One worker process seen from the node: its socket, its arena, its batches, and how it ends.

Whatever breaks in it ends here as a `Loss`; nothing it sends is trusted beyond what is checked.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardmill.config import TransformSettings
from shardmill.etl.processes.arenas import ARENA, Piece, SharedArena
from shardmill.etl.processes.channel import Channel
from shardmill.etl.processes.output import PrintedOutput
from shardmill.etl.processes.process_tree import (
    cpu_seconds,
    live_descendants,
    proportional_bytes,
    resident_bytes,
    resident_bytes_at_most,
)
from shardmill.etl.processes.zygotes import Forked, Zygote
from shardmill.etl.scratch import remove_tree
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Batch, Dropped, Failed, Loss, LossKind, Out, Result, StageSeconds, Whole, Work
from shardmill.shards.framing import BLOCK
from shardmill.shards.grouping import Sample
from shardmill.shards.tar import Member
from shardmill.worker import wire
from shardmill.worker.arena import HEADER, read_progress
from shardmill.worker.limits import SWEEP_SECONDS

logger = logging.getLogger(__name__)

IN_FLIGHT = 2  # batches per worker: one in work, one waiting, so that it never idles while the node is busy
ALLOWED_STEP = 1 << 20  # bytes; a worker that is not waiting is told of more room in steps of it
_REASON_SECONDS = 0.1  # how long a lost worker's exit status is waited for
MAX_DESCENDANTS = 64  # processes below one worker; functions that call a program need one or two
_REMOVAL_TRIES = 10
_IDLE_LOOK_SECONDS = 0.5  # between looks at a worker that has nothing to do
_IDLE_CPU_SECONDS = 0.5  # that a worker may use while it has nothing to do


def worker_key(version: Version, environment_id: str) -> str:
    """What a worker is bound to: code, arguments, and the environment as it was when it was forked."""
    return f"{version.key}/{environment_id}"


class WorkerProcess:
    """A forked worker bound to one version. `start` → batches by `submit` → `kill` or loss."""

    def __init__(
        self,
        version: Version,
        zygote: Zygote,
        scratch: Path,
        settings: TransformSettings,
        *,
        on_change: Callable[["WorkerProcess"], None],
    ) -> None:
        self.version = version
        self.zygote = zygote
        self.key = worker_key(version, zygote.environment_id)
        """Which works it can serve."""
        self.layers: dict[str, bool] = {}
        self.is_ready = False
        self.is_gone = False
        self.idle_since = time.monotonic()
        self._scratch = scratch
        self._settings = settings
        self._on_change = on_change
        self._batches: deque[tuple[Work, Batch]] = deque()
        self._collected: dict[int, list[Piece]] = {}
        self._sources: dict[int, int] = {}
        """Numbers of works whose source it has, and the descriptors that were sent."""
        self._released: list[int] = []
        self._held: dict[int, Piece] = {}
        self._received = 0
        self._told = (0, 0)
        self._is_waiting = False
        self._progress: tuple[int, int, int] = (0, 0, 0)
        self._progress_at = time.monotonic()
        self._printed_before = 0
        self._idle_cpu: float | None = None
        self._idle_look = 0.0
        self._loss: Loss | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._load_failure: Failed | None = None
        self._ending: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._forked: Forked | None = None
        self._channel: Channel | None = None
        self._arena: SharedArena | None = None
        self._output: PrintedOutput | None = None

    @property
    def in_flight(self) -> int:
        return len(self._batches)

    @property
    def has_room(self) -> bool:
        """Whether it takes one more batch. A whole object may take an hour, so none waits behind another."""
        return self.in_flight < (IN_FLIGHT if self.version.info.kind == "sample" else 1)

    @property
    def is_parked(self) -> bool:
        """It waits for the readers of what it has given, and does nothing."""
        return self._is_waiting and self._received >= self._told[1]

    @property
    def works(self) -> set[int]:
        """Numbers of the works whose batches it has."""
        return {work.number for work, _ in self._batches}

    @property
    def pid(self) -> int | None:
        return self._forked.pid if self._forked else None

    async def start(self, *, probing: bool) -> Failed | None:
        """Fork, confine and load the function; a Failed says that the function cannot be loaded.

        Raises:
            ConnectionError: The process ended before it was ready.
            TimeoutError: Loading took longer than `load_timeout`.
            Busy: The process could not be forked.
        """
        settings = self._settings
        self._scratch = _make_directory(self._scratch)
        ours, theirs = socket.socketpair()
        arena = SharedArena(ARENA)
        output = PrintedOutput()
        try:
            self._forked = await self.zygote.fork(
                theirs, arena.descriptor, output.writer, arena_size=ARENA, memory=settings.memory, scratch=self._scratch
            )
        except BaseException:
            ours.close()
            arena.close()
            output.close()
            self.is_gone = True
            await asyncio.to_thread(remove_tree, self._scratch)
            raise
        finally:
            theirs.close()
            os.close(output.writer)
        self._arena, self._output = arena, output
        self._channel = Channel(ours, self._on_frame, self._on_closed)
        code = self.version.code
        self._channel.send(
            {
                "t": "load",
                "kind": self.version.info.kind,
                "encoding": code.encoding,
                "args": self.version.info.args,
                "by_path": self.version.info.by_path,
                "path": settings.commands,
                "decoder": self.version.info.decoder,
                "fields": self.version.info.fields,
                "allow_pickle": self.version.allow_pickle,
                "probe": probing,
            },
            code.payload,
        )
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), settings.load_timeout)
        except TimeoutError:
            late = f"it was not loaded after {settings.load_timeout:g} s (load_timeout)"
            self.kill(Loss("late", late))
            raise TimeoutError(late) from None
        except BaseException:
            self.kill(None)
            raise
        if self._load_failure is None:
            self.is_ready = True
        else:
            self.kill(None)
        return self._load_failure

    def submit(self, work: Work, batch: Batch) -> None:
        """Give it a batch; results arrive at `work.on_results`."""
        assert self._channel is not None and self._output is not None
        self._give_source(work)
        if not self._batches:
            self._progress_at = time.monotonic()
            self._printed_before = self._output.total
        self._batches.append((work, batch))
        released, self._released = self._released, []
        if work.whole is not None:
            self._give_object(work, work.whole, batch, released)
            return
        self._channel.send(
            {
                "t": "batch",
                "batch": batch.number,
                "source": work.number,
                "seed": work.seed,
                "epoch": work.epoch,
                "release": released,
                "samples": [[sample.ordinal, sample.key, _describe(sample)] for sample in batch.samples],
            }
        )

    def _give_source(self, work: Work) -> None:
        """Send the descriptor that its bytes are in now, unless it has it."""
        assert self._channel is not None
        descriptor = work.source_descriptor
        if self._sources.get(work.number) != descriptor:
            self._sources[work.number] = descriptor
            head = {"t": "source", "source": work.number, "key": work.source_key, "url": work.source_url}
            self._channel.send(head, descriptors=(descriptor,))

    def _give_object(self, work: Work, whole: Whole, batch: Batch, released: list[int]) -> None:
        assert self._channel is not None
        self._received, self._is_waiting = 0, False
        self._told = (whole.available, whole.allowed)
        self._channel.send(
            {
                "t": "object",
                "batch": batch.number,
                "source": work.number,
                "seed": work.seed,
                "epoch": work.epoch,
                "release": released,
                "size": whole.size,
                "available": whole.available,
                "allowed": whole.allowed,
            }
        )

    @property
    def _whole(self) -> Whole | None:
        """The object in work."""
        return self._batches[0][0].whole if self._batches else None

    def refresh(self) -> None:
        """Tell it of more input in place, and of more output that it may give."""
        whole = self._whole
        if whole is None or self._channel is None:
            return
        available, allowed = self._told
        is_worth_it = self._is_waiting or whole.allowed - allowed >= ALLOWED_STEP
        if whole.available > available or (is_worth_it and (whole.allowed > allowed or self._released)):
            released, self._released = self._released, []
            self._told = (whole.available, max(allowed, whole.allowed))
            self._is_waiting = False
            self._give_source(self._batches[0][0])
            self._channel.send({"t": "go", "release": released, "available": whole.available, "allowed": self._told[1]})

    def forget(self, work: Work) -> None:
        """The work is over: close its source; batches of it that are still in work are of no use to anyone."""
        if work.number in self._sources and self._channel is not None:
            del self._sources[work.number]
            if work.number in self.works:
                # It may be deep in a batch that nobody wants; another is started in milliseconds.
                self.kill(None)
            else:
                self._channel.send({"t": "forget", "source": work.number})

    def watch(self, now: float) -> None:
        """End it if it is stuck, prints without end, has grown too large or too many. Called a few times a second."""
        if self.is_gone or self._arena is None or self._forked is None or not self.is_ready:
            return
        if not self._batches:
            # Started afresh while it costs nobody a sample. There may be many, and nobody waits for them.
            if self._idle_cpu is not None and now < self._idle_look:
                return
            self._idle_look = now + _IDLE_LOOK_SECONDS
            if self._is_spent(self._forked.pid, live_descendants(self._forked.pid)):
                self.kill(None)
            return
        self._idle_cpu = None
        below = live_descendants(self._forked.pid)
        settings = self._settings
        progress = read_progress(self._arena.view)
        if progress[2] and progress != self._progress:
            # One sample's time goes on whatever it gives meanwhile, or one that never ends would never be late.
            self._progress, self._progress_at = progress, now
        work, batch = self._batches[0]
        ordinal = progress[1] if progress[0] == batch.number else batch.samples[0].ordinal
        # How long a whole object may take is for its run to say.
        is_late = work.whole is None and now - self._progress_at > settings.sample_timeout
        if is_late:
            self._lose("late", f"took longer than {settings.sample_timeout:g} s (sample_timeout)", ordinal)
        elif len(below) > MAX_DESCENDANTS:
            self._lose("processes", f"started more than {MAX_DESCENDANTS} processes", ordinal)
        elif self._is_larger(settings.memory, self._forked.pid, below):
            self._lose("memory", f"passed the memory limit of {settings.memory >> 20} MiB", ordinal)
        elif self._output is not None and self._output.total - self._printed_before > settings.max_print:
            self._lose("printed", f"printed more than {settings.max_print >> 20} MiB (max_print)", ordinal)

    def _is_spent(self, pid: int, below: list[int]) -> bool:
        """A function leaks, gave something huge, or left what goes on without it: processes, or a thread at work."""
        assert self._arena is not None
        cpu = cpu_seconds(pid)
        if self._idle_cpu is None:
            self._idle_cpu = cpu
        return (
            bool(below)
            or self._arena.size > ARENA
            or cpu - self._idle_cpu > _IDLE_CPU_SECONDS
            or self._is_larger(self._settings.memory // 2, pid, below)
        )

    def _is_larger(self, limit: int, pid: int, below: list[int]) -> bool:
        """Whether it and its descendants have more memory than that, the arena not counted."""
        assert self._arena is not None
        pids = (pid, *below)
        if sum(map(resident_bytes_at_most, pids)) - self._arena.size <= limit:
            return False
        if sum(map(resident_bytes, pids)) - self._arena.size <= limit:
            return False
        return not below or sum(map(proportional_bytes, pids)) > limit

    def kill(self, loss: Loss | None) -> None:
        """End it now; its batches are given back with the loss, or without blame if there is none."""
        if self.is_gone:
            return
        self.is_gone = True
        self.is_ready = False
        self._loss = loss
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(loss.message if loss else "the worker was stopped"))
            self._ready.exception()
        self._signal()
        if self._channel is not None:
            self._channel.close()
        self._ending = asyncio.get_running_loop().create_task(self._end())
        batches, self._batches = list(self._batches), deque()
        for position, (work, batch) in enumerate(batches):
            work.on_lost(batch, loss if position == 0 else None)
        self._on_change(self)

    async def wait_ended(self) -> None:
        """Return when the process is gone and its scratch directory removed."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self) -> None:
        forked = self._forked
        if forked is not None:
            await self.zygote.wait_exit(forked.pid, 5.0)
            self.zygote.forget(forked.pid)
            os.close(forked.pidfd)
        if self._output is not None:
            self._output.close()
        if self._arena is not None:
            for piece in list(self._held.values()):
                piece.evacuate()
            self._arena.close()
        for _ in range(_REMOVAL_TRIES):
            if await asyncio.to_thread(remove_tree, self._scratch):
                return
            # What the function left running may still write there, until the zygote has ended it.
            await asyncio.sleep(SWEEP_SECONDS / 2)
        logger.warning("a scratch directory of %s cannot be removed", self.version.label)

    def _signal(self) -> None:
        if self._forked is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._forked.pidfd, signal.SIGKILL)

    def _lose(self, kind: LossKind, what: str, ordinal: int | None) -> None:
        self.kill(Loss(kind, what, ordinal, self._output.tail() if self._output else None))

    def _on_closed(self, reason: str) -> None:
        if not self.is_gone:
            self._asking = asyncio.get_running_loop().create_task(self._lose_with_status(reason))

    async def _lose_with_status(self, reason: str) -> None:
        """The socket ended first; the exit status says more, if it comes soon."""
        self.is_ready = False
        forked, arena, channel = self._forked, self._arena, self._channel
        assert forked is not None and arena is not None and channel is not None
        progress = read_progress(arena.view)
        # It may have closed its descriptors and live on.
        status = None if channel.is_breached else await self.zygote.wait_exit(forked.pid, _REASON_SECONDS)
        if status is None:
            self._signal()
            what = f"broke off: {reason}"
        elif status < 0:
            what = f"was killed by {_signal_name(-status)}"
        else:
            what = f"exited with status {status}"
        kind: LossKind = "protocol" if status is None else "exited"
        ordinal = None
        if self._batches:
            batch = self._batches[0][1]
            ordinal = (
                progress[1] if progress[0] == batch.number else batch.samples[0].ordinal if batch.samples else None
            )
        self._lose(kind, f"the worker process {what}", ordinal)

    def _on_frame(self, frame: wire.Frame) -> None:
        head = frame.head
        match head["t"]:
            case "part":
                self._on_part(head)
            case "ready":
                self.layers = {str(name): bool(active) for name, active in head["layers"].items()}
            case "loaded":
                if not self._ready.done():
                    self._ready.set_result(None)
            case "load_failed":
                self._load_failure = Failed(str(head["message"]), _text(head["traceback"]))
                if not self._ready.done():
                    self._ready.set_result(None)
            case "want":
                if (whole := self._whole) is not None:
                    whole.want(min(int(head["until"]), whole.size))
            case "waits":
                self._is_waiting = True
                self._on_change(self)
            case "need":
                self._make_room(int(head["bytes"]), bool(head["fits"]))
            case other:
                raise ValueError(f"unknown message {other!r}")

    def _on_part(self, head: dict[str, Any]) -> None:
        work, batch = self._batches[0]
        if head["batch"] != batch.number:
            raise ValueError("results of another batch")
        results: list[tuple[int, Result]] = []
        memory: Loss | None = None
        # Counted in the batch only with the results: what a broken report had would be done by nobody else.
        done = batch.done
        for item in head["results"]:
            ordinal = int(item[0])
            if item[1] == "more":
                self._take_more(work.whole, ordinal, item[2])
                continue
            if done >= len(batch.samples) or batch.samples[done].ordinal != ordinal:
                raise ValueError("results out of order")
            if item[1] == "memory":
                memory = Loss(
                    "memory", f"passed the memory limit of {self._settings.memory >> 20} MiB: {item[2]}", ordinal
                )
                break
            results.append((ordinal, self._result(ordinal, item)))
            done += 1
        seconds = StageSeconds(*(float(value) for value in head["seconds"]))
        final = bool(head["final"])
        if final and memory is None and done != len(batch.samples):
            raise ValueError("a batch without all its results")
        batch.done = done
        if final and memory is None:
            self._batches.popleft()
            self.idle_since = self._progress_at = time.monotonic()
            if self._output is not None:
                self._printed_before = self._output.total
        work.on_results(batch, results, seconds)
        if memory is not None:
            self.kill(memory)
        elif final:
            self._on_change(self)

    def _result(self, ordinal: int, item: list[Any]) -> Result:
        match item[1]:
            case "out":
                pieces = [*self._collected.pop(ordinal, []), *map(self._lease, item[2])]
                return Out(pieces, str(item[3]), str(item[4]), int(item[5]), bool(item[6]))
            case "drop":
                return Dropped(int(item[2]), bool(item[3]))
            case "fail" | "fatal":
                for piece in self._collected.pop(ordinal, []):
                    piece.release()
                return Failed(str(item[2]), _text(item[3]), fatal=item[1] == "fatal", output=_text(item[4]))
            case other:
                raise ValueError(f"unknown outcome {other!r}")

    def _take_more(self, whole: Whole | None, ordinal: int, pieces: list[Any]) -> None:
        """A part of what one sample gives is kept until the rest is there; of a whole object it is handed on."""
        if whole is not None:
            leased = list(map(self._lease, pieces))
            self._received += sum(piece.size for piece in leased)
            whole.take(leased)
            return
        collected = self._collected.setdefault(ordinal, [])
        # One that behaves asks for room, and is refused, before it can have given so many.
        if len(collected) + len(pieces) > self._settings.max_fan_out + ARENA // BLOCK:
            raise ValueError("more pieces than there is room for")
        collected.extend(map(self._lease, pieces))

    def _lease(self, item: list[Any]) -> Piece:
        offset, size, cut = (int(value) for value in item)
        assert self._arena is not None
        if not HEADER <= offset <= offset + size <= self._arena.size or not 0 <= cut <= size or offset in self._held:
            raise ValueError("a region outside the arena")
        piece = self._held[offset] = Piece(self._arena.view[offset : offset + size], offset, cut, self._on_release)
        return piece

    def _on_release(self, piece: Piece) -> None:
        if self._held.get(piece.offset) is piece:
            del self._held[piece.offset]
            self._released.append(piece.offset)

    def _make_room(self, size: int, fits: bool) -> None:
        """The arena is full of what no reader has taken yet, or too small for one sample."""
        assert self._channel is not None and self._arena is not None
        if size <= 0:
            raise ValueError("room for nothing")
        collected = sum(piece.size for pieces in self._collected.values() for piece in pieces)
        limit = self._settings.max_sample
        count = sum(map(len, self._collected.values()))
        if size + collected > limit or count > self._settings.max_fan_out:
            what = (
                f"more than {limit >> 20} MiB (max_sample)"
                if size + collected > limit
                else "too many samples (max_fan_out)"
            )
            self._channel.send({"t": "refuse", "message": f"the function gave {what} for one sample"})
            return
        if fits and self._released:
            released, self._released = self._released, []
            self._channel.send({"t": "room", "regions": released, "size": None})
            return
        for piece in list(self._held.values()):
            piece.evacuate()
        released, self._released = self._released, []
        if fits and (released or not self._held):
            self._channel.send({"t": "room", "regions": released, "size": None})
            return
        # Too small, or readers are being sent from it: what is pinned there stays mapped until it is released.
        self._held.clear()
        arena, self._arena = self._arena, SharedArena(max(ARENA, _round_up(size + 2 * HEADER)))
        arena.close()
        self._channel.send(
            {"t": "room", "regions": released, "size": self._arena.size}, descriptors=(self._arena.descriptor,)
        )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        # Real-time signals have no names.
        return f"signal {number}"


def _make_directory(path: Path) -> Path:
    """The directory; on a full disk one among the system's temporary files, since workers need no more than a name."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return Path(tempfile.mkdtemp(prefix="shardmill-worker-"))
    return path


def _describe(sample: Sample) -> list[list[Any]]:
    """Where a sample's fields stand and what their headers say."""
    return [
        [field.name, member.offset, member.size, int(member.mtime), member.mode, *_owner(member)]
        for field in sample.fields
        if (member := field.member)
    ]


def _owner(member: Member) -> tuple[int, int, str, str]:
    return member.uid, member.gid, member.uname, member.gname


def _round_up(size: int) -> int:
    return -(-size // (1 << 20)) * (1 << 20)
