"""A run's output: ordered bytes, published only up to a safe cut, for any number of readers at their own speed.

Readers at the live edge are given memory, those behind the file that the bytes were spooled to. Without a file, or once
it can grow no more, bytes stay in memory until the slowest reader has them, and the run waits for it.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable

from shardmill.core.errors import Busy, ShardmillError
from shardmill.core.sources import InFile, InMemory, Slice
from shardmill.etl.runs.run_state import Chunk

EDGE = 4 << 20  # bytes kept in memory, at most, for readers at the live edge, once they are in the file too
SLICE = 1 << 20  # bytes of the file given to a reader at a time


class _Held:
    """A chunk in memory: who uses it, and whether it is still offered to readers."""

    __slots__ = ("chunk", "is_offered", "start", "stop", "users")

    def __init__(self, chunk: Chunk, start: int) -> None:
        self.chunk = chunk
        self.start = start
        self.stop = start + chunk.size
        self.users = 0
        self.is_offered = True


class RunOutput:
    """Bytes of one run.

    Args:
        window: Bytes that the run may have in memory.
        give_back: Told of each chunk that nobody needs any more.
        on_progress: Called when a reader went on or left, so that the run may go on too.
    """

    def __init__(self, *, window: int, give_back: Callable[[Chunk], None], on_progress: Callable[[], None]) -> None:
        self.published = 0
        """Bytes that readers may have."""
        self.spooled = 0
        """Bytes that are in the file."""
        self.is_spooling = False
        """More bytes go to the file."""
        self.has_file = False
        """What is in the file can be read from it."""
        self.is_complete = False
        self.error: ShardmillError | None = None
        # Half, so that there is always room to go on for who is not behind.
        self._edge = min(EDGE, window // 2)
        self._give_back = give_back
        self._on_progress = on_progress
        self._descriptor = -1
        self._runs_on = False
        self._furthest: float = 0
        """See `fastest`; readers only go forwards."""
        self._memory: deque[_Held] = deque()
        self._followers: set[Follower] = set()
        self._changed = asyncio.Event()
        self._batch = 0
        """Unspooled bytes that are waited for."""
        self._has_batch = asyncio.Event()

    # What the run says.

    def spool_to(self, descriptor: int) -> None:
        """Bytes go to a file from now on; called before the first of them."""
        self._descriptor = descriptor
        self.is_spooling = self.has_file = True

    def stop_spooling(self) -> None:
        """The file can grow no more; what is in it stays there for those who are behind."""
        self.is_spooling = False
        self._trim()
        self._notify()
        self._on_progress()

    def drop_file(self) -> None:
        """The file is gone; every reader is past it."""
        self.has_file = False

    def extend(self, chunk: Chunk) -> None:
        """Publish more bytes."""
        if not chunk.size:
            self._give_back(chunk)
            return
        self._memory.append(_Held(chunk, self.published))
        self.published += chunk.size
        if self.published - self.spooled >= self._batch:
            self._has_batch.set()
        self._notify()

    def finish(self) -> None:
        """All bytes are published."""
        self.is_complete = True
        self._has_batch.set()
        self._notify()

    def fail(self, error: ShardmillError) -> None:
        """There will be no more; readers get what is published and then the error."""
        self.error = error
        self._has_batch.set()
        self._notify()

    def take_unspooled(self, limit: int) -> list[_Held]:
        """Chunks that are not in the file yet, pinned until `end_spooling`; none once the file takes no more."""
        taken: list[_Held] = []
        size = 0
        if not self.is_spooling:
            # Readers may have passed the first of them, which are in memory no more.
            return taken
        for held in self._memory:
            if held.stop > self.spooled:
                if taken and size + held.chunk.size > limit:
                    break
                self._pin(held)
                taken.append(held)
                size += held.chunk.size
        return taken

    def end_spooling(self, taken: list[_Held], *, is_written: bool) -> None:
        """Chunks that were taken are in the file now, or could not be written."""
        if is_written and taken:
            self.spooled = taken[-1].stop
        for held in taken:
            self._unpin(held)
        if not is_written:
            self.stop_spooling()
        self._trim()

    async def wait_changed(self) -> None:
        """Return when something was published, the end included, or a reader went on."""
        await self._changed.wait()

    async def wait_batch(self, size: int, seconds: float) -> None:
        """Return when so many bytes are not in the file yet, when no more will come, or after a while."""
        if self.published - self.spooled >= size or self.is_complete or self.error is not None:
            return
        self._batch = size
        self._has_batch.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_batch.wait()

    def run_on(self) -> None:
        """It is finished for the sake of its file; no reader is waited for."""
        self._runs_on = True
        self._on_progress()

    def close(self) -> None:
        """Give everything back; nobody reads any more."""
        for held in list(self._memory):
            self._withdraw(held)
        self._memory.clear()

    # What readers say.

    @property
    def readers(self) -> int:
        return len(self._followers)

    @property
    def is_awaited(self) -> bool:
        """Somebody reads who is not patient."""
        return any(not follower.is_patient for follower in self._followers)

    @property
    def can_be_joined(self) -> bool:
        """Whether a reader can still have every byte from the first on."""
        first = self._memory[0].start if self._memory else self.published
        return first <= self.spooled and (self.spooled == 0 or self.has_file)

    @property
    def fastest(self) -> float:
        """Position of the fastest reader; infinite if one waits for the whole."""
        return math.inf if self._runs_on else self._furthest

    @property
    def slowest(self) -> float:
        """Position of the slowest reader; infinite if there is none."""
        return min((follower.position for follower in self._followers if not follower.waits_for_all), default=math.inf)

    def follow(self, *, waits_for_all: bool = False, is_patient: bool = False) -> "Follower":
        """A reader at the first byte; it must be closed.

        Args:
            waits_for_all: It reads nothing until the output is complete, so nothing waits for it.
            is_patient: It gives way to all who are not.
        """
        follower = Follower(self, waits_for_all=waits_for_all, is_patient=is_patient)
        self._followers.add(follower)
        self._furthest = max(self._furthest, follower.wants_until)
        self._on_progress()
        return follower

    def leave(self, follower: "Follower") -> None:
        self._followers.discard(follower)
        self._furthest = max((other.wants_until for other in self._followers), default=0)
        self._trim()
        self._report_progress()

    def find(self, position: int) -> "_Held | InFile | None":
        """What stands at a position: memory if it is there, else the file; None: not published yet."""
        if position >= self.published:
            return None
        if self._memory and position >= self._memory[0].start:
            for held in self._memory:
                if position < held.stop:
                    return held
        return InFile(self._descriptor, position, min(position + SLICE, self.spooled))

    def use(self, held: _Held) -> memoryview | bytes:
        return self._pin(held)

    def done(self, held: _Held) -> None:
        self._unpin(held)

    def moved(self, start: int, stop: int) -> None:
        """A reader went on from `start` to `stop`.

        Of several readers of the same bytes mostly the first and the last make a difference.
        """
        is_first = stop > self._furthest
        if is_first:
            self._furthest = stop
        is_trimmed = bool(self._memory) and start < self._memory[0].stop and self._trim()
        if is_first or is_trimmed or not self.is_spooling:
            self._report_progress()

    def _report_progress(self) -> None:
        self._on_progress()
        if self.has_file and not self.is_spooling:
            self._changed.set()
            self._changed = asyncio.Event()

    # Memory.

    def _pin(self, held: _Held) -> memoryview | bytes:
        held.users += 1
        return held.chunk.pin()

    def _unpin(self, held: _Held) -> None:
        held.users -= 1
        if not held.users:
            held.chunk.unpin()
            if not held.is_offered:
                self._give_back(held.chunk)

    def _withdraw(self, held: _Held) -> None:
        held.is_offered = False
        if not held.users:
            self._give_back(held.chunk)

    def _trim(self) -> bool:
        """Withdraw from the left what readers have, or what they will find in the file; whether anything was."""
        is_trimmed = False
        while self._memory:
            held = self._memory[0]
            if held.stop <= self.spooled:
                at_edge = (follower.position for follower in self._followers if follower.position >= held.start)
                kept = self._memory[-1].stop - held.start
                if kept <= self._edge and min(at_edge, default=math.inf) < held.stop:
                    break
            elif self.is_spooling or self.slowest < held.stop:
                break
            self._withdraw(self._memory.popleft())
            is_trimmed = True
        return is_trimmed

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for follower in self._followers:
            follower.wake()


class Follower:
    """One reader of a run's output. Resources: `close` it."""

    def __init__(self, output: RunOutput, *, waits_for_all: bool, is_patient: bool) -> None:
        self.position = 0
        self.waits_for_all = waits_for_all
        self.is_patient = is_patient
        self._output = output
        self._held: _Held | None = None
        self._views: list[memoryview | bytes] = []
        self._given = 0
        self._changed = asyncio.Event()
        self._is_closed = False

    @property
    def wants_until(self) -> float:
        return math.inf if self.waits_for_all else self.position

    def wake(self) -> None:
        self._changed.set()

    async def start(self) -> None:
        """Return when bytes may be sent, or the whole output is empty.

        Raises:
            ShardmillError: The run failed before that.
        """
        output = self._output
        while not output.published and not output.is_complete and output.error is None:
            await self._wait()
        # A failure that is known before the first byte is told as one, whatever could still be sent.
        if output.error is not None:
            raise output.error

    async def wait_complete(self) -> None:
        """Return when the output is complete and in its file.

        Raises:
            ShardmillError: The run failed.
            Busy: The file could not be kept.
        """
        output = self._output
        while not output.is_complete and output.error is None and (output.is_spooling or not output.published):
            await self._wait()
        if output.error is not None:
            raise output.error
        if not output.is_spooling:
            raise Busy("there is no room to keep the result; read it as a whole, without Range", retry_after=30)

    async def next(self) -> Slice | None:
        """The next bytes, or None at the end; those given before are done with.

        Raises:
            ShardmillError: The run failed; what was given so far ends inside a payload.
        """
        self._end_slice()
        output = self._output
        while (found := output.find(self.position)) is None:
            if output.is_complete:
                return None
            if output.error is not None:
                raise output.error
            await self._wait()
        if isinstance(found, InFile):
            self._given = found.stop
            return found
        self._held, self._given = found, found.stop
        whole = output.use(found)
        data = whole[self.position - found.start :]
        self._views = [whole, data]
        return InMemory(data)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._drop()
            self._output.leave(self)

    def _end_slice(self) -> None:
        self._drop()
        if self._given > self.position:
            start, self.position = self.position, self._given
            self._output.moved(start, self.position)

    def _drop(self) -> None:
        if self._held is not None:
            release_views(self._views)
            self._output.done(self._held)
            self._held, self._views = None, []

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def release_views(views: Iterable[memoryview | bytes]) -> None:
    """Let go of shared memory now: a forgotten view keeps a worker's whole arena, and its descriptor, alive."""
    for view in views:
        if isinstance(view, memoryview):
            view.release()
