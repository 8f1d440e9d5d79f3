"""Files of scratch results that become those of others: which ones, and never under a reader."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardmill.storage.results import ResultStore
from shardmill.storage.reuse import WANTED_SECONDS, Unread
from tests.storage.test_results import disk_use, get, put

SIZE = 10_000


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_oldest_leaves_once_there_are_more_than_may_stay() -> None:
    unread = Unread(100, now=Clock())
    unread.add("a", 60)
    assert unread.choose("x") is None
    unread.add("b", 60)
    assert unread.choose("y") == "a"
    assert unread.choose("z") is None
    unread.add("c", 60)
    unread.discard("b")
    assert unread.choose("w") is None


def test_all_are_kept_for_a_while_after_one_was_missed() -> None:
    clock = Clock()
    unread = Unread(100, now=clock)
    for key in ("a", "b", "c"):
        unread.add(key, 60)
    assert unread.choose("x") == "a"
    assert unread.choose("a") is None
    unread.add("a", 60)
    clock.seconds = WANTED_SECONDS - 1
    assert unread.choose("y") is None
    clock.seconds = WANTED_SECONDS + 1
    assert unread.choose("y") == "b"


def test_a_spool_takes_the_file_of_the_oldest_scratch_result_that_nobody_has_opened(tmp_path: Path) -> None:
    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=1 << 20, most=100, scratch_seconds=600, unread=2 * SIZE
        ) as store:
            await put(store, "lasting", b"l" * SIZE)
            await put(store, "opened", os.urandom(SIZE), is_scratch=True)
            assert await get(store, "opened") is not None
            for key in ("first", "second", "third"):
                await put(store, key, os.urandom(SIZE), is_scratch=True)
            inode = (tmp_path / "first").stat().st_ino
            shorter = os.urandom(SIZE // 2)
            await put(store, "new", shorter, is_scratch=True)
            assert (tmp_path / "new").stat().st_ino == inode
            assert await get(store, "new") == shorter
            assert not store.has("first")
            assert store.has("second")
            assert store.has("lasting")
            assert store.has("opened")
            assert store.statistics().used == 4 * SIZE + SIZE // 2
        # What is longer grows, and an earlier result leaves nothing behind what is written over it.
        async with ResultStore.open_directory(tmp_path, capacity=1 << 20, most=100, scratch_seconds=600) as store:
            assert await get(store, "new") == shorter
            assert {entry.key for entry in store.list()} == {"lasting", "opened", "second", "third", "new"}

    asyncio.run(story())


def test_a_file_that_grows_counts_what_it_grows_by_and_one_that_is_given_up_counts_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=4 * SIZE, most=100, scratch_seconds=600, unread=SIZE
        ) as store:
            await put(store, "first", os.urandom(SIZE), is_scratch=True)
            await put(store, "second", os.urandom(SIZE), is_scratch=True)
            spool = await store.begin("third")
            assert store.statistics().spooling == SIZE
            await spool.append([b"x" * SIZE])
            assert store.statistics().used == 2 * SIZE
            await spool.append([b"y" * (2 * SIZE)])
            assert store.statistics().used == 4 * SIZE
            await spool.abandon()
            spool.close()
            assert store.statistics().used == SIZE
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["second"]
        assert disk_use(tmp_path) < 2 * SIZE

    asyncio.run(story())


def test_a_spool_that_is_still_read_gives_its_file_to_nobody(tmp_path: Path) -> None:
    """The run's own readers find in it what they are behind with, though the result is finished."""

    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=1 << 20, most=100, scratch_seconds=600, unread=0
        ) as store:
            data = os.urandom(SIZE)
            read = await store.begin("read")
            await read.append([data])
            await read.publish({}, is_scratch=True)
            await put(store, "next", os.urandom(SIZE), is_scratch=True)
            assert os.pread(read.descriptor, SIZE, 0) == data
            assert store.has("read")
            await put(store, "lasting", os.urandom(SIZE))
            assert not store.has("next")
            read.close()
            await put(store, "last", os.urandom(SIZE))
            assert not store.has("read")

    asyncio.run(story())


def test_what_is_asked_for_again_stays_from_then_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=1 << 20, most=100, scratch_seconds=600, unread=0
        ) as store:
            for key in ("a", "b", "a", "c", "d"):
                await put(store, key, os.urandom(SIZE), is_scratch=True)
            assert {entry.key for entry in store.list()} == {"a", "b", "c", "d"}

    asyncio.run(story())


def test_a_file_that_was_taken_away_by_hand_is_missed_by_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=1 << 20, most=100, scratch_seconds=600, unread=0
        ) as store:
            await put(store, "a", os.urandom(SIZE), is_scratch=True)
            (tmp_path / "a").unlink()
            data = os.urandom(SIZE)
            await put(store, "b", data)
            assert await get(store, "b") == data
            assert store.statistics().used == SIZE

    asyncio.run(story())


def test_a_result_that_comes_a_second_time_loses_its_file_to_nobody_while_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own readers may still be behind, and the file already stands where that of the first one stood."""

    async def story() -> None:
        async with ResultStore.open_directory(
            tmp_path, capacity=1 << 20, most=100, scratch_seconds=600, unread=0
        ) as store:
            in_thread = store.in_thread
            is_moved, may_return = asyncio.Event(), asyncio.Event()

            async def slow_to_return(call: Callable[..., Any], *arguments: object) -> Any:
                value = await in_thread(call, *arguments)
                if call is os.rename:
                    is_moved.set()
                    await may_return.wait()
                return value

            data = os.urandom(SIZE)
            second = await store.begin("twice")
            await put(store, "twice", os.urandom(SIZE), is_scratch=True)
            await second.append([data])
            monkeypatch.setattr(store, "in_thread", slow_to_return)
            publishing = asyncio.create_task(second.publish({}, is_scratch=True))
            await is_moved.wait()
            beginning = asyncio.create_task(store.begin("other"))
            await asyncio.wait([beginning], timeout=0.2)
            may_return.set()
            await publishing
            other = await beginning
            await other.append([os.urandom(SIZE)])
            assert os.pread(second.descriptor, SIZE, 0) == data
            assert await get(store, "twice") == data
            await other.abandon()
            other.close()
            second.close()

    asyncio.run(story())
