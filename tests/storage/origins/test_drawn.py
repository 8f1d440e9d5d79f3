"""Long bodies that threads receive: every byte once and in order, as they come, and nothing is left of one that ends."""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import aiohttp
import pytest

from shardmill.core.errors import BackendTimeout, BackendUnavailable
from shardmill.core.origins import InThread
from shardmill.storage.origins.drawn import BUFFER, WORTH, DrawnBody
from shardmill.testing.faults import Fault, FaultServer, MadeUp, fault_server

SIZE = 5 * BUFFER + 12_345
DATA = MadeUp(SIZE)[:]
HEAD = f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode()

Value = TypeVar("Value")
Peer = Callable[[socket.socket], None]


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story

    asyncio.run(bounded())


@asynccontextmanager
async def answered(peer: Peer) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer that a peer gives to one request."""

    def serve() -> None:
        with listener.accept()[0] as connection:
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65_536)
            peer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{listener.getsockname()[1]}/") as answer,
            ):
                yield answer
        finally:
            await asyncio.to_thread(thread.join)


def taken(answer: aiohttp.ClientResponse, *, start: int = 0, idle_seconds: float = 20.0, size: int = SIZE) -> DrawnBody:
    body = DrawnBody.take(answer, size, start=start, label="it", idle_seconds=idle_seconds)
    assert body is not None
    return body


async def in_thread(call: Callable[..., Value], *arguments: object) -> Value:
    return await asyncio.get_running_loop().run_in_executor(None, call, *arguments)


async def drawn(body: DrawnBody, most: int = BUFFER) -> tuple[bytes, list[int]]:
    """All of it, and how long the pieces were."""
    found, sizes = bytearray(), list[int]()

    def give(piece: memoryview) -> None:
        found.extend(piece)
        sizes.append(len(piece))

    before = 0
    while count := await body.draw(give, most, in_thread):
        assert count == len(found) - before
        before = len(found)
    return bytes(found), sizes


@pytest.mark.parametrize("start", [0, 1000, BUFFER - 1])
def test_pieces_end_where_blocks_of_the_object_end(start: int) -> None:
    def peer(connection: socket.socket) -> None:
        connection.sendall(HEAD + DATA)

    async def story() -> None:
        async with answered(peer) as answer:
            body = taken(answer, start=start)
            found, sizes = await drawn(body)
            body.close()
            assert found == DATA
            position = start
            for size in sizes:
                assert position % BUFFER + size <= BUFFER or position == start
                position += size

    run(story())


def test_only_as_much_is_taken_as_is_wanted() -> None:
    def peer(connection: socket.socket) -> None:
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(HEAD + DATA)

    async def story() -> None:
        async with answered(peer) as answer:
            body = taken(answer, size=3 * BUFFER)
            found, _ = await drawn(body)
            body.close()
            assert found == DATA[: 3 * BUFFER]

    run(story())


def test_the_first_bytes_are_given_while_no_others_come() -> None:
    go_on = threading.Event()

    def peer(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        connection.sendall(DATA[:10])
        go_on.wait(30)
        connection.sendall(DATA[10:])

    async def story() -> None:
        found = bytearray()
        async with answered(peer) as answer:
            body = taken(answer)
            count = await body.draw(found.extend, 4 * BUFFER, in_thread)
            assert found == DATA[:count]
            assert 0 < count <= 10
            go_on.set()
            rest, _ = await drawn(body)
            body.close()
            assert bytes(found) + rest == DATA

    run(story())


def test_what_trickles_comes_whole() -> None:
    def peer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(0, len(HEAD), 20):
            connection.sendall(HEAD[position : position + 20])
        for position in range(0, 300_000, 1000):
            connection.sendall(DATA[position : position + 1000])
        connection.sendall(DATA[300_000:])

    async def story() -> None:
        async with answered(peer) as answer:
            body = taken(answer)
            found, _ = await drawn(body)
            body.close()
            assert found == DATA

    run(story())


def test_a_body_that_breaks_off_gives_what_came_and_then_an_error() -> None:
    def peer(connection: socket.socket) -> None:
        connection.sendall(HEAD + DATA[:3_000_000])

    async def story() -> None:
        found = bytearray()
        async with answered(peer) as answer:
            body = taken(answer)
            with pytest.raises(BackendUnavailable, match="it: the server broke off"):
                while await body.draw(found.extend, BUFFER, in_thread):
                    pass
            body.close()
            assert found == DATA[:3_000_000]

    run(story())


def test_a_body_that_stalls_is_waited_for_no_longer_than_allowed() -> None:
    is_done = threading.Event()

    def peer(connection: socket.socket) -> None:
        connection.sendall(HEAD + DATA[:3_000_000])
        is_done.wait(30)

    async def story() -> None:
        found = bytearray()
        async with answered(peer) as answer:
            body = taken(answer, idle_seconds=0.2)
            with pytest.raises(BackendTimeout):
                while await body.draw(found.extend, BUFFER, in_thread):
                    pass
            body.close()
            assert found == DATA[:3_000_000]
            is_done.set()

    run(story())


def test_a_body_that_stalls_holds_no_thread() -> None:
    is_done = threading.Event()

    def peer(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        is_done.wait(30)

    async def story() -> None:
        found = bytearray()
        with ThreadPoolExecutor(1) as threads:
            in_one: InThread = partial(asyncio.get_running_loop().run_in_executor, threads)
            async with answered(peer) as answer:
                body = taken(answer)
                drawing = asyncio.ensure_future(body.draw(found.extend, BUFFER, in_one))
                # The one thread that there is has time for others, again and again.
                for _ in range(20):
                    await in_one(os.getpid)
                drawing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await drawing
                body.close()
                assert not found
                is_done.set()

    run(story())


def test_what_goes_wrong_with_the_bytes_is_told() -> None:
    def peer(connection: socket.socket) -> None:
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(HEAD + DATA)

    def give(piece: memoryview) -> None:
        raise OSError("the disk is full")

    async def story() -> None:
        async with answered(peer) as answer:
            body = taken(answer)
            with pytest.raises(OSError, match="the disk is full"):
                await body.draw(give, BUFFER, in_thread)
            body.close()

    run(story())


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.mark.parametrize(
    ("size", "faults"),
    [(WORTH - 1, ()), (SIZE, (Fault("chunked"),)), (SIZE, (Fault("unending"),))],
    ids=["short", "chunked", "without a length"],
)
def test_others_are_left_as_they_are(server: FaultServer, size: int, faults: tuple[Fault, ...]) -> None:
    server.put("/key", DATA[:size])
    server.misbehave("/key", *faults)

    async def story() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"{server.endpoint}/key") as answer:
            assert DrawnBody.take(answer, size, start=0, label="it", idle_seconds=20) is None
            assert await answer.read() == DATA[:size]

    run(story())
