"""The buckets of a data directory: alone in it, whole after any end, never removed under an acknowledged object."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.core.errors import (
    BadRequest,
    BucketNotFound,
    BucketReadOnly,
    Conflict,
    InsufficientStorage,
    ObjectNotFound,
    ServerError,
)
from shardmill.core.refs import Bucket
from shardmill.core.sources import WriteStore
from shardmill.storage.buckets import BucketDefinition, Buckets, check_file_system, is_far, is_made_up
from shardmill.storage.pool import PoolStore
from shardmill.testing.stores import NOTHING, keys_on, page_of, put, read
from tests.storage.full_disk import write_limit
from tests.storage.support import DIRECTORY, POOL, open_buckets, pool_files, run

MADE = Bucket.of("ais", "made")


def definition(bucket: Bucket, path: Path | None, *, writable: bool = False) -> BucketDefinition:
    return BucketDefinition(bucket, path, writable=writable)


def names(buckets: Buckets) -> list[str]:
    return [info.uri for info in buckets.list()]


def identities(data: Path) -> set[str]:
    return {path.name for path in (data / "pool").iterdir()}


def test_a_bucket_is_created_listed_used_and_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            with pytest.raises(BucketNotFound, match="shardmill mb ais://made"):
                buckets.store(MADE)
            await buckets.create(MADE)
            with pytest.raises(Conflict, match="exists already"):
                await buckets.create(MADE)
            assert [(info.uri, info.backing, info.writable) for info in buckets.list()] == [
                ("ais://made", "pool", True),
                ("ais://pool", "pool", True),
            ]
            await put(buckets.writable(MADE), "key", b"x")
            with pytest.raises(Conflict, match="not empty; remove its objects, or force it"):
                await buckets.remove(MADE, force=False)
            assert (await read(buckets.writable(MADE), "key"))[0] == b"x"
            await buckets.writable(MADE).delete("key", conditions=NOTHING)
            await buckets.remove(MADE, force=False)
            for call in (buckets.remove(MADE, force=True), buckets.remove(MADE, force=False)):
                with pytest.raises(BucketNotFound):
                    await call
            assert names(buckets) == ["ais://pool"]
            assert len(identities(tmp_path)) == 1

    run(story())


def test_a_bucket_of_the_same_name_begins_empty(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            for number in range(3):
                await buckets.create(MADE)
                store = buckets.writable(MADE)
                assert keys_on(await page_of(store)) == []
                for key in ("a", "b", f"c{number}"):
                    await put(store, key, b"x")
                await buckets.remove(MADE, force=True)
                with pytest.raises(BucketNotFound, match="was removed"):
                    await put(store, "late", b"x")
                with pytest.raises(ObjectNotFound):
                    await store.open("a")
            assert pool_files(tmp_path) == []

    run(story())


def test_only_ais_buckets_are_created_and_configured_ones_stay(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "files").mkdir()
        wanted = (definition(DIRECTORY, tmp_path / "files"), definition(POOL, None, writable=True))
        async with open_buckets(tmp_path / "data", *wanted) as buckets:
            for uri in ("gs://new", "s3://new", "az://new", "ht://new"):
                with pytest.raises(BadRequest, match=f"--bucket {uri}=dir:PATH"):
                    await buckets.create(Bucket.parse(uri))
            for bucket in (DIRECTORY, POOL):
                for force in (False, True):
                    with pytest.raises(Conflict, match="configured"):
                        await buckets.remove(bucket, force=force)
            with pytest.raises(BucketNotFound, match="--bucket s3://other=dir:PATH"):
                buckets.store(Bucket.parse("s3://other"))

    run(story())


def test_a_directory_is_read_only_unless_it_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "files").mkdir()
        other = Bucket.of("gs", "writable")
        wanted = (definition(DIRECTORY, tmp_path / "files"), definition(other, tmp_path / "files", writable=True))
        async with open_buckets(tmp_path / "data", *wanted) as buckets:
            with pytest.raises(BucketReadOnly, match="--bucket gs://directory=dir-rw:PATH"):
                buckets.writable(DIRECTORY)
            with pytest.raises(BucketNotFound):
                buckets.writable(MADE)
            await put(buckets.writable(other), "key", b"x")
            assert (await buckets.store(DIRECTORY).head("key")).size == 1
            assert {info.uri: (info.backing, info.writable) for info in buckets.list()} == {
                "gs://directory": ("dir", False),
                "gs://writable": ("dir", True),
            }

    run(story())


def test_buckets_and_objects_are_there_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        remote = Bucket.of("s3", "kept-here")
        wanted = (definition(POOL, None, writable=True), definition(remote, None, writable=True))
        async with open_buckets(tmp_path, *wanted) as buckets:
            await buckets.create(MADE)
            for bucket in (MADE, POOL, remote):
                await put(buckets.writable(bucket), "key", str(bucket).encode())
        for _ in range(2):
            async with open_buckets(tmp_path, *wanted) as buckets:
                for bucket in (MADE, POOL, remote):
                    assert (await read(buckets.writable(bucket), "key"))[0] == str(bucket).encode()
                    assert keys_on(await page_of(buckets.writable(bucket))) == ["key"]
        # A configured bucket that is no longer configured is one that was created.
        async with open_buckets(tmp_path, definition(POOL, None, writable=True)) as buckets:
            await buckets.remove(remote, force=True)
            assert names(buckets) == ["ais://made", "ais://pool"]

    run(story())


def test_a_list_of_buckets_that_cannot_be_read_ends_the_start_and_nothing_is_swept(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            await put(buckets.writable(POOL), "key", b"x")
        good = (tmp_path / "buckets.json").read_bytes()
        for bad in (b"", b"{", b"[]", b'{"ais://pool": 5}', good[:-3]):
            (tmp_path / "buckets.json").write_bytes(bad)
            with pytest.raises(ServerError, match=r"buckets\.json cannot be read"):
                async with open_buckets(tmp_path):
                    pass
            assert len(pool_files(tmp_path)) == 1
        (tmp_path / "buckets.json").write_bytes(good)
        async with open_buckets(tmp_path) as buckets:
            assert (await read(buckets.writable(POOL), "key"))[0] == b"x"

    run(story())


# Alone in its directory

HOLD = """
import asyncio, sys
from pathlib import Path
from shardmill.storage.buckets import Buckets

