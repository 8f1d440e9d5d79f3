"""Bodies on their way in, locks of keys, and steps that are seen through."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash

from shardmill.core.errors import BadRequest, InsufficientStorage
from shardmill.storage.locks import KeyLocks
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK, Hasher
from shardmill.storage.uploads import SMALL, receive


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


class Kept:
    """Keeps what it is given."""

    def __init__(self, *, room: int = 1 << 40) -> None:
        self.hasher = Hasher()
        self.pieces: list[bytes] = []
        self.size: int | None = -1
        self._room = room

    def begin(self, size: int | None) -> None:
        self.size = size

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self.hasher.update(data)
        self.pieces.append(bytes(data))
        if self.hasher.size > self._room:
            raise InsufficientStorage("full")

    def hold(self, data: bytes | bytearray) -> None:
        assert self.size == -1
        self.pieces.append(bytes(data))


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def take(
    threads: ThreadPoolExecutor, kept: Kept, *data: bytes, size: int | None = None, checksum: str | None = None
) -> None:
    asyncio.run(receive(kept, pieces(*data), size=size, checksum=checksum, threads=threads))


def test_small_pieces_are_written_together(threads: ThreadPoolExecutor) -> None:
    kept = Kept()
    take(threads, kept, *[b"x" * 1000] * 3000, size=3_000_000)
    assert b"".join(kept.pieces) == b"x" * 3_000_000
    assert all(len(piece) >= BLOCK for piece in kept.pieces[:-1])
    assert kept.size == 3_000_000


def test_an_empty_body_is_an_object(threads: ThreadPoolExecutor) -> None:
    for size in (0, None):
        kept = Kept()
        take(threads, kept, size=size)
        assert (b"".join(kept.pieces), kept.hasher.size, kept.size) == (b"", 0, -1)


@pytest.mark.parametrize("size", [1, SMALL, SMALL + 1, BLOCK])
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_small_body_is_held_for_the_commit_and_a_larger_one_written(
    threads: ThreadPoolExecutor, size: int, is_announced: bool
) -> None:
    kept = Kept()
    data = os.urandom(size)
    take(threads, kept, data[:1000], data[1000:], size=size if is_announced else None)
    assert b"".join(kept.pieces) == data
    assert kept.hasher.checksum == xxhash.xxh3_128_hexdigest(data)
    assert (kept.size == -1) is (size <= SMALL)


@pytest.mark.parametrize("data", [[b"1234"], [b"12", b"34"], []])
def test_a_body_shorter_than_announced_is_refused(threads: ThreadPoolExecutor, data: list[bytes]) -> None:
    with pytest.raises(BadRequest, match="5 were announced; nothing was stored"):
        take(threads, Kept(), *data, size=5)


def test_a_body_longer_than_announced_is_refused_before_the_rest_is_written(threads: ThreadPoolExecutor) -> None:
    kept = Kept()
    with pytest.raises(BadRequest, match="longer than the 5 bytes announced"):
        take(threads, kept, b"12345", b"6", b"7" * BLOCK * 5, size=5)
    assert kept.pieces == []


def test_a_checksum_decides(threads: ThreadPoolExecutor) -> None:
    hasher = Hasher()
    hasher.update(b"bytes")
    take(threads, Kept(), b"bytes", checksum=f"xxh3:{hasher.checksum}")
    with pytest.raises(BadRequest, match=f"checksum is xxh3:{hasher.checksum}, announced was xxh3:00"):
        take(threads, Kept(), b"bytes", checksum="xxh3:00")


def test_a_failing_write_or_body_ends_it(threads: ThreadPoolExecutor) -> None:
    with pytest.raises(InsufficientStorage):
        take(threads, Kept(room=BLOCK), *[bytes(BLOCK)] * 3)

    async def broken() -> AsyncIterator[bytes]:
        yield b"first"
        raise BadRequest("the peer left")

    with pytest.raises(BadRequest, match="the peer left"):
        asyncio.run(receive(Kept(), broken(), size=None, checksum=None, threads=threads))


def test_a_key_has_one_holder_at_a_time_and_others_do_not_wait() -> None:
    async def story() -> list[str]:
        locks, order = KeyLocks(), []
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def first() -> None:
            async with locks.hold("k"):
                inside.set()
                await leave.wait()
                order.append("first")

        async def second() -> None:
            await inside.wait()
            async with locks.hold("other"):
                order.append("other")
            leave.set()
            async with locks.hold("k"):
                order.append("second")

        await asyncio.wait_for(asyncio.gather(first(), second()), 5)
        assert locks.is_idle
        return order

    assert asyncio.run(story()) == ["other", "first", "second"]


def test_who_leaves_while_waiting_for_a_key_leaves_nothing_behind() -> None:
    async def story() -> None:
        locks = KeyLocks()
        async with locks.hold("k"):
            waiter = asyncio.ensure_future(_hold(locks, "k"))
            await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait([waiter])
            assert not locks.is_idle
        assert locks.is_idle
        async with asyncio.timeout(5), locks.hold("k"):
            pass

    asyncio.run(story())


def test_whoever_holds_all_keys_waits_for_their_holders_and_keeps_others_out() -> None:
    async def story() -> list[str]:
        locks, order = KeyLocks(), []
        inside, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with locks.hold("k"):
                inside.set()
                await leave.wait()
                order.append("holder")

        async def everything() -> None:
            await inside.wait()
            async with locks.hold_all():
                order.append("all")
                late = asyncio.ensure_future(_hold(locks, "other", order))
                for _ in range(5):
                    await asyncio.sleep(0)
                order.append("all done")
            await late

        tasks = asyncio.gather(holder(), everything())
        await inside.wait()
        await asyncio.sleep(0)
        leave.set()
        await asyncio.wait_for(tasks, 5)
        assert locks.is_idle
        return order

    assert asyncio.run(story()) == ["holder", "all", "all done", "other"]


async def _hold(locks: KeyLocks, key: str, order: list[str] | None = None) -> None:
    async with locks.hold(key):
        if order is not None:
            order.append(key)


def test_a_step_is_seen_through_though_who_asked_has_left() -> None:
    async def story() -> None:
        begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def step() -> None:
            begun.set()
            await go_on.wait()
            done.set()

        caller = asyncio.ensure_future(finish(step()))
        await begun.wait()
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
        go_on.set()
        await asyncio.wait([caller])
        assert caller.cancelled()
        assert done.is_set()

    asyncio.run(story())


def test_a_step_ends_though_who_asked_is_cancelled_again_and_again() -> None:
    async def story() -> None:
        go_on, done = asyncio.Event(), asyncio.Event()

        async def step() -> None:
            await go_on.wait()
            done.set()

        caller = asyncio.ensure_future(finish(step()))
        for _ in range(3):
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
        go_on.set()
        await asyncio.wait([caller])
        assert caller.cancelled()
        assert done.is_set()

    asyncio.run(story())


def test_a_step_that_fails_tells_whoever_still_waits() -> None:
    async def broken() -> None:
        await asyncio.sleep(0)
        raise BadRequest("no")

    async def left_alone() -> None:
        caller = asyncio.ensure_future(finish(broken()))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()

    with pytest.raises(BadRequest):
        asyncio.run(finish(broken()))
    asyncio.run(left_alone())
