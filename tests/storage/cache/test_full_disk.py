"""A disk that others fill while a shard arrives, or before: whoever reads it notices nothing, and nothing is left of it."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from shardmill.core.errors import InsufficientStorage
from shardmill.testing.node import RunningNode, running_node
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.storage.cache.support import MIB, disk_use, is_settled, make, open_cache, read, read_source, run, wait_until
from tests.storage.cache.test_faults import ask
from tests.storage.cache.test_node import make_shard
from tests.storage.cache.web import Served, Web, web
from tests.storage.full_disk import fill, plain_disk, small_disk

Disk = Callable[[Path, str], AbstractContextManager[bool]]


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        yield found


@contextlib.contextmanager
def filled(disk: Path, is_real: bool) -> Iterator[None]:
    """Somebody else takes all that is left of it; a plain directory stays as it is."""
    path = disk / "of-others"
    try:
        if is_real:
            fill(path)
        yield
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("disk", [small_disk, plain_disk])
def test_a_disk_that_fills_up_while_an_object_arrives_is_not_noticed(origin: Web, tmp_path: Path, disk: Disk) -> None:
    """Whether its space could be taken before or not; several read it, one of them from its middle."""
    data = make(40 * MIB + 5)

    async def story(is_real: bool) -> None:
        async with open_cache(origin, tmp_path / "disk" / "data") as store:
            reading = [asyncio.create_task(read(store, "key", start)) for start in (0, 0, 20 * MIB)]
            await wait_until(lambda: bool(store.cached_ranges("key")))
            with filled(tmp_path / "disk", is_real):
                origin.gate.set()
                found = await asyncio.gather(*reading)
                assert [body == data[start:] for body, start in zip(found, (0, 0, 20 * MIB), strict=True)] == [True] * 3
                assert await read(store, "key") == data
                await wait_until(lambda: is_settled(store))
            assert await read(store, "key") == data
            await wait_until(lambda: is_settled(store))
            assert [entry.there for entry in store.cached("")] == [len(data)]
            # On ext2 the lists of blocks take space, too.
            assert abs(store.disk.used - disk_use(tmp_path / "disk" / "data")) <= MIB
            assert store.statistics().passed == (0 if not is_real or disk is small_disk else 4)
            origin.reset()
            assert await read(store, "key") == data
            assert origin.sent == 0

    with disk(tmp_path / "disk", "100m") as is_real:
        origin.objects["key"] = Served(data, "v1")
        origin.gate_at = 10 * MIB
        run(story(is_real))


def test_what_is_cached_leaves_for_what_comes_when_others_have_filled_the_disk(origin: Web, tmp_path: Path) -> None:
    data = make(20 * MIB)

    async def story(is_real: bool) -> None:
        async with open_cache(origin, tmp_path / "disk" / "data", capacity=0 if is_real else 24 * MIB) as store:
            assert await read(store, "old") == data
            await wait_until(lambda: is_settled(store))
            with filled(tmp_path / "disk", is_real):
                assert await read(store, "new") == data[: 10 * MIB]
                await wait_until(lambda: is_settled(store))
                assert [entry.key for entry in store.cached("")] == ["new"]

    with small_disk(tmp_path / "disk", "64m") as is_real:
        origin.objects["old"], origin.objects["new"] = Served(data, "v1"), Served(data[: 10 * MIB], "v1")
        run(story(is_real))


def test_a_range_far_behind_passes_through_and_so_does_an_object_without_room_for_its_name(
    origin: Web, tmp_path: Path
) -> None:
    data = make(90 * MIB)

    async def story(is_real: bool) -> None:
        async with open_cache(origin, tmp_path / "disk" / "data", capacity=0 if is_real else 4 * MIB) as store:
            with filled(tmp_path / "disk", is_real):
                start, stop = 60 * MIB + 100, 80 * MIB
                assert await read(store, "key", start, stop) == data[start:stop]
                assert await read(store, "key", is_told=False) == data
                source = await store.open("key")
                try:
                    # Not done with anything, and wants more than a window.
                    await source.ensure(0, MIB)
                    await source.ensure(60 * MIB, 61 * MIB)
                    assert os.pread(source.descriptor, 10, 500) == data[500:510]
                    assert await read_source(source, 60 * MIB, 61 * MIB) == data[60 * MIB : 61 * MIB]
                finally:
                    source.close()
                await wait_until(lambda: is_settled(store))
            assert await read(store, "small") == data[: 2 * MIB]
            await wait_until(lambda: is_settled(store))
            assert [entry.key for entry in store.cached("")] == ["small"]

    with small_disk(tmp_path / "disk", "16m") as is_real:
        origin.objects["key"] = Served(data, "v1")
        origin.objects["small"] = Served(data[: 2 * MIB], "v1")
        run(story(is_real))


def test_an_object_without_a_length_passes_through_if_it_can_be_had_once_more(origin: Web, tmp_path: Path) -> None:
    """Its length is counted first; without an ETag the second reading may be of another version, so it is refused."""
    data = make(40 * MIB + 5)

    async def story(is_real: bool) -> None:
        async with open_cache(origin, tmp_path / "disk" / "data", capacity=0 if is_real else 8 * MIB) as store:
            assert await read(store, "key") == data
            assert len(origin.gets("key")) == 2
            assert await read(store, "key", 30 * MIB, 31 * MIB) == data[30 * MIB : 31 * MIB]
            assert (await store.head("key")).size == len(data)
            with pytest.raises(InsufficientStorage):
                await read(store, "other")
            await wait_until(lambda: is_settled(store))
            assert store.disk.used == 0
            assert disk_use(tmp_path / "disk" / "data") <= MIB
            assert await read(store, "small") == data[: 2 * MIB]
            await wait_until(lambda: is_settled(store))
            assert [entry.key for entry in store.cached("")] == ["small"]

    with small_disk(tmp_path / "disk", "16m") as is_real:
        origin.objects["key"] = Served(data, "v1", has_length=False, takes_ranges=False)
        origin.objects["other"] = Served(data, None, has_length=False, takes_ranges=False)
        origin.objects["small"] = Served(data[: 2 * MIB], "v1", has_length=False, takes_ranges=False)
        run(story(is_real))


@contextlib.contextmanager
def node_on(disk: Path, origin: Web, is_real: bool) -> Iterator[RunningNode]:
    room = {} if is_real else {"SHARDMILL_CACHE_CAPACITY": "8MiB"}
    flags = ("--bucket", f"gs://far={origin.url}/shards", "--workers", "2")
    with running_node(*flags, data=disk / "data", environ=room) as node:
        yield node


def test_a_shard_is_served_raw_and_transformed_from_a_full_disk(origin: Web, tmp_path: Path) -> None:
    """Larger than what is held in memory of one that passes through."""
    shard = make_shard(60, 1 << 20)
    origin.objects["shards/a.tar"] = Served(shard, "v1")
    with small_disk(tmp_path / "disk", "512m") as is_real, node_on(tmp_path / "disk", origin, is_real) as node:
        asking = Asking(node)
        made = f"/t/gs/far/{asking.register(IDENTITY, decoder=None).uuid},seed=1~a.tar"
        with filled(tmp_path / "disk", is_real):
            raw = asking.ask("GET", "/o/gs/far/a.tar")
            assert (raw.status, raw.body == shard) == (200, True)
            transformed = asking.ask("GET", made)
            assert transformed.status == 200
            part = ask(node, "/o/gs/far/a.tar", Range=f"bytes={50 * MIB}-{51 * MIB - 1}")
            assert (part[0], part[1] == shard[50 * MIB : 51 * MIB]) == (206, True)
        assert asking.ask("GET", "/o/gs/far/a.tar").body == shard
        assert asking.ask("GET", made).body == transformed.body


@pytest.mark.parametrize("disk", [small_disk, plain_disk])
def test_a_shard_is_served_raw_and_transformed_while_its_disk_fills_up(origin: Web, tmp_path: Path, disk: Disk) -> None:
    shard = make_shard(60, 1 << 20)
    origin.objects["shards/a.tar"] = origin.objects["shards/b.tar"] = Served(shard, "v1")
    origin.gate_at = 20 * MIB
    with disk(tmp_path / "disk", "512m") as is_real, node_on(tmp_path / "disk", origin, is_real) as node:
        asking = Asking(node)
        spec = f"{asking.register(IDENTITY, decoder=None).uuid},seed=1"
        targets = ("/o/gs/far/a.tar", f"/t/gs/far/{spec}~b.tar")
        with ThreadPoolExecutor(2) as threads:
            reading = [threads.submit(asking.ask, "GET", target) for target in targets]
            arrived = threading.Event()
            while origin.sent < 40 * MIB and not all(future.done() for future in reading):
                arrived.wait(0.01)
            with filled(tmp_path / "disk", is_real):
                origin.gate.set()
                answers = [future.result() for future in reading]
        assert [answer.status for answer in answers] == [200, 200]
        assert answers[0].body == shard
        again = [asking.ask("GET", target) for target in targets]
        assert [answer.body == before.body for answer, before in zip(again, answers, strict=True)] == [True, True]
