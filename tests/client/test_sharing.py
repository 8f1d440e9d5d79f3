"""One client in many threads, and on both sides of a fork."""

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shardmill.client import Client
from shardmill.client.http import MAX_IDLE
from tests.client.scripted import ObjectNode

URI = "ais://bkt/a"
BODY = os.urandom(3_000_000)

Serving = Callable[..., tuple[ObjectNode, Client]]


def in_child(work: Callable[[], bytes]) -> bytes:
    """What it gives in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as file:
                file.write(work())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        told = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return told


def test_a_child_reads_by_connections_of_its_own_and_leaves_its_parents_alone(serving: Serving) -> None:
    node, client = serving(BODY)
    assert client.object(URI).read() == BODY
    assert in_child(lambda: client.object(URI).read()) == BODY
    assert len(node.connections) == 2
    assert client.object(URI).read() == BODY
    assert len(node.connections) == 2


def test_an_open_body_is_read_to_its_end_on_both_sides_of_a_fork(serving: Serving) -> None:
    node, client = serving(BODY)
    with client.object(URI).get() as reader:
        first = reader.read(1_000_000)
        assert in_child(reader.read) == BODY[1_000_000:]
        assert first + reader.read() == BODY
    assert [b"If-Range" in request for request in node.requests] == [False, True]
    assert client.object(URI).read() == BODY
    assert len(node.connections) == 2


def test_a_child_that_leaves_a_body_does_not_end_its_parents(serving: Serving) -> None:
    _, client = serving(BODY)
    with client.object(URI).get() as reader:

        def leave() -> bytes:
            reader.close()
            client.close()
            return b"left"

        assert in_child(leave) == b"left"
        assert reader.read() == BODY


def test_threads_share_a_client_without_mixing_answers(client: Client) -> None:
    bucket = client.bucket("ais://threads")
    bucket.create()
    try:
        bodies = {f"{number}": bytes([number]) * (number * 5003) for number in range(24)}
        barrier = threading.Barrier(12)

        def work(first: int) -> None:
            barrier.wait()
            for number in (*range(first, 24), *range(first)):
                handle = bucket.object(f"{number}")
                if number % 12 == first:
                    handle.put(bodies[f"{number}"], meta={"by": f"{first}"})
            barrier.wait()
            for number in (*range(first, 24), *range(first)):
                handle = bucket.object(f"{number}")
                assert handle.read() == bodies[f"{number}"]
                assert handle.head().user == {"by": f"{number % 12}"}

        with ThreadPoolExecutor(12) as threads:
            list(threads.map(work, range(12)))
        assert 0 < len(client._transport._idle) <= MAX_IDLE
    finally:
        bucket.remove(force=True)