async def main():
    async with Buckets.open(Path(sys.argv[1]), [], threads=2, durability="power"):
        print("open", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.contextmanager
def holder(data: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the data directory open."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(data)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_node_on_one_directory_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    async def story() -> None:
        with holder(tmp_path) as process:
            with pytest.raises(Conflict, match=f"used by the node with pid {process.pid}; stop that one"):
                async with open_buckets(tmp_path):
                    pass
            process.send_signal(signal.SIGKILL)
            process.wait()
            async with open_buckets(tmp_path) as buckets:
                await buckets.create(MADE)
        async with open_buckets(tmp_path) as buckets:
            assert "ais://made" in names(buckets)
            with pytest.raises(Conflict, match=f"pid {os.getpid()}"):
                async with open_buckets(tmp_path):
                    pass
            await put(buckets.writable(MADE), "key", b"still works")

    run(story())


def test_a_directory_that_cannot_be_used_is_refused_with_the_way_out(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "file").write_bytes(b"")
        for data in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ServerError, match="--data"):
                async with open_buckets(data):
                    pass

    run(story())


MOUNTS = """\
rootfs / rootfs rw 0 0
/dev/root / ext4 rw 0 0
server:/home /net/home nfs4 rw 0 0
/dev/sdb /net/home/local ext4 rw 0 0
//server/share /mnt/with\\040space cifs rw 0 0
host: /mnt/ssh fuse.sshfs rw 0 0
/dev/sdc /over ext4 rw 0 0
server:/over /over nfs rw 0 0
server:/under /under nfs rw 0 0
/dev/sdd /under xfs rw 0 0
share /mnt/9p 9p rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("/data", None),
        ("/net/homeless", None),
        ("/net/home", "nfs4"),
        ("/net/home/user/data", "nfs4"),
        ("/net/home/local/data", None),
        ("/mnt/with space/data", "cifs"),
        ("/mnt/ssh", "fuse.sshfs"),
        ("/over/data", "nfs"),
        ("/under/data", None),
        ("/mnt/9p/x", "9p"),
    ],
)
def test_file_systems_of_a_network_are_refused_by_name(tmp_path: Path, path: str, refused: str | None) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    if refused is None:
        check_file_system(Path(path), tmp_path / "mounts")
        return
    with pytest.raises(ServerError, match=f"{path} lies on {refused}, whose locks and maps are not to be trusted"):
        check_file_system(Path(path), tmp_path / "mounts")


@pytest.mark.parametrize(
    ("path", "is_so"),
    [
        ("/data", (False, False)),
        ("/net/home/local", (False, False)),
        ("/net/home/x", (True, False)),
        ("/mnt/ssh", (True, True)),
        ("/fuse/x", (True, True)),
    ],
)
def test_a_directory_on_a_network_is_far(tmp_path: Path, path: str, is_so: tuple[bool, bool]) -> None:
    (tmp_path / "mounts").write_text(f"{MOUNTS}s3 /fuse fuse rw 0 0\n")
    assert (is_far(Path(path), tmp_path / "mounts"), is_made_up(Path(path), tmp_path / "mounts")) == is_so


def test_where_mounts_cannot_be_read_nothing_is_refused(tmp_path: Path) -> None:
    check_file_system(tmp_path, tmp_path / "none")
    check_file_system(tmp_path, Path("/proc/self/mounts"))


def test_a_link_into_a_network_is_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    (tmp_path / "mounts").write_text(f"server:/x {tmp_path.resolve()}/far nfs rw 0 0\n")
    with pytest.raises(ServerError, match="nfs"):
        check_file_system(tmp_path / "link" / "data", tmp_path / "mounts")


# Ends half-way

HALFWAY = """
import asyncio, os, shutil, sys
from pathlib import Path
from shardmill.core.refs import Bucket
from shardmill.core.sources import WriteStore
from shardmill.storage import buckets as module
from shardmill.storage.index import Index
from shardmill.testing.stores import put

step, data = sys.argv[1], Path(sys.argv[2])
MADE = Bucket.of("ais", "made")

def end(*_, **__):
    os._exit(7)

async def main():
    async with module.Buckets.open(data, [], threads=4, durability="power") as buckets:
        if step.startswith("create"):
            if step == "create, before it is listed":
                module.Buckets._save = end
            else:
                real_replace = module.replace_durably
                def replace(path, text):
                    if path.name != "buckets.json":
                        return real_replace(path, text)
                    path.with_name(path.name + ".new").write_bytes(text[:5])
                    end()
                module.replace_durably = replace
            await buckets.create(MADE)
        await buckets.create(MADE)
        for number in range(700):
            await put(buckets.writable(MADE), f"{number:04d}", b"x")
        await buckets.writable(MADE)._groups().make_files()
        if step == "remove, before it is unlisted":
            module.replace_durably = end
        elif step == "remove, before its objects":
            module.Buckets._forget = end
        elif step == "remove, amid its objects":
            real, calls = shutil.rmtree, []
            shutil.rmtree = lambda path, **options: calls.append(path) or (end() if len(calls) > 100 else real(path, **options))
        elif step == "remove, before the index":
            Index.forget_store = end
        elif step == "remove, amid the index":
            real_names, rounds = Index._some_names, []
            Index._some_names = lambda self, store: rounds.append(1) or (end() if len(rounds) > 1 else real_names(self, store))
        else:
            real_forget = Index.forget_store
            async def forget(self, store):
                await real_forget(self, store)
                end()
            Index.forget_store = forget
        await buckets.remove(MADE, force=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "step",
    [
        "create, before it is listed",
        "create, amid the list",
        "remove, before it is unlisted",
        "remove, before its objects",
        "remove, amid its objects",
        "remove, before the index",
        "remove, amid the index",
        "remove, before its directory",
    ],
)
def test_a_bucket_is_there_or_not_and_nothing_of_it_is_left_when_a_process_ends_half_way(
    tmp_path: Path, step: str
) -> None:
    ended = subprocess.run([sys.executable, "-c", HALFWAY, step, str(tmp_path)], timeout=100)
    assert ended.returncode == 7

    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            is_there = step == "remove, before it is unlisted"
            assert names(buckets) == (["ais://made"] if is_there else []) + ["ais://pool"]
            assert len(identities(tmp_path)) == (2 if is_there else 1)
            assert list(tmp_path.glob("*.new")) == []
            pool = buckets.writable(POOL)
            assert isinstance(pool, PoolStore)
            await pool._index().wait_complete()
            assert entries_in(pool) == (700 if is_there else 0)
            if is_there:
                assert len(keys_on(await page_of(buckets.writable(MADE)))) == 700
                return
            await buckets.create(MADE)
            assert keys_on(await page_of(buckets.writable(MADE))) == []

    run(story())


def entries_in(store: PoolStore) -> int:
    """Of all buckets, those of removed ones too."""
    with store._index()._env.begin() as transaction:
        return int(transaction.stat()["entries"])


def test_a_removal_that_was_half_way_ends_though_the_index_is_being_built(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HALFWAY, "remove, before its objects", str(tmp_path)], timeout=100)
    shutil.rmtree(tmp_path / "index")

    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            pool = buckets.writable(POOL)
            assert isinstance(pool, PoolStore)
            await pool._index().wait_complete()
            assert (names(buckets), entries_in(pool), len(identities(tmp_path))) == (["ais://pool"], 0, 1)

    run(story())


