"""Finished shards on their way from a file to a socket: every byte, and no stop where a reader takes it for the end."""

import os
import socket
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.server.framed_file import FramedFile
from tests.etl.judges import tarfile_is_content
from tests.shards.test_stops import framed, payloads

NAMES = st.sampled_from(["0001.cls", "0001.jpg", "k" * 150 + ".json"])
SIZES = st.sampled_from([0, 1, 3, 512, 2050, 9000, 70_000, 200_000, 700_000])


class Watched(FramedFile):
    """Tells where it stopped after each call into the kernel."""

    def __init__(self, sock: int, buffer: int, descriptor: int) -> None:
        super().__init__(sock, buffer, descriptor)
        self.stops: list[int] = []
        self.sent = 0
        self.unread = 0
        """Bytes that went from file to socket without being read."""

    def _send_payload(self, stop: int, most: int) -> int:
        count = super()._send_payload(stop, most)
        self.unread += count
        return self._note(count)

    def _send_pending(self) -> int:
        return self._note(super()._send_pending())

    def _note(self, count: int) -> int:
        if count:
            self.sent += count
            self.stops.append(self.sent)
        return count


def send(
    data: bytes, *, most: int = 1 << 20, buffer: int = 16 << 10, hold_back: int = 100_000
) -> tuple[bytes, Watched]:
    """What arrives at the other end of a small socket, and how it was sent."""
    ours, theirs = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while piece := theirs.recv(8192):
            received.extend(piece)

    reader = threading.Thread(target=receive)
    with tempfile.TemporaryFile() as file, ours, theirs:
        file.write(data)
        file.flush()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        ours.setblocking(False)
        size = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sender = Watched(ours.fileno(), size, file.fileno())
        reader.start()
        for bound, is_end in ((max(0, len(data) - hold_back), False), (len(data), True)):
            while not sender.is_done(bound):
                sender.send_some(bound, most, is_end=is_end)
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    return bytes(received), sender


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, SIZES), max_size=6),
    most=st.sampled_from([1, 1000, 1 << 20]),
    hold_back=st.sampled_from([0, 1, 700, 65_536, 1 << 30]),
)
def test_every_byte_arrives_and_no_stop_looks_complete(
    members: list[tuple[str, int]], most: int, hold_back: int
) -> None:
    data = framed(members)
    received, sender = send(data, most=max(most, len(data) // 200), hold_back=hold_back)
    assert received == data
    last = max((offset + size for offset, size in payloads(data) if size), default=0)
    for stop in sender.stops:
        if 0 < stop < last:
            assert not tarfile_is_content(data[:stop]), stop


def test_large_payloads_are_not_read() -> None:
    data = framed([(f"{number:04d}.npy", 600_000) for number in range(5)])
    received, sender = send(data)
    assert received == data
    assert sender.unread > 0.9 * len(data)


def test_what_is_no_archive_arrives_as_it_is() -> None:
    for data in (b"", b"x", os.urandom(300_000), bytes(200_000)):
        assert send(data)[0] == data


def test_a_reader_who_takes_nothing_makes_it_return() -> None:
    data = framed([("0001.npy", 3_000_000)])
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as file, ours, theirs:
        file.write(data)
        file.flush()
        ours.setblocking(False)
        sender = FramedFile(ours.fileno(), 16 << 10, file.fileno())
        sent = 0
        while count := sender.send_some(len(data), 1 << 20, is_end=True):
            sent += count
        assert 0 < sent < len(data)
        assert not sender.is_done(len(data))


def test_a_reader_who_is_gone_and_a_file_that_is_short_are_errors() -> None:
    data = framed([("0001.npy", 300_000)])
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as file, ours:
        file.write(data)
        file.flush()
        ours.setblocking(False)
        theirs.close()
        with pytest.raises(ConnectionError):
            FramedFile(ours.fileno(), 16 << 10, file.fileno()).send_some(len(data), 1 << 20, is_end=True)
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as file, ours, theirs:
        file.write(data[:1000])
        file.flush()
        ours.setblocking(False)
        with pytest.raises(OSError, match="ends early"):
            FramedFile(ours.fileno(), 16 << 10, file.fileno()).send_some(len(data), 1 << 20, is_end=True)
