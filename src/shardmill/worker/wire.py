"""Framed messages between a node and its zygotes and workers, over one Unix stream socket each.

A frame is two lengths, a JSON head and an optional blob; descriptors ride along with the first byte. Neither end ever
unpickles the other's bytes, and a frame beyond the caps is a protocol error.
"""

import json
import socket
import struct
from collections import deque
from typing import Any, NamedTuple

VERSION = 1
MAX_HEAD = 64 << 20  # bytes; a batch of names, or a report of tracebacks
MAX_BLOB = 1 << 30  # bytes; a function with what it captures
MAX_DESCRIPTORS = 4

_LENGTHS = struct.Struct("<II")
_DESCRIPTOR = struct.Struct("i")
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR.size)
_RECEIVE = 1 << 16


class ProtocolError(Exception):
    """The peer sent what no peer of this version sends."""


class Frame(NamedTuple):
    head: dict[str, Any]
    blob: bytes


def pack(head: dict[str, Any], blob: bytes = b"") -> bytes:
    """One frame as bytes."""
    # ensure_ascii keeps names that are not UTF-8 (lone surrogates) intact.
    text = json.dumps(head, separators=(",", ":")).encode("ascii")
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


class Unpacker:
    """Cuts a byte stream into frames; sans I/O."""

    def __init__(self, *, max_head: int = MAX_HEAD, max_blob: int = MAX_BLOB) -> None:
        self._buffer = bytearray()
        self._max_head = max_head
        self._max_blob = max_blob

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None until more bytes are fed.

        Raises:
            ProtocolError: A length beyond the caps, or a head that is no JSON object.
        """
        buffer = self._buffer
        if len(buffer) < _LENGTHS.size:
            return None
        head_size, blob_size = _LENGTHS.unpack_from(buffer)
        if head_size > self._max_head or blob_size > self._max_blob:
            raise ProtocolError(f"a frame of {head_size} + {blob_size} bytes is too large")
        stop = _LENGTHS.size + head_size
        if len(buffer) < stop + blob_size:
            return None
        try:
            head = json.loads(buffer[_LENGTHS.size : stop])
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a frame's head is not JSON") from error
        if not isinstance(head, dict):
            raise ProtocolError("a frame's head is not an object")
        blob = bytes(buffer[stop : stop + blob_size])
        del buffer[: stop + blob_size]
        return Frame(head, blob)


class Connection:
    """The blocking end of a socket: in zygotes and workers."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.descriptors: deque[int] = deque()
        """Received with frames, in order; whoever handles the frame takes its own from the left."""
        self._unpacker = Unpacker()

    def send(self, head: dict[str, Any], blob: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        data = memoryview(pack(head, blob))
        sent = socket.send_fds(self.sock, [data], list(descriptors)) if descriptors else 0
        while sent < len(data):
            sent += self.sock.send(data[sent:])

    def receive(self) -> Frame | None:
        """The next frame, waiting for it; None when the peer closed."""
        while True:
            frame = self._unpacker.next_frame()
            if frame is not None:
                return frame
            if not self._fill(0):
                return None

    def receive_nowait(self) -> Frame | None:
        """The next frame if it is there already; None otherwise."""
        while True:
            frame = self._unpacker.next_frame()
            if frame is not None:
                return frame
            try:
                if not self._fill(socket.MSG_DONTWAIT):
                    return None
            except BlockingIOError:
                return None

    def _fill(self, flags: int) -> bool:
        # socket.recv_fds ignores its flags before Python 3.14, and so would wait.
        try:
            data, ancillary, message_flags, _ = self.sock.recvmsg(_RECEIVE, _ANCILLARY, flags)
        except ConnectionResetError:
            # The peer has gone without reading all that it was sent.
            return False
        if message_flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.descriptors.extend(number for (number,) in _DESCRIPTOR.iter_unpack(content))
        self._unpacker.feed(data)
        return bool(data)
