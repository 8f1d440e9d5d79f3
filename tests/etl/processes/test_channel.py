"""The node's end of a socket: frames in and out, and peers that misbehave."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shardmill.etl.processes.channel import Channel
from shardmill.worker import wire


class Ends:
    """A channel on one end of a socket, a plain socket on the other."""

    def __init__(self, *, takes_descriptors: bool = False) -> None:
        ours, self.peer = socket.socketpair()
        self.frames: list[wire.Frame] = []
        self.reasons: list[str] = []
        self.channel = Channel(ours, self.frames.append, self.reasons.append, takes_descriptors=takes_descriptors)

    def close(self) -> None:
        self.channel.close()
        self.peer.close()


def run(story: Callable[[Ends], Coroutine[Any, Any, None]], *, takes_descriptors: bool = False) -> None:
    async def outer() -> None:
        ends = Ends(takes_descriptors=takes_descriptors)
        try:
            await asyncio.wait_for(story(ends), 20)
        finally:
            ends.close()

    asyncio.run(outer())


async def settle(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true"
        await asyncio.sleep(0.001)


def test_frames_go_both_ways_whole() -> None:
    async def story(ends: Ends) -> None:
        blob = os.urandom(3 << 20)
        ends.channel.send({"t": "large"}, blob)
        ends.channel.send({"t": "small"})
        peer = wire.Connection(ends.peer)
        found = [await asyncio.to_thread(peer.receive) for _ in range(2)]
        assert found == [({"t": "large"}, blob), ({"t": "small"}, b"")]
        data = wire.pack({"t": "answer"})
        for byte in data:
            ends.peer.send(bytes([byte]))
            await asyncio.sleep(0)
        await settle(lambda: ends.frames)
        assert ends.frames == [({"t": "answer"}, b"")]
        assert ends.reasons == []

    run(story)


def test_a_peer_that_closes_is_told_of_once() -> None:
    async def story(ends: Ends) -> None:
        ends.peer.sendall(wire.pack({"t": "last"}))
        ends.peer.close()
        await settle(lambda: ends.reasons)
        assert ends.frames == [({"t": "last"}, b"")]
        assert ends.reasons == ["the process closed its connection to the node"]
        assert not ends.channel.is_breached
        ends.channel.send({"t": "nobody"})

    run(story)


def test_descriptors_are_taken_only_from_whom_they_are_expected() -> None:
    async def expected(ends: Ends) -> None:
        socket.send_fds(ends.peer, [wire.pack({"t": "gives"})], [0])
        await settle(lambda: ends.frames)
        assert len(ends.channel.descriptors) == 1

    async def unexpected(ends: Ends) -> None:
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(ends.peer, [b"\x00"], [0, 1, 2])
        await settle(lambda: ends.reasons)
        assert ends.reasons == ["the process broke the protocol: it sent descriptors"]
        assert ends.channel.is_breached
        assert len(os.listdir("/proc/self/fd")) < before

    run(expected, takes_descriptors=True)
    run(unexpected)


@pytest.mark.parametrize("data", [b"\xff" * 8, wire.pack({"t": "x"}, b"a blob"), b"\x02\0\0\0\0\0\0\0[]"])
def test_junk_ends_the_connection_with_a_reason(data: bytes) -> None:
    async def story(ends: Ends) -> None:
        ends.peer.sendall(data)
        await settle(lambda: ends.reasons)
        assert "broke the protocol" in ends.reasons[0]
        assert ends.channel.is_breached
        assert ends.frames == []

    run(story)


def test_a_peer_that_does_not_read_is_given_up() -> None:
    async def story(ends: Ends) -> None:
        sent = 0
        while not ends.reasons:
            ends.channel.send({"t": "more", "text": "x" * 10_000})
            sent += 1
            await asyncio.sleep(0)
        assert ends.reasons == ["the process broke the protocol: it does not read what it is sent"]
        assert sent < 1000

    run(story)
