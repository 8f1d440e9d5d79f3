"""The pool beyond what every store promises: corruption, full disks, order of the durable steps, restarts."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shardmill.core.conditions import Conditions
from shardmill.core.errors import (
    Busy,
    CorruptObject,
    InsufficientStorage,
    ObjectNotFound,
    PreconditionFailed,
    ServerError,
)
from shardmill.storage.pool import PoolStore
from shardmill.storage.trailer import BLOCK
from shardmill.testing.stores import NOTHING, keys_on, page_of, pieces, put, read
from tests.storage.full_disk import fill, small_disk, write_limit
from tests.storage.scarce import common_threads, no_descriptors
from tests.storage.support import make_files, open_pool, pool_files, run, temporary_files


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_corrupt_block_is_never_served_and_others_are(tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK + 5)

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", data)
            (path,) = pool_files(tmp_path)
            flip(path, BLOCK + 17)
            source = await store.open("key")
            await source.ensure(0, BLOCK)
            await source.ensure(2 * BLOCK, len(data))
            for start, stop in ((BLOCK, BLOCK + 1), (0, len(data)), (2 * BLOCK - 1, 2 * BLOCK + 1)):
                with pytest.raises(CorruptObject, match="block 1 fails its checksum; put it again"):
                    await source.ensure(start, stop)
            source.close()
            await put(store, "key", data)
            assert (await read(store, "key"))[0] == data

    run(story())


def test_a_block_is_verified_again_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"data" * 1000)
            await read(store, "key")
        (path,) = pool_files(tmp_path)
        flip(path, 3)
        async with open_pool(tmp_path) as store:
            with pytest.raises(CorruptObject):
                await read(store, "key")

    run(story())


def test_a_file_that_shrinks_under_its_reader_is_corrupt(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", bytes(2 * BLOCK))
            source = await store.open("key")
            os.truncate(pool_files(tmp_path)[0], BLOCK + 10)
            await source.ensure(0, BLOCK)
            with pytest.raises(CorruptObject):
                await source.ensure(BLOCK, 2 * BLOCK)
            source.close()

    run(story())


@pytest.mark.parametrize("size", [0, 10, 4000, 4000 + 40])
def test_a_torn_file_is_an_error_until_it_is_put_again_or_removed(tmp_path: Path, size: int) -> None:
    """Never an absence: whoever reads would skip data that was there."""

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", bytes(4000))
            await make_files(store)
            (path,) = pool_files(tmp_path)
            os.truncate(path, size)
            for call in (store.open("key"), store.head("key")):
                with pytest.raises(CorruptObject):
                    await call
            with pytest.raises(PreconditionFailed):
                await put(store, "key", b"x", conditions=Conditions.parse({"If-Match": '"any"'}))
            with pytest.raises(PreconditionFailed):
                await store.delete("key", conditions=Conditions.parse({"If-Match": '"any"'}))
            await put(store, "key", b"again")
            assert (await read(store, "key"))[0] == b"again"
            await make_files(store)
            os.truncate(path, size)
            await store.delete("key", conditions=NOTHING)
            with pytest.raises(ObjectNotFound):
                await store.head("key")
            assert keys_on(await page_of(store)) == []

    run(story())


def test_a_file_of_another_object_is_not_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "a", b"of a")
            await make_files(store)
            (of_a,) = pool_files(tmp_path)
            await put(store, "b", b"of b")
            await make_files(store)
            (of_b,) = set(pool_files(tmp_path)) - {of_a}
            shutil.copy(of_a, of_b)
            with pytest.raises(CorruptObject, match="that of another object"):
                await store.open("b")
            assert (await read(store, "a"))[0] == b"of a"

    run(story())


def test_a_file_that_cannot_be_read_is_a_failure_and_no_absence(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"x" * 100)
            await make_files(store)
            (path,) = pool_files(tmp_path)
            path.chmod(0)
            with common_threads() as threads:
                store._threads = threads
                for call in (store.open("key"), store.head("key"), put(store, "key", b"y" * 100_000)):
                    with pytest.raises(ServerError, match="the disk failed: Permission denied") as failed:
                        await call
                    assert str(tmp_path) not in str(failed.value)
            assert keys_on(await page_of(store)) == ["key"]

    run(story())


def test_too_many_open_files_mean_ask_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"x")
            with no_descriptors():
                with pytest.raises(Busy) as busy:
                    await store.open("key")
                with pytest.raises(Busy):
                    await put(store, "other", bytes(100_000))
            assert busy.value.retry_after
            assert (await read(store, "key"))[0] == b"x"
            await put(store, "other", b"x")

    run(story())


def test_a_limit_of_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"old")
            with write_limit(2 << 20):
                for size in (None, 3 << 20):
                    with pytest.raises(InsufficientStorage, match="the disk is full; nothing was changed"):
                        await put(store, "key", bytes(3 << 20), size=size)
                # The bytes fit, the trailer behind them does not.
                with pytest.raises(InsufficientStorage):
                    await put(store, "key", bytes(2 << 20))
            assert (await read(store, "key"))[0] == b"old"
            assert temporary_files(tmp_path) == []
            await put(store, "key", bytes(3 << 20))

    run(story())


def test_a_full_disk_leaves_the_old_objects_and_can_be_emptied(tmp_path: Path) -> None:
    async def story() -> None:
        with small_disk(tmp_path / "disk", "12m") as is_small:
            data = tmp_path / "disk" / "data"
            async with open_pool(data) as store:
                await put(store, "old", b"old")
                await put(store, "large", bytes(1 << 20))
                if is_small:
                    await fill_up(store, tmp_path / "disk")
                assert temporary_files(data) == []
                assert (await read(store, "old"))[0] == b"old"
                before = keys_on(await page_of(store))
                for key in before:
                    await store.delete(key, conditions=NOTHING)
                assert keys_on(await page_of(store)) == []
                await put(store, "old", b"new")
                assert (await read(store, "old"))[0] == b"new"

    run(story())


async def fill_up(store: PoolStore, disk: Path) -> None:
    asked = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal asked
        async for piece in pieces(bytes(64 << 20)):
            asked += 1
            yield piece

    with pytest.raises(InsufficientStorage):
        await put(store, "old", counted(), size=64 << 20)
    assert asked == 0, "the space is asked for before the body is"
    with pytest.raises(InsufficientStorage):
        await put(store, "old", counted())
    assert asked
    number = 0
    with pytest.raises(InsufficientStorage):
        while True:
            await put(store, f"small/{number:05d}", bytes(100_000))
            number += 1
    listed = keys_on(await page_of(store, prefix="small/"))
    assert listed == [f"small/{done:05d}" for done in range(number)]
    fill(disk / "filler")
    for key in ("old", "novel"):
        with pytest.raises(InsufficientStorage):
            await put(store, key, b"x")
    with pytest.raises(ObjectNotFound):
        await store.head("novel")
    assert (await store.head("old")).size == 3


def test_an_object_that_the_index_has_no_room_for_is_put_back_as_it_was(tmp_path: Path) -> None:
    """Its file fits, the entry in the index does not: the answer is 507, so the old object must be there."""

    async def story() -> None:
        with small_disk(tmp_path / "disk", "12m") as is_small:
            data, filler = tmp_path / "disk" / "data", tmp_path / "disk" / "filler"
            async with open_pool(data) as store:
                await put(store, "old", b"old")
                await make_files(store)
                # A listing that goes on keeps the index from using pages again, so every change needs new ones.
                with store._index()._env.begin():
                    refused = 0
                    for pages in range(1, 12) if is_small else ():
                        fill(filler, leave=pages * 4096)
                        refused += await put_or_keep(store, "old", b"old")
                        refused += await put_or_keep(store, f"new-{pages}", None)
                        filler.unlink()
                        await put(store, "old", b"old")
                        await make_files(store)
                    assert refused >= (2 if is_small else 0)
                await put(store, "old", b"replaced")
                await check_listing(store)
                assert temporary_files(data) == []

    run(story())


async def put_or_keep(store: PoolStore, key: str, old: bytes | None) -> bool:
    """Put an object on a disk that is nearly full; True: it was refused, and nothing has changed."""
    before = pool_files(store.directory.parent.parent)
    try:
        await put(store, key, b"x" * 20)
    except InsufficientStorage:
        await check_listing(store)
        assert pool_files(store.directory.parent.parent) == before
        if old is not None:
            assert (await read(store, key))[0] == old
            return True
        with pytest.raises(ObjectNotFound):
            await store.head(key)
        return True
    assert (await read(store, key))[0] == b"x" * 20
    return False


async def check_listing(store: PoolStore) -> None:
    """The listing says the same as HEAD of every key."""
    for meta in (await page_of(store)).objects:
        assert await store.head(meta.key) == meta


def test_the_steps_of_a_put_are_in_the_durable_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on disk or in the log before the name, a name that is not logged before the answer; or neither."""
    steps: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(first: object, *rest: object, **options: object) -> object:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str((first, *rest)[-1])
            if "/log/" in path:
                steps.append(f"{name} log")
            elif "/journal/" in path and name != "pwrite":
                steps.append(f"{name} notes")
            elif "/pool/" in path:
                steps.append(f"{name} {'folder' if os.path.isdir(path) else 'file'}")
            return real(first, *rest, **options)

        monkeypatch.setattr(os, name, call)

    async def story() -> None:
        async with open_pool(tmp_path / "power") as store:
            await put(store, "key", b"x" * 100_000)
            for name in ("write", "pwritev", "fdatasync", "fsync", "rename", "unlink"):
                spy(name)
            logged = ["pwritev log", "fdatasync log"]
            await put(store, "key", b"x" * 100)
            assert steps == logged
            steps.clear()
            # What is logged is made durable first, and then forgotten: the log must not bring it back.
            settled = ["write file", "rename file", "fsync file", "fsync folder", *logged]
            await put(store, "key", b"x" * 100_000)
            large = [
                "write file",
                "write file",
                "fdatasync file",
                "fdatasync notes",
                "rename file",
                "fsync folder",
                "unlink file",
            ]
            assert steps == [large[0], *settled, *large[1:]]
            steps.clear()
            await put(store, "key", b"x" * 100_000)
            assert steps == large
            steps.clear()
            await store.delete("key", conditions=NOTHING)
            assert steps == ["fdatasync notes", "unlink file", "fsync folder"]
            steps.clear()
            await put(store, "key", b"x" * 100)
            steps.clear()
            await store.delete("key", conditions=NOTHING)
            assert steps == ["fdatasync notes", "unlink file", *logged]
            steps.clear()
            await put(store, "key", b"x" * 100)
            await read(store, "key")
            assert steps == [*logged, "write file"]
            steps.clear()
            await store.delete("key", conditions=NOTHING)
            # Until the log forgets it, it is what the next start finds.
            assert steps == ["fdatasync notes", "unlink file", "fsync folder", *logged]
        async with open_pool(tmp_path / "kill", durability="kill") as store:
            await put(store, "key", b"first")
            steps.clear()
            await put(store, "key", b"x" * 100)
            await store.delete("key", conditions=NOTHING)
            assert steps == ["pwritev log", "unlink file", "pwritev log"]
            steps.clear()
            await put(store, "key", b"x" * 100_000)
            assert steps == ["write file", "write file", "rename file"]

    run(story())


