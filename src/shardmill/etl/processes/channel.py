"""The node's end of a socket to a zygote or worker: frames out with descriptors, frames in by callback."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from shardmill.worker import wire

_RECEIVE = 1 << 18
_MAX_HEAD = 16 << 20  # bytes; reports are cut to far less by workers that behave
_MAX_WAITING = 256  # frames for a peer that does not read; there are two batches and what they need


class Channel:
    """Sends and receives frames on the running loop.

    Args:
        sock: Connected Unix stream socket; owned from now on.
        on_frame: Called with each frame; may close the channel.
        on_closed: Called once, with a reason, when the peer closed or broke the protocol; not after `close`.
        takes_descriptors: Whether the peer may send some; `on_frame` takes them from `descriptors`.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[wire.Frame], None],
        on_closed: Callable[[str], None],
        *,
        takes_descriptors: bool = False,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._unpacker = wire.Unpacker(max_head=_MAX_HEAD, max_blob=0)
        self._takes_descriptors = takes_descriptors
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.descriptors: deque[int] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self._open = True
        self._is_waiting = False
        """For the peer to take more."""
        self.is_breached = False
        """The peer sent what no peer sends, and this end closed."""

    @property
    def is_open(self) -> bool:
        return self._open

    def send(self, head: dict[str, Any], blob: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Queue one frame; descriptors are duplicated, so the caller may close its own."""
        if not self._open:
            return
        if len(self._out) >= _MAX_WAITING:
            # Not from within the caller, who may be in the middle of a frame of this peer.
            self._loop.call_soon(self._breach, "it does not read what it is sent")
            return
        copies = tuple(os.dup(descriptor) for descriptor in descriptors)
        self._out.append((memoryview(wire.pack(head, blob)), copies))
        if len(self._out) == 1:
            self._flush()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._stop_waiting()
        for _, copies in self._out:
            _close_all(copies)
        _close_all(self.descriptors)
        self._out.clear()
        self.descriptors.clear()
        self._sock.close()

    def _flush(self) -> None:
        while self._out:
            data, copies = self._out[0]
            try:
                sent = socket.send_fds(self._sock, [data], list(copies)) if copies else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                self._is_waiting = True
                return
            except OSError:
                # The reader sees the end of the stream and tells why.
                self._stop_waiting()
                return
            _close_all(copies)
            if sent < len(data):
                self._out[0] = (data[sent:], ())
                continue
            self._out.popleft()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _RECEIVE, wire.MAX_DESCRIPTORS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(f"the socket failed: {error.strerror}")
            return
        self.descriptors.extend(descriptors)
        if self.descriptors and not self._takes_descriptors:
            self._breach("it sent descriptors")
            return
        if not data:
            self._lose("the process closed its connection to the node")
            return
        self._unpacker.feed(data)
        try:
            while self._open and (frame := self._unpacker.next_frame()) is not None:
                self._on_frame(frame)
        except wire.ProtocolError as error:
            self._breach(str(error))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self._breach(f"a malformed message ({type(error).__name__})")

    def _breach(self, what: str) -> None:
        self.is_breached = True
        self._lose(f"the process broke the protocol: {what}")

    def _lose(self, reason: str) -> None:
        if self._open:
            self.close()
            self._on_closed(reason)


def _close_all(descriptors: tuple[int, ...] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
