"""Frames between processes: whole whatever the parts they come in, refused when they are not what a peer sends."""

import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.worker.wire import MAX_BLOB, MAX_HEAD, Connection, ProtocolError, Unpacker, pack

TEXT = st.text(st.characters(codec=None))  # surrogates too: names of members that are not UTF-8
HEADS = st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.booleans(), st.none(), st.lists(st.integers())))


@given(st.lists(st.tuples(HEADS, st.binary(max_size=200)), max_size=5), st.lists(st.integers(1, 60), min_size=1))
def test_frames_come_out_as_they_went_in_whatever_the_parts(
    frames: list[tuple[dict[str, object], bytes]], steps: list[int]
) -> None:
    data = b"".join(pack(head, blob) for head, blob in frames)
    unpacker, found, turn = Unpacker(), [], 0
    while data:
        unpacker.feed(data[: steps[turn % len(steps)]])
        data, turn = data[steps[turn % len(steps)] :], turn + 1
        while (frame := unpacker.next_frame()) is not None:
            found.append((frame.head, frame.blob))
    assert found == frames


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<II", MAX_HEAD + 1, 0), "too large"),
        (struct.pack("<II", 2, MAX_BLOB + 1), "too large"),
        (struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "too large"),
        (struct.pack("<II", 4, 0) + b"{\xff\x00}", "not JSON"),
        (struct.pack("<II", 3, 0) + b"nul", "not JSON"),
        (struct.pack("<II", 200_000, 0) + b"[" * 200_000, "not JSON"),
        (struct.pack("<II", 2, 0) + b"[]", "not an object"),
    ],
)
def test_what_no_peer_sends_is_a_protocol_error(data: bytes, message: str) -> None:
    unpacker = Unpacker()
    unpacker.feed(data)
    with pytest.raises(ProtocolError, match=message):
        unpacker.next_frame()


def test_a_frame_beyond_the_caps_is_refused_by_its_lengths_alone() -> None:
    unpacker = Unpacker(max_head=100, max_blob=0)
    unpacker.feed(struct.pack("<II", 10, 1))
    with pytest.raises(ProtocolError):
        unpacker.next_frame()


def test_descriptors_arrive_with_their_frames_in_order() -> None:
    left, right = socket.socketpair()
    with left, right:
        sender, receiver = Connection(left), Connection(right)
        pipes = [os.pipe() for _ in range(2)]
        try:
            sender.send({"t": "first"}, descriptors=(pipes[0][0],))
            sender.send({"t": "none"}, b"x" * 50_000)
            sender.send({"t": "second"}, descriptors=(pipes[1][0], pipes[1][1]))
            assert receiver.receive_nowait() is not None
            heads = [receiver.receive(), receiver.receive()]
            assert [frame.head["t"] for frame in heads if frame] == ["none", "second"]
            assert receiver.receive_nowait() is None
            received = list(receiver.descriptors)
            assert len(received) == 3
            assert os.fstat(received[0]).st_ino == os.fstat(pipes[0][0]).st_ino
            assert os.fstat(received[2]).st_ino == os.fstat(pipes[1][1]).st_ino
            for descriptor in received:
                os.close(descriptor)
        finally:
            for ends in pipes:
                os.close(ends[0])
                os.close(ends[1])


def test_a_closed_peer_ends_the_stream() -> None:
    left, right = socket.socketpair()
    with right:
        Connection(left).send({"t": "last"})
        left.close()
        receiver = Connection(right)
        last = receiver.receive()
        assert last is not None
        assert last.head == {"t": "last"}
        assert receiver.receive() is None