def test_a_restart_finds_everything_and_sweeps_what_uploads_left(tmp_path: Path) -> None:
    async def story() -> None:
        kept = {f"key/{number}": os.urandom(number * 1000) for number in range(30)}
        async with open_pool(tmp_path) as store:
            await asyncio.gather(*[put(store, key, data) for key, data in kept.items()])
        left = next(tmp_path.glob("pool/*/tmp"))
        (left / "0123456789abcdef").write_bytes(b"half an upload")
        (left / "0123456789abcdef.old").write_bytes(b"what it replaced")
        async with open_pool(tmp_path) as store:
            assert temporary_files(tmp_path) == []
            assert keys_on(await page_of(store)) == sorted(kept)
            for key, data in kept.items():
                assert (await read(store, key))[0] == data

    run(story())


def test_a_torn_or_unreadable_file_does_not_end_the_building_of_the_index(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path) as store:
            for number in range(20):
                await put(store, f"key/{number:02d}", b"x" * 100)
        files = pool_files(tmp_path)
        os.truncate(files[0], 50)
        (files[1].parent / "stranger").write_bytes(b"not of this program")
        (files[2].parent / "folder").mkdir()
        (files[0].parent.parent / "ff-not-a-folder").write_bytes(b"")
        shutil.rmtree(tmp_path / "index")
        async with open_pool(tmp_path) as store:
            await store._index().wait_complete()
            listed = keys_on(await page_of(store))
            assert len(listed) == 19
            for key in listed:
                assert (await read(store, key))[0] == b"x" * 100

    run(story())


def test_a_small_object_that_is_replaced_while_it_is_opened_is_found(tmp_path: Path) -> None:
    """It has had no file yet; what takes its place has none either."""

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"first")
            making = store._groups()._making
            making.acquire()
            try:
                opening = asyncio.create_task(store.open("key"))
                await asyncio.sleep(0)
                await put(store, "key", b"second")
            finally:
                making.release()
            source = await opening
            try:
                assert os.pread(source.descriptor, source.meta.size, 0) == b"second"
            finally:
                source.close()

    run(story())
