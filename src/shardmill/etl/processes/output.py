"""What a process prints: read and thrown away but for the end of it."""

import asyncio
import os

KEPT = 16 << 10  # bytes
_READ = 1 << 16


class PrintedOutput:
    """A pipe whose write end goes to a child's stdout and stderr.

    Resources: `close` ends it; `writer` is closed by whoever passed it on.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Only our end is non-blocking: a child that prints faster than this reads must wait, not fail.
        os.set_blocking(self.writer, True)
        self._kept = bytearray()
        self.total = 0
        """Bytes printed so far."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reader, self._readable)
        self._open = True

    def _readable(self) -> None:
        try:
            data = os.read(self._reader, _READ)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._reader)
            return
        self.total += len(data)
        self._kept += data
        if len(self._kept) > 2 * KEPT:
            del self._kept[:-KEPT]

    def tail(self) -> str | None:
        """The end of what was printed, or None."""
        return bytes(self._kept[-KEPT:]).decode("utf-8", "replace") or None

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
