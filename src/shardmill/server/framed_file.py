"""Sending a finished shard from its file so that it stops inside a payload, whatever stops it; without copying it.

Payloads go from the file to the socket in the kernel. What lies between them is read, and given to the kernel at once
when it has room for all of it, as `server.framed` does for shards that are still being made.
"""

import os
import select
from collections import deque
from collections.abc import Iterator

from shardmill.server.framed import whole_limit
from shardmill.shards.stops import WHOLE, Stretch, Stretches

NO_ROOM_MILLISECONDS = 20  # a thread waits this long for a slow reader before it does something else

_MANY = 64 << 10  # bytes read at a time where payloads are small
_FEW = 4 << 10  # where they are large: headers, and little of the next payload
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LARGE = 32 << 10  # bytes of a payload from which on copying costs more than another call


class FramedFile:
    """One file on its way to one socket. Its calls block, as far as they are told to; one at a time.

    Args:
        sock: Descriptor of a connected socket that does not block; nobody else writes to it meanwhile.
        buffer: Size of its buffer of what is to be sent.
        descriptor: Of the file.
    """

    def __init__(self, sock: int, buffer: int, descriptor: int) -> None:
        self.position = 0
        """Bytes that were read, or sent unread."""
        self.descriptor = descriptor
        """Of the file; may become another one with the same bytes from `position` on."""
        self._sock = sock
        self._stretches = Stretches()
        self._stretches.limit = whole_limit(buffer)
        self._read = _MANY
        self._pending: deque[Stretch] = deque()
        self._patience = NO_ROOM_MILLISECONDS
        self._is_full = False
        """The reader took less than it was given, so that it takes nothing more for a moment."""
        self._poller = select.poll()
        self._poller.register(sock, select.POLLOUT)

    def send_some(self, stop: int, most: int, *, is_end: bool, patience: int = NO_ROOM_MILLISECONDS) -> int:
        """Send until `stop`, until about `most` bytes are sent, or until the reader takes nothing for a while.

        Args:
            stop: Position in the file.
            most: Bytes.
            is_end: The file ends at `stop`; what is held back goes, too.
            patience: Milliseconds that the reader may take nothing. 0: a call for the loop, when there is room.

        Returns:
            Bytes sent; 0: there is no room, or nothing is left.
        """
        self._patience = patience
        sent = 0
        while sent < most:
            if not self._pending and self._refill(stop, is_end=is_end):
                # All of it may be held back until more is read.
                continue
            count = self._send_pending() if self._pending else self._send_payload(stop, most - sent)
            sent += count
            if not count or (self._is_full and not patience):
                break
        return sent

    def is_done(self, stop: int) -> bool:
        """Whether all up to `stop` is sent or held back."""
        return self.position >= stop and not self._pending

    def _refill(self, stop: int, *, is_end: bool) -> bool:
        """Read what cannot go unread; False: the next bytes can, or there are none left."""
        # A payload that was begun so is sent so to its end.
        enough = _LARGE if self._read == _MANY else 1
        if self._stretches.free >= enough and self.position < stop:
            self._read = _FEW
            return False
        # What goes unread then begins with a page, which is half of what it costs else.
        size = min(self._read - (self.position + self._read) % -_PAGE, stop - self.position)
        self._read = _MANY
        if size > 0:
            data = os.pread(self.descriptor, size, self.position)
            if len(data) != size:
                raise OSError("the file ends early")
            self.position += size
            self._keep(self._stretches.feed(data))
        if is_end and self.position >= stop:
            self._keep(self._stretches.finish())
        return bool(self._pending) or size > 0

    def _keep(self, stretches: Iterator[Stretch]) -> None:
        for stretch in stretches:
            # Views of what was read are released once the next is asked for.
            data = bytes(stretch.data)
            if self._pending and not stretch.is_whole and len(self._pending[-1].data) + len(data) <= WHOLE:
                # One call for a header and the little that was read of its payload.
                last = self._pending.pop()
                self._pending.append(Stretch(bytes(last.data) + data, last.is_whole))
            else:
                self._pending.append(Stretch(data, stretch.is_whole))

    def _send_payload(self, stop: int, most: int) -> int:
        """Send bytes of a payload from the file; 0: there is no room, or nothing that may go so."""
        size = min(self._stretches.free, stop - self.position, most)
        while size:
            try:
                sent = os.sendfile(self._sock, self.descriptor, self.position, size)
            except BlockingIOError:
                if not self._poller.poll(self._patience):
                    return 0
                continue
            if not sent:
                raise OSError("the file ends early")
            self.position += sent
            self._stretches.pass_over(sent)
            self._is_full = sent < size
            return sent
        return 0

    def _send_pending(self) -> int:
        """Send the next stretch; a whole one at once, when there is room for all of it."""
        if not self._poller.poll(self._patience):
            return 0
        data, is_whole, _ = self._pending[0]
        try:
            sent = os.write(self._sock, data)
        except BlockingIOError:
            return 0
        self._pending.popleft()
        self._is_full = sent < len(data)
        if self._is_full:
            self._pending.appendleft(Stretch(data[sent:], is_whole))
        return sent
