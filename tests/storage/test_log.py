"""The log of small objects: read up to the first record that is not whole, never beyond its own turn."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmill.core.errors import InsufficientStorage, ServerError, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import Bucket
from shardmill.storage import groups as grouping
from shardmill.storage import log as logs
from shardmill.storage.buckets import BucketDefinition
from shardmill.storage.groups import Groups
from shardmill.storage.index import Index
from shardmill.storage.log import LogFile, Record, survivors
from shardmill.storage.pool import PoolStore
from shardmill.storage.pool_upload import PoolUpload
from shardmill.testing.stores import NOTHING, keys_on, page_of, put, read
from tests.storage.full_disk import fill, small_disk
from tests.storage.support import POOL, make_files, open_buckets, open_pool, pool_files, run

STORE = "0123456789abcdef"
SIZE = 1 << 20

RECORDS = st.lists(
    st.tuples(st.sampled_from("abc"), st.none() | st.binary(max_size=60)).map(lambda pair: Record(STORE, *pair)),
    max_size=8,
)


def found(directory: Path) -> dict[str, bytes]:
    files = [LogFile(directory / name, SIZE) for name in ("a", "b")]
    try:
        return {key: content for (_, key), content in survivors(files)}
    finally:
        for file in files:
            file.close()


def last_of(records: list[Record]) -> dict[str, bytes]:
    last: dict[str, bytes] = {}
    for record in records:
        if record.content is None:
            last.pop(record.key, None)
        else:
            last[record.key] = bytes(record.content)
    return last


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(before=RECORDS, first=RECORDS, second=RECORDS, torn=st.integers(0, 200))
def test_the_last_whole_record_of_each_key_counts(
    tmp_path: Path, before: list[Record], first: list[Record], second: list[Record], torn: int
) -> None:
    """Records of an earlier turn lie behind those of this one; the last group may be torn anywhere."""
    old, new = LogFile(tmp_path / "a", SIZE), LogFile(tmp_path / "b", SIZE)
    old.clear(1)
    new.clear(2)
    new.append(before)
    new.clear(4)
    old.clear(3)
    old.append(first)
    new.append(second)
    end = new._position
    old.close()
    new.close()
    assert found(tmp_path) == last_of([*first, *second])
    with (tmp_path / "b").open("r+b") as file:
        file.truncate(max(4096, end - torn))
    kept = [last_of([*first, *second[:count]]) for count in range(len(second) + 1)]
    assert found(tmp_path) in kept


def test_a_group_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a", SIZE)
    LogFile(tmp_path / "b", SIZE).close()
    file.clear(1)
    file.append([Record(STORE, "kept", b"1")])
    descriptor, file._descriptor = file._descriptor, os.open("/dev/full", os.O_RDWR)
    with pytest.raises(InsufficientStorage):
        file.append([Record(STORE, "lost", b"2")])
    os.close(file._descriptor)
    file._descriptor = descriptor
    file.append([Record(STORE, "after", b"3")])
    file.close()
    assert found(tmp_path) == {"kept": b"1", "after": b"3"}


def test_nothing_of_a_group_that_failed_counts_behind_what_comes_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LogFile(tmp_path / "a", SIZE)
    LogFile(tmp_path / "b", SIZE).close()
    file.clear(1)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(ServerError):
            file.append([Record(STORE, "x", b"1"), Record(STORE, "lost", b"2")])
    file.append([Record(STORE, "y", b"3")])
    file.close()
    assert found(tmp_path) == {"y": b"3"}


def test_what_is_no_record_is_not_read_for_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last record lies anything; four billion bytes of it may be more than there is memory."""
    file = LogFile(tmp_path / "a", SIZE)
    file.clear(1)
    with (tmp_path / "a").open("r+b") as anything:
        anything.seek(4096)
        anything.write(b"\xfe" * 100)
    sizes = []
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(descriptor, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        assert list(file.load()) == []
    file.close()
    assert 0 < max(sizes) <= SIZE


def test_objects_go_on_when_the_disk_does_not_take_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that fails ends the use of the log; what it has is looked at by the next start."""
    for name in ("LARGEST", "LEAST"):
        monkeypatch.setattr(logs, name, 8192)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    bodies = {f"{number:02d}": os.urandom(500) for number in range(40)}

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            with monkeypatch.context() as patch:
                patch.setattr(grouping, "sync_file_system", fail)
                await asyncio.gather(*[put(store, key, body) for key, body in bodies.items()])
                for number in range(0, 40, 3):
                    await store.delete(f"{number:02d}", conditions=NOTHING)
                    del bodies[f"{number:02d}"]
                for number in range(1, 40, 3):
                    bodies[f"{number:02d}"] = b"new"
                    await put(store, f"{number:02d}", b"new")
                await check(store, bodies)
        async with open_pool(tmp_path) as store:
            await check(store, bodies)

    run(story())


def test_a_file_that_has_gone_is_made_again_from_the_log(tmp_path: Path) -> None:
    """As after a power cut: the log is there, and names that were never flushed are not."""

    async def story() -> None:
        async with open_pool(tmp_path / "data") as store:
            await put(store, "key", b"body")
            await put(store, "torn", b"other")
            for key in ("key", "torn"):
                await read(store, key)
            image = tmp_path / "image"
            await asyncio.to_thread(os.system, f"cp -r {tmp_path}/data {image}")
        first, second = pool_files(image)
        first.unlink()
        second.write_bytes(b"")
        async with open_pool(image) as store:
            await check(store, {"key": b"body", "torn": b"other"})

    run(story())


def test_what_the_log_cannot_take_is_listed_as_it_is_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the file's name and the index."""
    for name in ("LARGEST", "LEAST"):
        monkeypatch.setattr(logs, name, 4096)
    image, real = tmp_path / "image", Index.put

    async def cut(index: Index, identity: str, meta: ObjectMeta) -> None:
        await asyncio.to_thread(os.system, f"cp -r {tmp_path}/data {image}")
        await real(index, identity, meta)

    async def story() -> None:
        async with open_pool(tmp_path / "data") as store:
            await put(store, "key", b"old")
            with monkeypatch.context() as patch:
                patch.setattr(Index, "put", cut)
                await put(store, "key", b"newer")
        async with open_pool(image) as store:
            (listed,) = (await page_of(store)).objects
            assert listed == await store.head("key")
            assert (await read(store, "key"))[0] == b"newer"

    run(story())


@pytest.mark.parametrize("size", [2000, 100_000])
def test_what_cannot_be_undone_is_listed_as_it_is_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Neither the index nor the old name can be written: what stands there is the new object, which was refused."""
    for name in ("LARGEST", "LEAST"):
        monkeypatch.setattr(logs, name, 4096)
    body = os.urandom(size)

    def refuse(*_: object) -> ShardmillError:
        return InsufficientStorage("no room")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"old")
            with monkeypatch.context() as patch:
                patch.setattr(Index, "_commit", refuse)
                patch.setattr(PoolUpload, "restore", fail)
                with pytest.raises(ShardmillError):
                    await put(store, "key", body)
        async with open_pool(tmp_path) as store:
            (listed,) = (await page_of(store)).objects
            assert listed == await store.head("key")
            assert (await read(store, "key"))[0] == body

    run(story())


def test_each_bucket_promises_what_its_table_says(tmp_path: Path) -> None:
    """One that promises less is not flushed; both are listed, also when a promise changes."""
    scratch = Bucket.of("ais", "scratch")

    async def story() -> None:
        for promises in (("power", "kill"), ("power", "kill"), ("kill", "power")):
            definitions = [
                BucketDefinition(bucket, None, writable=True, durability="power" if promise == "power" else "kill")
                for bucket, promise in zip((POOL, scratch), promises, strict=True)
            ]
            async with open_buckets(tmp_path, *definitions) as buckets:
                for bucket, promise in zip((POOL, scratch), promises, strict=True):
                    store = buckets.writable(bucket)
                    assert isinstance(store, PoolStore)
                    assert store.is_durable == (promise == "power")
                    await store._index().wait_complete()
                    await put(store, f"of {promise}", b"body")
                    listed = keys_on(await page_of(store))
                    assert f"of {promise}" in listed
                    for key in listed:
                        assert (await read(store, key))[0] == b"body"
        assert len(listed) == 2

    run(story())


def test_a_bucket_made_under_one_promise_is_listed_under_another(tmp_path: Path) -> None:
    """Its objects are in the index of what was promised when it was made."""
    made, named = Bucket.of("ais", "made"), BucketDefinition(POOL, None, writable=True)

    async def story() -> None:
        async with open_buckets(tmp_path, named, durability="power"):
            pass
        async with open_buckets(tmp_path, named, durability="kill") as buckets:
            await buckets.create(made)
            await put(buckets.writable(made), "key", b"body")
        async with open_buckets(tmp_path, named, durability="power") as buckets:
            store = buckets.writable(made)
            assert isinstance(store, PoolStore)
            await store._index().wait_complete()
            assert keys_on(await page_of(store)) == ["key"]

    run(story())


def test_objects_that_the_disk_cannot_take_yet_are_read_and_listed(tmp_path: Path) -> None:
    """They were acknowledged before somebody else filled the disk; neither a file nor the index has room for them."""

    async def story() -> None:
        with small_disk(tmp_path / "disk", "16m") as is_small:
            data, filler = tmp_path / "disk" / "data", tmp_path / "disk" / "filler"
            bodies = {f"{number:03d}": os.urandom(3000) for number in range(100)}
            async with open_pool(data) as store:
                await asyncio.gather(*[put(store, key, body) for key, body in bodies.items()])
                if is_small:
                    fill(filler)
                await check(store, bodies)
                await store.delete("050", conditions=NOTHING)
                del bodies["050"]
                await check(store, bodies)
                assert keys_on(await page_of(store, after="010", limit=3)) == ["011", "012", "013"]
                filler.unlink(missing_ok=True)
                await make_files(store)
                await check(store, bodies)
            async with open_pool(data) as store:
                await check(store, bodies)

    run(story())


def test_what_is_read_from_the_log_is_not_of_a_later_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the file fails, and before the log is read its place in there has another object."""

    async def story() -> None:
        loop = asyncio.get_running_loop()

        async def overtake() -> None:
            for turn in range(4):
                await make_files(store)
                await put(store, f"ke{turn}", b"other")

        def fail(groups: Groups, logged: grouping.Logged) -> None:
            monkeypatch.undo()
            asyncio.run_coroutine_threadsafe(overtake(), loop).result(30)
            raise InsufficientStorage("no room for its file")

        async with open_pool(tmp_path / "data") as store:
            await put(store, "key", b"body!")
            monkeypatch.setattr(Groups, "make_file", fail)
            assert (await read(store, "key"))[0] == b"body!"

    run(story())


def test_a_log_of_another_format_is_not_thrown_away(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_pool(tmp_path / "data") as store:
            await put(store, "key", b"body")
            await asyncio.to_thread(os.system, f"cp -r {tmp_path}/data {tmp_path}/image")
        path = tmp_path / "image" / "log" / "a"
        with path.open("r+b") as file:
            file.seek(8)
            file.write((logs.FORMAT + 1).to_bytes(4, "little"))
        with pytest.raises(ServerError, match="format 2, and this program reads 1; start the version that wrote it"):
            async with open_pool(tmp_path / "image"):
                pass
        with path.open("r+b") as file:
            file.seek(8)
            file.write(logs.FORMAT.to_bytes(4, "little"))
        async with open_pool(tmp_path / "image") as store:
            await check(store, {"key": b"body"})

    run(story())


async def log_in_both_files(data: Path, patch: pytest.MonkeyPatch) -> None:
    """Leave a log whose older file, the second, could not be cleared; "key" and "gone" are changed in the other one."""
    make_file = PoolStore.make_file

    def refuse(store: PoolStore, key: str, content: bytes) -> None:
        if key == "stuck":
            raise InsufficientStorage("no room for its file")
        make_file(store, key, content)

    with patch.context() as while_open:
        while_open.setattr(PoolStore, "make_file", refuse)
        async with open_pool(data) as store:
            await put(store, "before", b"x")
            await make_files(store)
            for key in ("key", "gone", "stuck"):
                await put(store, key, b"old")
            await make_files(store)
            await put(store, "key", b"new")
            await store.delete("gone", conditions=NOTHING)


def test_the_newer_file_of_the_log_is_not_cleared_before_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        await log_in_both_files(tmp_path, monkeypatch)
        async with open_pool(tmp_path) as store:
            await check(store, {"before": b"x", "key": b"new", "stuck": b"old"})

    run(story())


def test_an_end_between_the_clearing_of_both_files_of_the_log_brings_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Path] = []
    clear = LogFile.clear

    def clear_one(file: LogFile, turn: int) -> None:
        if cleared:
            raise ServerError("it ends here")
        clear(file, turn)
        cleared.append(file.path)

    async def story() -> None:
        await log_in_both_files(tmp_path, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(LogFile, "clear", clear_one)
            with pytest.raises(ServerError):
                async with open_pool(tmp_path):
                    pass
        assert len(cleared) == 1
        async with open_pool(tmp_path) as store:
            await check(store, {"before": b"x", "key": b"new", "stuck": b"old"})

    run(story())


def test_who_goes_on_in_the_other_file_just_when_it_is_cleared_does_not_clear_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be cleared under the records that are written to it by then."""
    begun: list[str] = []
    begin = Groups._begin_checkpoint

    def note(groups: Groups, full: LogFile) -> None:
        begun.append(full.path.name)
        begin(groups, full)

    def set_checkpointing(groups: Groups, value: bool) -> None:
        vars(groups)["checkpointing"] = value
        if begun == ["a"] and not value:
            # Bounded, since it may have to wait for whoever says so here.
            rotating = threading.Thread(target=groups._rotate)
            rotating.start()
            rotating.join(0.2)
            threads.append(rotating)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(grouping, "PATIENCE", 0.1)
    monkeypatch.setattr(Groups, "_begin_checkpoint", note)
    is_checkpointing = property(lambda groups: vars(groups)["checkpointing"], set_checkpointing)
    monkeypatch.setattr(Groups, "_is_checkpointing", is_checkpointing, raising=False)

    async def story() -> None:
        async with open_pool(tmp_path) as store:
            await put(store, "key", b"body")
            await make_files(store)
            for thread in threads:
                thread.join()
        assert begun[:2] == ["a", "b"]

    run(story())


async def check(store: PoolStore, bodies: dict[str, bytes]) -> None:
    assert store._index().is_complete
    assert keys_on(await page_of(store)) == sorted(bodies)
    for key, body in bodies.items():
        assert (await read(store, key))[0] == body