# At once


def test_an_acknowledged_object_is_never_in_a_bucket_that_was_removed_as_empty(tmp_path: Path) -> None:
    async def story() -> None:
        outcomes = set()
        async with open_buckets(tmp_path, durability="kill") as buckets:
            for round_ in range(60):
                await buckets.create(MADE)
                store = buckets.writable(MADE)

                async def remove(pauses: int) -> bool:
                    await pause(pauses)
                    try:
                        await buckets.remove(MADE, force=False)
                    except Conflict:
                        return False
                    return True

                async def store_one(pauses: int, store: WriteStore = store) -> bool:
                    await pause(pauses)
                    try:
                        await put(store, "key", b"x")
                    except BucketNotFound:
                        return False
                    return True

                first, second = (0, round_ // 2 % 6) if round_ % 2 else (round_ // 2 % 6, 0)
                stored, removed = await asyncio.gather(store_one(first), remove(second))
                outcomes.add((stored, removed))
                assert stored is not removed
                if stored:
                    assert (await read(buckets.writable(MADE), "key"))[0] == b"x"
                    await buckets.remove(MADE, force=True)
        assert outcomes == {(True, False), (False, True)}

    run(story())


async def pause(times: int) -> None:
    """Let other tasks get as many calls of a thread done."""
    for _ in range(times):
        await asyncio.to_thread(int)


def test_a_bucket_is_whole_whoever_leaves_while_it_is_made_or_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            for pauses in range(40):
                for call in (buckets.create, lambda bucket: buckets.remove(bucket, force=True)):
                    task = asyncio.ensure_future(call(MADE))
                    for _ in range(pauses):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                    listed = json.loads((tmp_path / "buckets.json").read_bytes())
                    assert sorted(listed) == names(buckets)
                    if "ais://made" in listed:
                        await put(buckets.writable(MADE), "key", b"x")
                    assert identities(tmp_path) == set(listed.values())

    run(story())


def test_a_full_disk_leaves_the_buckets_as_they_were(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_buckets(tmp_path) as buckets:
            await buckets.create(MADE)
            with write_limit(10):
                with pytest.raises(InsufficientStorage):
                    await buckets.create(Bucket.of("ais", "other"))
                with pytest.raises(InsufficientStorage):
                    await buckets.remove(MADE, force=True)
            assert names(buckets) == ["ais://made", "ais://pool"]
            await put(buckets.writable(MADE), "key", b"x")
        async with open_buckets(tmp_path) as buckets:
            assert names(buckets) == ["ais://made", "ais://pool"]
            assert (await read(buckets.writable(MADE), "key"))[0] == b"x"

    run(story())
