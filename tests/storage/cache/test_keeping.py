"""What stays on the disk: over restarts and kills, within its room, never damaged, never with holes."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import aiohttp
import pytest

from shardmill.core.errors import InsufficientStorage
from shardmill.core.refs import Bucket
from shardmill.core.sources import Source
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.cache.store import CachedBucket
from shardmill.storage.cache.window import AT_ONCE, LEAST, WINDOW
from shardmill.storage.kept import Shelf
from tests.storage.cache.support import MIB, disk_use, is_settled, make, open_cache, read, read_source, run, wait_until
from tests.storage.cache.web import Served, Web, WebOrigin, web
from tests.storage.full_disk import small_disk

NEVER = CachePolicy(revalidate="never")


def test_a_restart_keeps_what_is_whole_and_what_is_not(tmp_path: Path) -> None:
    whole, part = make(3 * MIB + 5, 1), make(10 * MIB, 2)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "whole") == whole
            assert await read(store, "part", 2 * MIB, 5 * MIB) == part[2 * MIB : 5 * MIB]
            await wait_until(lambda: is_settled(store))
            used = store.disk.used
        origin.reset()
        async with open_cache(origin, tmp_path) as store:
            assert store.disk.used == used
            assert [(found.key, found.there) for found in store.cached("")] == [
                ("part", 3 * MIB),
                ("whole", len(whole)),
            ]
            assert await read(store, "whole") == whole
            assert await read(store, "part", 3 * MIB, 5 * MIB) == part[3 * MIB : 5 * MIB]
            assert origin.sent == 0
            assert await read(store, "part") == part
            assert origin.sent == 7 * MIB

    with web() as origin:
        origin.objects["whole"] = Served(whole, "v1")
        origin.objects["part"] = Served(part, "v1")
        run(story())


def test_parts_of_another_boot_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(4 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key", 0, MIB) == data[:MIB]
        monkeypatch.setattr("shardmill.storage.cache.record.boot_id", lambda: "another")
        async with open_cache(origin, tmp_path) as store:
            assert store.cached("") == []
            assert store.disk.used == 0
            assert disk_use(tmp_path) == 0

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_damaged_block_is_fetched_again_and_never_served(tmp_path: Path, is_whole: bool) -> None:
    data = make(4 * MIB)
    stop = len(data) if is_whole else 3 * MIB

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key", 0, stop) == data[:stop]
            await wait_until(lambda: is_settled(store))
        (path,) = (found for found in tmp_path.rglob("*") if found.is_file() and found.suffix != ".log")
        with path.open("r+b") as file:
            file.seek(MIB + 1000)
            file.write(b"damage")
        origin.reset()
        async with open_cache(origin, tmp_path, NEVER) as store:
            assert await read(store, "key", 0, stop) == data[:stop]
            assert origin.sent == MIB
            assert store.statistics().repaired == 1
            assert await read(store, "key", 0, stop) == data[:stop]
        async with open_cache(origin, tmp_path, NEVER) as store:
            assert await read(store, "key", 0, stop) == data[:stop]
            assert origin.sent == MIB

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_a_torn_file_is_swept(tmp_path: Path) -> None:
    data = make(2 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key") == data
            await wait_until(lambda: is_settled(store))
        (path,) = (found for found in tmp_path.rglob("*") if found.is_file())
        os.truncate(path, 0)
        async with open_cache(origin, tmp_path) as store:
            assert (store.cached(""), store.disk.used) == ([], 0)
            assert not path.exists()
            assert await read(store, "key") == data
            await wait_until(lambda: is_settled(store))
        # And what somebody removes under a node is fetched again.
        async with open_cache(origin, tmp_path) as store:
            (path,) = (found for found in tmp_path.rglob("*") if found.is_file())
            path.unlink()
            assert await read(store, "key") == data

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("done", ["removed", "cut", "all gone"])
def test_what_somebody_tidies_up_by_hand_is_fetched_again(tmp_path: Path, is_whole: bool, done: str) -> None:
    data = make(5 * MIB)
    stop = len(data) if is_whole else 3 * MIB

    def tidy() -> None:
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            if done != "cut":
                path.unlink()
            elif path.suffix != ".log":
                os.truncate(path, MIB + 1)
        if done == "all gone":
            shutil.rmtree(tmp_path / "bucket")

    async def story() -> None:
        async with open_cache(origin, tmp_path, NEVER) as store:
            await store.head("key")
            # It has not asked for bytes when others have brought them.
            early = await store.open("key")
            assert await read(store, "key", 0, stop) == data[:stop]
            await wait_until(lambda: is_settled(store))
            tidy()
            assert await read_source(early) == data
            early.close()
            await wait_until(lambda: is_settled(store))
            tidy()
            assert await read(store, "key") == data
            await wait_until(lambda: is_settled(store))
            assert store.disk.used == disk_use(tmp_path)
            origin.reset()
            assert await read(store, "key") == data
            assert origin.sent == 0

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_what_is_noted_behind_a_note_that_was_cut_is_kept(tmp_path: Path) -> None:
    data = make(10 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path) as store:
            assert await read(store, "key", 0, 2 * MIB) == data[: 2 * MIB]
            await wait_until(lambda: is_settled(store))
            (log,) = tmp_path.rglob("*.log")
            with log.open("ab") as file:
                file.write(b"a half")
            assert await read(store, "key", 3 * MIB, 5 * MIB) == data[3 * MIB : 5 * MIB]
            await wait_until(lambda: is_settled(store))
        async with open_cache(origin, tmp_path) as store:
            assert store.cached_ranges("key") == [(0, 2 * MIB), (3 * MIB, 5 * MIB)]

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_much_more_than_there_is_room_for(tmp_path: Path) -> None:
    """Twice in random order: right bytes, room kept, pinned objects stay, no reader sees an eviction."""
    objects = {f"key-{number:02}": make(3 * MIB + number, number) for number in range(40)}
    capacity = 24 * MIB

    async def story() -> None:
        with ThreadPoolExecutor(8) as threads:
            disk = CacheDisk(tmp_path, capacity=capacity, high=90, low=60, threads=threads)
            async with (
                aiohttp.ClientSession() as session,
                open_bucket("pinned", disk, threads, session, CachePolicy(pin=True)) as pinned,
                open_bucket("other", disk, threads, session, CachePolicy()) as store,
            ):
                assert await read(pinned, "key-00") == objects["key-00"]
                order = [name for _ in range(2) for name in random.Random(1).sample(sorted(objects), len(objects))]
                held = await store.open("key-07", expected=(0, None))
                await held.ensure(0, MIB)

                async def reader(names: list[str]) -> None:
                    for name in names:
                        assert await read(store, name) == objects[name], name
                        assert disk.used <= capacity * 0.9
                        assert disk_use(tmp_path) <= capacity * 0.9

                await asyncio.gather(*(reader(order[number::3]) for number in range(3)))
                assert await read_source(held) == objects["key-07"]
                held.close()
                assert store.statistics().evicted > 40
                origin.reset()
                assert await read(pinned, "key-00") == objects["key-00"]
                assert origin.sent == 0
                await wait_until(lambda: is_settled(store))
                assert disk.used == pytest.approx(disk_use(tmp_path), rel=0.02)

    def open_bucket(
        name: str, disk: CacheDisk, threads: ThreadPoolExecutor, session: aiohttp.ClientSession, policy: CachePolicy
    ) -> AbstractAsyncContextManager[CachedBucket]:
        return CachedBucket.open_directory(
            Bucket.of("gs", name),
            WebOrigin(origin.url, session),
            tmp_path / name,
            disk=disk,
            policy=policy,
            threads=threads,
            shelf=Shelf(16),
        )

    with web() as origin:
        for name, data in objects.items():
            origin.objects[name] = Served(data, "v1")
        run(story())


def test_without_room_objects_pass_through_memory_which_is_bounded(tmp_path: Path) -> None:
    data = make(100 * MIB)

    async def story() -> None:
        async with open_cache(origin, tmp_path, capacity=8 * MIB) as store:

            async def one() -> None:
                source = await store.open("key", expected=(0, None))
                position = 0
                while position < len(data):
                    reached = await source.ensure_some(position, position + 16 * MIB)
                    assert os.pread(source.descriptor, reached - position, position) == data[position:reached]
                    assert os.fstat(source.descriptor).st_blocks * 512 <= WINDOW + 8 * MIB
                    position = reached
                    source.release(position)
                # What was given up does not come back as zeros.
                with pytest.raises(InsufficientStorage):
                    await source.ensure(0, len(data))
                source.close()

            await asyncio.gather(one(), one())
            assert await read(store, "key", 90 * MIB, 91 * MIB) == data[90 * MIB : 91 * MIB]
            assert store.statistics().passed == 2
            await wait_until(lambda: is_settled(store))
            assert disk_use(tmp_path) <= 8 * MIB

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_many_that_pass_through_share_the_memory_for_it(tmp_path: Path) -> None:
    """More than there is memory for at once: some get less, some wait until others have gone."""
    data = make(12 * MIB)
    readers = AT_ONCE * WINDOW // LEAST + 20

    async def story() -> None:
        async with open_cache(origin, tmp_path, capacity=MIB) as store:
            sources: set[Source] = set()

            async def one() -> None:
                source = await store.open("key", expected=(0, None))
                position = 0
                try:
                    while position < len(data):
                        reached = await source.ensure_some(position, position + 16 * MIB)
                        sources.add(source)
                        held = sum(os.fstat(other.descriptor).st_blocks * 512 for other in sources)
                        # What is on the way into a window when it moves comes on top.
                        assert held <= AT_ONCE * WINDOW + len(sources) * MIB
                        assert os.pread(source.descriptor, reached - position, position) == data[position:reached]
                        position = reached
                        source.release(position)
                finally:
                    sources.discard(source)
                    source.close()

            await asyncio.gather(*(one() for _ in range(readers)))
            assert store.statistics().passed == readers
            await wait_until(lambda: is_settled(store))

    with web() as origin:
        origin.objects["key"] = Served(data, "v1")
        run(story())


def test_a_full_disk_keeps_nothing_and_serves_all(tmp_path: Path) -> None:
    data = make(20 * MIB)

    async def story(data_directory: Path, is_real: bool) -> None:
        capacity = 0 if is_real else 16 * MIB
        async with open_cache(origin, data_directory, capacity=capacity) as store:
            assert await read(store, "key") == data
            assert await read(store, "small") == data[: 2 * MIB]
            assert store.statistics().passed == 1
            assert [found.key for found in store.cached("")] == ["small"]

    with web() as origin, small_disk(tmp_path / "disk", "16m") as is_real:
        origin.objects["key"] = Served(data, "v1")
        origin.objects["small"] = Served(data[: 2 * MIB], "v1")
        run(story(tmp_path / "disk" / "data", is_real))


CHILD = """
import asyncio, sys
from pathlib import Path
from tests.storage.cache.support import MIB, open_cache, read
from tests.storage.cache.web import Web

