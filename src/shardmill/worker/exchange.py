"""One whole object between the node and the user's code: input as far as it is there, output as far as it is allowed.

The node says how far both are; whoever goes further waits here. So a reader that is slow, or a source that is still
arriving, holds up this one worker and costs no memory.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from shardmill.worker import wire
from shardmill.worker.arena import Arena

CHUNK = 512 << 10  # bytes of output that are reported at once
FLUSH_SECONDS = 0.05  # output is reported this often, even if it is less

READ, USER, ENCODE = 0, 2, 3
"""Stages of the clock, as of samples."""


class SourceEnds(OSError):
    """The object is shorter than it was: it changed while it was read."""


class Exchange:
    """May be used by all threads of the user's code.

    Args:
        connection: To the node.
        arena: Where output is written; not replaced while this is in use.
        handle: Takes a message from the node that has nothing to do with this object.
        head: The node's `object` message.
        descriptor: Of the object.
    """

    def __init__(
        self,
        connection: wire.Connection,
        arena: Arena,
        handle: Callable[[wire.Frame], None],
        head: dict[str, Any],
        descriptor: int,
    ) -> None:
        self.size: int = head["size"]
        """Bytes of the object."""
        self.descriptor = descriptor
        self.bytes_in = 0
        """Bytes read so far."""
        self.written = 0
        """Bytes given so far."""
        self._connection = connection
        self._arena = arena
        self._handle = handle
        self._batch: int = head["batch"]
        self._available: int = head["available"]
        self._allowed: int = head["allowed"]
        self._asked = 0
        self._is_told_of_wait = False
        self._region: tuple[int, int] | None = None
        self._filled = 0
        self._reported_at = time.monotonic()
        self._lock = threading.RLock()
        self._is_closed = False
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._mark = time.perf_counter()

    # Input.

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the object from `offset` on: `length`, or what there is to its end.

        Raises:
            SourceEnds: It is shorter than it was.
        """
        stop = min(offset + length, self.size)
        if stop <= offset:
            return b""
        with self._lock:
            if self._is_closed:
                raise ValueError("the object's run is over")
            self.wait_available(stop)
            self.lap(USER)
            data = os.pread(self.descriptor, stop - offset, offset)
            while len(data) < stop - offset:
                more = os.pread(self.descriptor, stop - offset - len(data), offset + len(data))
                if not more:
                    raise SourceEnds(f"the object ends at byte {offset + len(data)}; it had {self.size}")
                data += more
            self.bytes_in += len(data)
            self.lap(READ)
        return data

    def wait_available(self, stop: int) -> None:
        """Return when the bytes up to there are in place."""
        with self._lock:
            while not self.is_available(stop):
                self.wait()

    def is_available(self, stop: int) -> bool:
        """Whether the bytes up to there are in place; if not, the node is asked for them."""
        if stop > self._available and stop > self._asked:
            self._asked = stop
            self._connection.send({"t": "want", "until": stop})
        return stop <= self._available

    # Output.

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Give more output; waits as long as readers are too far behind."""
        with self._lock, memoryview(data) as given, _flat(given) as view:
            if self._is_closed:
                raise ValueError("the object's run is over")
            self.lap(USER)
            position = 0
            while position < len(view):
                while (room := self.room()) is None:
                    self.wait()
                with room:
                    count = min(len(room), len(view) - position)
                    room[:count] = view[position : position + count]
                self.advance(count)
                position += count
            self.lap(ENCODE)
            return position

    def room(self) -> memoryview | None:
        """Where the next output may be written, at least one byte; None: `wait` first. Release it before `advance`."""
        if self._region is None:
            size = min(CHUNK, self._allowed - self.written)
            offset = self._arena.allocate(size) if size > 0 else None
            if offset is None:
                self._tell_of_wait()
                return None
            self._region, self._filled = (offset, size), 0
        offset, size = self._region
        return self._arena.view[offset + self._filled : offset + size]

    def advance(self, count: int) -> None:
        """So many bytes were written to the room."""
        assert self._region is not None
        self._filled += count
        self.written += count
        if self._filled == self._region[1] or time.monotonic() - self._reported_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Report what was written, so that readers get it."""
        with self._lock:
            if self._region is None or self._is_closed:
                return
            (offset, _), self._region = self._region, None
            self._reported_at = time.monotonic()
            if not self._filled:
                self._arena.release(offset)
                return
            self._arena.shrink(offset, self._filled)
            self._report([0, "more", [[offset, self._filled, 0]]], final=False)

    @property
    def flush_due(self) -> float | None:
        """Seconds until what was written should be reported; None: nothing is waiting for that."""
        if self._region is None or not self._filled:
            return None
        return max(0.0, self._reported_at + FLUSH_SECONDS - time.monotonic())

    def finish(self, result: list[Any]) -> None:
        """Report how it ended; threads that the user's code has left get errors from now on."""
        with self._lock:
            if self._is_closed:
                return
            if result[1] == "out":
                self.flush()
            elif self._region is not None:
                self._arena.release(self._region[0])
            self._is_closed = True
            self.lap(USER)
            self._report(result, final=True)

    def _report(self, result: list[Any], *, final: bool) -> None:
        """Send one result, with the seconds since the last one."""
        seconds, self._seconds = self._seconds, [0.0, 0.0, 0.0, 0.0]
        self._connection.send(
            {
                "t": "part",
                "batch": self._batch,
                "results": [result],
                "final": final,
                "seconds": [round(value, 7) for value in seconds],
            }
        )

    # The node.

    @property
    def messages(self) -> socket.socket:
        """Can be read when the node has said something."""
        return self._connection.sock

    def wait(self) -> None:
        """Wait for the node's next message; the time does not count."""
        self.lap(USER)
        frame = self._connection.receive()
        if frame is None:
            raise ConnectionError("the node closed the socket")
        self._take(frame)
        self._mark = time.perf_counter()

    def take_messages(self) -> None:
        """Take in what the node has said by now."""
        while (frame := self._connection.receive_nowait()) is not None:
            self._take(frame)

    def lap(self, stage: int) -> None:
        """The time since the last lap was spent there."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._mark
        self._mark = now

    def skip_lap(self) -> None:
        """The time since the last lap was spent waiting."""
        self._mark = time.perf_counter()

    def _tell_of_wait(self) -> None:
        if not self._is_told_of_wait:
            self._is_told_of_wait = True
            self._connection.send({"t": "waits"})

    def _take(self, frame: wire.Frame) -> None:
        head = frame.head
        if head["t"] != "go":
            self._handle(frame)
            return
        for offset in head["release"]:
            self._arena.release(offset)
        self._available = max(self._available, head["available"])
        self._allowed = max(self._allowed, head["allowed"])
        self._is_told_of_wait = False


def _flat(view: memoryview) -> memoryview:
    """The bytes in one row."""
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
