"""Results on disk: kept within a quota, found again after a restart, never served torn or corrupt."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.errors import CorruptObject, InsufficientStorage
from shardmill.core.sources import Source
from shardmill.storage.results import ResultStore, choose_victims


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@asynccontextmanager
async def open_store(
    directory: Path, *, capacity: int = 1 << 20, most: int = 100, scratch: float = 600
) -> AsyncIterator[ResultStore]:
    async with ResultStore.open_directory(directory, capacity=capacity, most=most, scratch_seconds=scratch) as store:
        yield store


async def put(store: ResultStore, key: str, data: bytes, *, is_scratch: bool = False) -> str:
    spool = await store.begin(key)
    try:
        await spool.append([data[:100], memoryview(data)[100:]])
        meta = await spool.publish({"object": key}, is_scratch=is_scratch)
    finally:
        spool.close()
    assert meta.etag is not None
    return meta.etag


async def get(store: ResultStore, key: str) -> bytes | None:
    source: Source | None = await store.open(key)
    if source is None:
        return None
    try:
        await source.ensure(0, source.meta.size)
        return os.pread(source.descriptor, source.meta.size, 0)
    finally:
        source.close()


def disk_use(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_result_is_found_again_after_a_restart_with_its_etag(tmp_path: Path) -> None:
    data = os.urandom(300_000)

    async def story() -> None:
        async with open_store(tmp_path) as store:
            etag = await put(store, "k1", data)
            assert await get(store, "k1") == data
        async with open_store(tmp_path) as store:
            assert await get(store, "k1") == data
            source = await store.open("k1")
            assert source is not None
            assert (source.meta.etag, source.meta.size, source.meta.user["object"]) == (etag, len(data), "k1")
            source.close()
            assert [(entry.key, entry.size) for entry in store.list()] == [("k1", len(data))]
            assert await store.remove(["k1", "absent"]) == len(data)
            assert await get(store, "k1") is None
            assert store.statistics().used == 0
        assert disk_use(tmp_path) == 0

    run(story())


def test_a_result_whose_file_was_taken_away_by_hand_is_absent(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path) as store:
            await put(store, "k1", b"1" * 1000)
            used = store.statistics().used
            (tmp_path / "k1").unlink()
            assert await get(store, "k1") is None
            assert not store.has("k1")
            assert store.statistics().used == 0
            # It may be made again.
            await put(store, "k1", b"2" * 1000)
            assert await get(store, "k1") == b"2" * 1000
            assert store.statistics().used == used

    run(story())


def test_what_is_torn_or_half_made_is_swept_at_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path) as store:
            await put(store, "whole", b"x" * 1000)
            await put(store, "torn", b"y" * 1000)
            spool = await store.begin("left")
            await spool.append([b"z" * 1000])
            spool.close()
        os.truncate(tmp_path / "torn", 900)
        async with open_store(tmp_path) as store:
            assert [entry.key for entry in store.list()] == ["whole"]
            assert store.statistics().used == 1000
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"whole"}

    run(story())


def test_a_corrupt_block_is_never_served_and_goes(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path) as store:
            await put(store, "k", b"x" * 5000)
            with open(tmp_path / "k", "r+b") as file:
                file.seek(2500)
                file.write(b"!")
            with pytest.raises(CorruptObject):
                await get(store, "k")
            assert await get(store, "k") is None
            assert store.statistics().used == 0

    run(story())


def test_the_least_used_leave_for_new_ones_but_never_those_in_use(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path, capacity=3000) as store:
            for key in ("a", "b", "c"):
                await put(store, key, key.encode() * 1000)
            held = await store.open("b")
            await get(store, "a")
            await put(store, "d", b"d" * 1000)
            assert sorted(entry.key for entry in store.list()) == ["a", "b", "d"]
            await put(store, "e", b"e" * 2000)
            assert sorted(entry.key for entry in store.list()) == ["b", "e"]
            spool = await store.begin("f")
            await spool.append([b"f" * 1000])
            with pytest.raises(InsufficientStorage):
                await spool.append([b"f" * 1500])
            assert os.pread(spool.descriptor, 2000, 0) == b"f" * 1000
            assert held is not None
            assert os.pread(held.descriptor, 1000, 0) == b"b" * 1000
            held.close()
            await spool.abandon()
            spool.close()
            statistics = store.statistics()
            assert statistics.used == sum(entry.size for entry in store.list())
            assert statistics.evicted >= 3

    run(story())


def test_scratch_goes_first_and_after_its_time(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path, capacity=3000, scratch=0.2) as store:
            await put(store, "scratch", b"s" * 1000, is_scratch=True)
            await put(store, "kept", b"k" * 1000, is_scratch=True)
            store.keep("kept")
            held = await store.open("scratch")
            await asyncio.sleep(0.5)
            assert store.has("scratch"), "it is in use"
            assert held is not None
            held.close()
            deadline = asyncio.get_running_loop().time() + 10
            while store.has("scratch"):
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.02)
            assert store.has("kept")

    run(story())


@pytest.mark.parametrize(("need", "chosen"), [(0, []), (1, ["a"]), (11, ["a", "b"]), (30, ["a", "b", "c"]), (31, [])])
def test_as_many_leave_as_are_needed_and_none_if_all_are_too_few(need: int, chosen: list[str]) -> None:
    assert choose_victims([("a", 10), ("b", 10), ("c", 10)], need) == chosen


def test_scratch_leaves_first_then_the_least_recently_used_after_a_restart_too(tmp_path: Path) -> None:
    async def names(store: ResultStore) -> list[str]:
        return [entry.key for entry in store.list()]

    async def story() -> None:
        async with open_store(tmp_path, capacity=6000) as store:
            for key, is_scratch in (("a", False), ("s", True), ("b", False), ("t", True), ("c", False)):
                await put(store, key, b"x" * 1000, is_scratch=is_scratch)
            store.keep("t")
            await get(store, "a")
            await put(store, "d", b"x" * 2000)
            assert await names(store) == ["a", "b", "t", "c", "d"]
            await put(store, "e", b"x" * 1000)
            assert await names(store) == ["a", "t", "c", "d", "e"]
        for number, key in enumerate(("e", "d", "a", "c", "t")):  # a second reader of `t` was of before
            os.utime(tmp_path / key, (number, number))
        async with open_store(tmp_path, capacity=6000) as store:
            await put(store, "f", b"x" * 2000)
            assert sorted(await names(store)) == ["a", "c", "d", "f"]

    run(story())


def test_there_are_never_more_than_so_many_however_small(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path, most=3) as store:
            await put(store, "a", b"x")
            held = await store.open("a")
            assert held is not None
            for number in range(6):
                await put(store, f"b{number}", b"x")
                assert len(store.list()) <= 3
            assert [entry.key for entry in store.list()] == ["a", "b4", "b5"]
            assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a", "b4", "b5"]
            held.close()
        async with open_store(tmp_path, most=2) as store:
            assert len(store.list()) == len([path for path in tmp_path.iterdir() if path.is_file()]) == 2

    run(story())


def test_a_result_that_is_kept_open_leaves_unless_somebody_reads_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path, capacity=250_000) as store:
            await put(store, "k1", bytes(100_000))
            idle = await store.keep_open("k1")
            assert idle is not None
            assert [entry.readers for entry in store.list()] == [0]
            await put(store, "k2", bytes(100_000))
            await put(store, "k3", bytes(100_000))
            assert not idle.is_current
            assert await store.keep_open("k1") is None

            held = await store.keep_open("k2")
            assert held is not None
            assert held.source is not None
            held.lease()
            assert [entry.readers for entry in store.list()] == [1, 0]
            await put(store, "k4", bytes(100_000))
            assert sorted(entry.key for entry in store.list()) == ["k2", "k4"]
            # Who removes it does not ask, but who reads goes on.
            await store.remove(["k2"])
            assert not held.is_current
            assert os.pread(held.source.descriptor, 10, 0) == bytes(10)
            held.release()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(held.source.descriptor)

    run(story())


def test_reading_what_is_kept_open_is_a_use(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path, capacity=250_000) as store:
            await put(store, "k1", bytes(100_000))
            await put(store, "k2", bytes(100_000))
            kept = await store.keep_open("k1")
            assert kept is not None
            assert await get(store, "k2") is not None
            assert kept.on_read is not None
            kept.on_read(0, 10)
            await put(store, "k3", bytes(100_000))
            assert sorted(entry.key for entry in store.list()) == ["k1", "k3"]
            # Two readers of one result have it open apart.
            other = await store.keep_open("k1")
            assert other is not None
            other.leave()
            assert kept.is_current

    run(story())