async def story():
    origin = Web()
    origin.url = sys.argv[1]
    async with open_cache(origin, Path(sys.argv[2]), capacity=24 * MIB) as store:
        print("ready", flush=True)
        while True:
            await asyncio.gather(*(read(store, f"key-{number}") for number in range(8)))
            for entry in store.cached(""):
                if not entry.readers:
                    await store.evict([entry.key])

asyncio.run(story())
"""


def test_a_kill_at_any_time_leaves_no_hole_and_right_counts(tmp_path: Path) -> None:
    """In the middle of fills, publications and evictions."""
    objects = {f"key-{number}": make(4 * MIB + number * 1000, number) for number in range(8)}
    data = tmp_path / "cache"
    data.mkdir()

    async def look(found: Web) -> int:
        async with open_cache(found, data, NEVER, capacity=48 * MIB) as store:
            kept = store.cached("")
            assert store.disk.used == pytest.approx(disk_use(data), rel=0.1, abs=2 * MIB)
            before = found.sent
            for entry in kept:
                for start, stop in store.cached_ranges(entry.key):
                    assert await read(store, entry.key, start, stop) == objects[entry.key][start:stop]
            assert found.sent == before
            for name, bytes in objects.items():
                assert await read(store, name) == bytes
            await wait_until(lambda: is_settled(store))
            assert store.disk.used == pytest.approx(disk_use(data), rel=0.02, abs=MIB // 4)
            return sum(entry.there for entry in kept)

    with web() as origin:
        for name, bytes in objects.items():
            origin.objects[name] = Served(bytes, "v1")
        kept = 0
        for attempt in range(8):
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, origin.url, str(data)], stdout=subprocess.PIPE, cwd=Path.cwd()
            )
            assert child.stdout is not None
            with child.stdout:
                assert child.stdout.readline() == b"ready\n"
                time.sleep(random.Random(attempt).uniform(0.01, 0.4))
                child.send_signal(signal.SIGKILL)
                child.wait()
            kept += run(look(origin))
        assert kept
