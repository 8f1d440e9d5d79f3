"""Reading through the cache: one fetch for all, only what is wanted, bytes as they arrive, one version per answer."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.errors import BackendUnavailable, Conflict, ObjectNotFound, ServerError
from shardmill.core.origins import OriginFacts, OriginRead, OriginStatistics
from shardmill.storage.cache.entry import SINGLE
from shardmill.storage.cache.policy import CachePolicy
from tests.storage.cache.support import MIB, disk_use, is_settled, make, open_cache, read, read_source, run, wait_until
from tests.storage.cache.web import Asked, Served, web


def test_what_was_read_once_comes_from_the_disk(tmp_path: Path) -> None:
    data = make(5 * MIB + 17)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "a/b.tar") == data
            assert await read(store, "a/b.tar") == data
            assert await read(store, "a/b.tar", 1000, 2000) == data[1000:2000]
            meta = await store.head("a/b.tar")
            assert (meta.key, meta.size, meta.etag, meta.version) == ("a/b.tar", len(data), "v1", "etag:v1")
            await wait_until(lambda: is_settled(store))
            assert [found.there for found in store.cached("")] == [len(data)]
            assert store.statistics().hits == 2
            assert store.statistics().misses == 1

    with web() as origin:
        origin.objects["a/b.tar"] = Served(data, "v1")
        run(story())
        assert (len(origin.gets()), len(origin.heads()), origin.sent) == (1, 0, len(data))


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB])
@pytest.mark.parametrize("is_told", [True, False])
def test_objects_of_any_size(tmp_path: Path, size: int, is_told: bool) -> None:
    data = make(size)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            for _ in range(2):
                assert await read(store, "key", is_told=is_told) == data
            assert await read(store, "key", size // 2, is_told=is_told) == data[size // 2 :]
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key", is_told=is_told) == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())
        assert origin.sent == size


def test_many_readers_of_a_cold_object_cause_one_fetch(tmp_path: Path) -> None:
    data = make(20 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            found = await asyncio.gather(*(read(store, "key", is_told=number % 2 == 0) for number in range(100)))
            assert all(bytes == data for bytes in found)

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())
        assert len(origin.gets()) == 1
        assert origin.sent == len(data)


def test_a_range_fetches_its_blocks_only(tmp_path: Path) -> None:
    data = make(200 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key", 100 * MIB, 101 * MIB) == data[100 * MIB : 101 * MIB]
            assert origin.sent == MIB
            assert await read(store, "key", 150 * MIB + 5, 151 * MIB) == data[150 * MIB + 5 : 151 * MIB]
            assert origin.sent == 2 * MIB
            assert store.cached_ranges("key") == [
                (100 * MIB, 101 * MIB),
                (150 * MIB, 151 * MIB),
            ]
            await wait_until(lambda: is_settled(store))
            assert disk_use(tmp_path) < 3 * MIB
            # The whole brings the rest, and nothing twice.
            assert await read(store, "key") == data
            assert origin.sent == len(data)

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_bytes_are_readable_while_their_block_still_arrives(tmp_path: Path) -> None:
    data = make(4 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key", expected=(0, None))
            reached = await source.ensure_some(0, len(data))
            assert 0 < reached <= 1000
            assert os.pread(source.descriptor, reached, 0) == data[:reached]
            second = await store.open("key")
            assert await second.ensure_some(10, len(data)) <= 1000
            waiting = asyncio.ensure_future(second.ensure(0, len(data)))
            await asyncio.sleep(0)
            assert not waiting.done()
            origin.gate.set()
            await waiting
            assert os.pread(second.descriptor, len(data), 0) == data
            source.close()
            second.close()

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 1000
        run(story())
        assert len(origin.gets()) == 1


def test_a_large_object_comes_by_several_reads_at_once(tmp_path: Path) -> None:
    data = make(160 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            reading = asyncio.ensure_future(read(store, "key"))
            # All of them wait in their middle, so those that are there go on at once.
            await wait_until(lambda: len(origin.gets()) >= 2)
            origin.gate.set()
            assert await reading == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 20 * MIB
        run(story())
        assert origin.sent == len(data)


def test_who_leaves_ends_the_fetch_unless_others_want_it(tmp_path: Path) -> None:
    data = make(8 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            first = await store.open("key", expected=(0, None))
            await first.ensure(0, 2 * MIB)
            second = await store.open("key", expected=(0, None))
            first.close()
            await second.ensure(0, 2 * MIB)
            assert store.statistics().filling == 1
            second.close()
            await wait_until(lambda: is_settled(store))
            assert 2 * MIB <= sum(found.there for found in store.cached("")) < len(data)
            assert disk_use(tmp_path) <= store.disk.used + MIB // 2
            origin.gate.set()
            assert await read(store, "key") == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 3 * MIB
        run(story())
        assert len(origin.gets()) == 2


@pytest.mark.parametrize("is_open", [False, True])
def test_who_leaves_ends_no_fetch_for_who_has_not_begun_to_read(tmp_path: Path, is_open: bool) -> None:
    data = make(8 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            slow = await store.open("key", expected=(0, None)) if is_open else None
            quick = await store.open("key", expected=(0, None))
            if slow is None:
                # Others are opening it, and have not come so far that they say what they want.
                (entry := store._entries["key"]).joining += 1
            assert await quick.ensure_some(0, MIB) > 0
            quick.close()
            await asyncio.sleep(0)
            origin.gate.set()
            if slow is None:
                slow = await store.open("key", expected=(0, None))
                entry.joined()
            assert await read_source(slow) == data
            slow.close()

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 2 * MIB
        run(story())
        assert (len(origin.gets()), origin.sent) == (1, len(data))


def test_bytes_that_a_reader_was_told_of_stay_when_the_fetch_of_their_block_fails(tmp_path: Path) -> None:
    data = make(3 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key", expected=(0, None))
            reached = 500_000
            await source.ensure(0, reached)
            origin.gate.set()
            with pytest.raises(BackendUnavailable):
                await source.ensure(0, len(data))
            assert os.pread(source.descriptor, reached, 0) == data[:reached]
            source.close()
            await wait_until(lambda: is_settled(store))
            assert disk_use(tmp_path) <= store.disk.used + MIB // 2
            origin.cut_after = None
            assert await read(store, "key") == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at, origin.cut_after = 500_000, 600_000
        run(story())


def test_the_block_of_a_small_range_is_kept_though_its_reader_is_content_early(tmp_path: Path) -> None:
    data = make(3 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key", expected=(MIB, MIB + 11))
            assert await source.ensure_some(MIB, MIB + 11) > MIB
            source.close()
            origin.gate.set()
            await wait_until(lambda: is_settled(store))
            assert store.cached_ranges("key") == [(MIB, 2 * MIB)]
            assert await read(store, "key", MIB, 2 * MIB) == data[MIB : 2 * MIB]

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 1000
        run(story())
        assert (len(origin.gets()), origin.sent) == (1, MIB)


def test_a_fetch_that_fails_fails_who_waits_and_the_next_tries_again(tmp_path: Path) -> None:
    data = make(6 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            found = await asyncio.gather(*(read(store, "key") for _ in range(5)), return_exceptions=True)
            assert all(isinstance(error, BackendUnavailable) for error in found), found
            await wait_until(lambda: is_settled(store))
            # What came is kept.
            assert origin.sent == 3 * MIB + 500
            origin.cut_after = None
            origin.reset()
            assert await read(store, "key") == data
            assert origin.sent == 3 * MIB
            assert store.disk.used == pytest.approx(len(data), abs=MIB // 2)

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        origin.cut_after = 3 * MIB + 500
        run(story())


def test_an_origin_that_refuses_is_told_to_all_and_not_remembered(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            for is_told in (True, False):
                with pytest.raises(BackendUnavailable):
                    await read(store, "key", is_told=is_told)
            origin.status = None
            assert await read(store, "key") == b"x" * 100
            await wait_until(lambda: is_settled(store))

    with web() as origin:
        origin.objects["key"] = Served(b"x" * 100, "v1")
        origin.status = 503
        run(story())


def test_what_is_not_there_is_asked_for_once_in_a_while(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_cache(origin, tmp_path / "long", CachePolicy(absent_seconds=1000)) as store:
            for is_told in (True, False, True):
                with pytest.raises(ObjectNotFound):
                    await read(store, "key", is_told=is_told)
            assert len(origin.asked) == 1
        async with open_cache(origin, tmp_path / "short", CachePolicy(absent_seconds=0.1)) as store:
            with pytest.raises(ObjectNotFound):
                await read(store, "key")
            origin.objects["key"] = Served(b"data", "v1")
            # The clock itself: nothing tells when the time is over.
            await asyncio.sleep(0.15)
            assert await read(store, "key") == b"data"

    with web() as origin:
        run(story())


def test_policy_always_asks_once_and_sees_a_change_at_once(tmp_path: Path) -> None:
    old, new = make(3 * MIB, 1), make(3 * MIB, 2)

    async def story() -> None:
        async with open_cache(origin, tmp_path, CachePolicy(revalidate="always")) as store:
            assert await read(store, "key") == old
            origin.reset()
            assert await read(store, "key") == old
            assert origin.asked == [Asked("HEAD", "key", None)]
            assert store.statistics().revalidated == 1
            held = await store.open("key", expected=(0, None))
            origin.objects["key"] = Served(new, "v2")
            assert await read(store, "key") == new
            # Who had the old one open goes on with it.
            assert await read_source(held) == old
            held.close()
            await wait_until(lambda: is_settled(store))
            assert disk_use(tmp_path) < 4 * MIB
            assert store.disk.used < 4 * MIB

    with web() as origin:
        origin.objects["key"] = Served(old, "v1")
        run(story())


def test_policy_ttl_asks_when_it_is_over_and_never_does_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_cache(origin, tmp_path / "ttl", CachePolicy(revalidate="ttl", ttl=0.1)) as store:
            assert await read(store, "key") == b"old"
            origin.objects["key"] = Served(b"new", "v2")
            await asyncio.sleep(0.15)
            assert await read(store, "key") == b"new"
        async with open_cache(origin, tmp_path / "long", CachePolicy(revalidate="ttl", ttl=1000)) as store:
            assert await read(store, "key") == b"new"
            origin.objects["key"] = Served(b"newer", "v3")
            assert await read(store, "key") == b"new"
            origin.objects["key"] = Served(b"new", "v2")
        async with open_cache(origin, tmp_path / "never", CachePolicy(revalidate="never")) as store:
            assert await read(store, "key") == b"new"
            origin.objects["key"] = Served(b"newest", "v3")
            assert await read(store, "key") == b"new"
        async with open_cache(origin, tmp_path / "never", CachePolicy(revalidate="never")) as store:
            origin.reset()
            assert await read(store, "key") == b"new"
            assert origin.asked == []

    with web() as origin:
        origin.objects["key"] = Served(b"old", "v1")
        run(story())


@pytest.mark.parametrize("has_etag", [True, False])
def test_a_change_while_it_arrives_ends_the_reading_and_mixes_nothing(tmp_path: Path, has_etag: bool) -> None:
    old, new = make(130 * MIB, 1), make(130 * MIB, 2)

    def served(data: bytes, number: int) -> Served:
        return Served(data, f"v{number}" if has_etag else None, 1_700_000_000.0 + number)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key", expected=(0, None))
            await source.ensure(0, MIB)
            origin.objects["key"] = served(new, 2)
            # The read that goes on is of the old one; what is asked for from now on is of the new.
            origin.gate.set()
            with pytest.raises(Conflict):
                await read_source(source)
            assert os.pread(source.descriptor, MIB, 0) == old[:MIB]
            source.close()
            assert await read(store, "key") == new
            await wait_until(lambda: is_settled(store))
            assert store.disk.used < 131 * MIB

    with web() as origin:
        origin.objects["key"] = served(old, 1)
        origin.gate_at = 2 * MIB
        run(story())


def test_without_any_validator_one_read_is_one_version(tmp_path: Path) -> None:
    old, new = make(5 * MIB, 1), make(5 * MIB, 2)

    async def story() -> None:
        async with open_cache(origin, tmp_path, CachePolicy(ttl=0.1)) as store:
            for data in (old, new):
                origin.objects["key"] = Served(data, None, None)
                found = await asyncio.gather(*(read(store, "key", is_told=number > 3) for number in range(8)))
                assert all(bytes == data for bytes in found)
                await asyncio.sleep(0.15)

    with web() as origin:
        run(story())


@pytest.mark.parametrize("etag", ["v1", None])
def test_an_object_of_unknown_length_is_whole_before_it_is_told(tmp_path: Path, etag: str | None) -> None:
    data = make(3 * MIB + 100)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert (await store.head("key")).size == len(data)
            assert await read(store, "key") == data
            assert await read(store, "key", 100, 200) == data[100:200]
        async with open_cache(origin, tmp_path, CachePolicy(revalidate="never")) as store:
            assert await read(store, "key") == data

    with web() as origin:
        origin.objects["key"] = Served(data, etag, has_length=False)
        run(story())
        assert len(origin.gets()) == 1


@pytest.mark.parametrize("size", [5 * MIB + 3, SINGLE, SINGLE + 5 * MIB])
def test_an_object_that_tells_no_size_is_whole_whatever_was_asked_for_first(tmp_path: Path, size: int) -> None:
    data = make(size)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            for key, start, stop in (("a", 2 * MIB + 5, 3 * MIB), ("b", 0, MIB), ("c", 0, None)):
                assert await read(store, key, start, stop) == data[start:stop]
                assert (await store.head(key)).size == size
                assert await read(store, key) == data
            await wait_until(lambda: is_settled(store))
            assert [found.there for found in store.cached("")] == [size] * 3

    with web() as origin:
        for key in "abc":
            origin.objects[key] = Served(data, "v1", has_length=False, takes_ranges=False)
        run(story())


def test_an_origin_without_ranges(tmp_path: Path) -> None:
    data = make(70 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key") == data
            assert await read(store, "key", 5, 10) == data[5:10]

    with web() as origin:
        origin.objects["key"] = Served(data, "v1", takes_ranges=False)
        run(story())


class Defective:
    """An origin with a defect: it raises what no origin may."""

    def __init__(self) -> None:
        self.reads = 0

    async def head(self, key: str) -> OriginFacts:
        raise AssertionError("nobody asks again")

    @asynccontextmanager
    async def read(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
    ) -> AsyncIterator[OriginRead]:
        self.reads += 1
        raise ValueError("a defect")
        yield

    def statistics(self) -> OriginStatistics:
        raise AssertionError("nobody asks for it")


def test_a_defect_is_told_to_who_waits_and_asks_no_origin_again_and_again(tmp_path: Path) -> None:
    defective = Defective()

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key")
            store.origin = defective
            try:
                with pytest.raises(ServerError):
                    await read_source(source)
            finally:
                source.close()

    with web() as origin:
        origin.objects["key"] = Served(make(MIB), "v1")
        run(story())
    assert defective.reads == 1


def test_a_reader_who_leaves_before_its_read_has_begun_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(2 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            source = await store.open("key")
            begin = store.start

            def leave() -> None:
                reading.cancel()
                source.close()

            def leave_at_once(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
                asyncio.get_running_loop().call_soon(leave)
                return begin(work)

            with monkeypatch.context() as patch:
                patch.setattr(store, "start", leave_at_once)
                reading = asyncio.ensure_future(source.ensure_some(0, MIB))
                await asyncio.wait([reading])
            await wait_until(lambda: is_settled(store))
            assert await read(store, "key") == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())
