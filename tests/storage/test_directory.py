"""Directories as buckets beyond what every store promises: the tree is never left, nothing is lost in silence."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import stat
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmill.core.errors import (
    BadRequest,
    Busy,
    Conflict,
    InsufficientStorage,
    ObjectNotFound,
    ServerError,
)
from shardmill.core.refs import MAX_KEY
from shardmill.storage import walk as walks
from shardmill.storage.directory import DirectoryStore
from shardmill.storage.kept import Shelf
from shardmill.storage.tree import Tree
from shardmill.storage.walk import Walk
from shardmill.testing.stores import NOTHING, entries, in_order, keys_on, page_of, pieces, put, read
from tests.storage.full_disk import fill, small_disk, write_limit
from tests.storage.scarce import common_threads, no_descriptors
from tests.storage.support import DIRECTORY, keeps_attributes, open_directory, run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory of the bucket; what is beside it is out of bounds."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def settle(*folders: Path) -> None:
    """Wait until the folders' times are old enough to tell a change from none, so that they may be remembered."""
    while any(time.time_ns() - folder.stat().st_ctime_ns <= 2 * walks._TICK for folder in folders):
        time.sleep(0.01)


async def all_keys(store: DirectoryStore, *, limit: int = 1000, prefix: str = "") -> list[str]:
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await page_of(store, prefix=prefix, after=after, limit=limit)
        found += keys_on(page)
        after = page.next
    return found


def test_files_are_objects_as_they_stand(root: Path) -> None:
    async def story() -> None:
        for name in ("a.b", "a/b", "a/c.tar", "a0", "z", ".hidden/x"):
            write(root / name, name.encode())
        (root / "empty" / "folder").mkdir(parents=True)
        async with open_directory(root) as store:
            assert await all_keys(store) == [".hidden/x", "a.b", "a/b", "a/c.tar", "a0", "z"]
            assert (await page_of(store, delimiter="/")).prefixes == (".hidden/", "a/")
            assert (await read(store, "a/c.tar"))[0] == b"a/c.tar"
            head = await store.head("a/b")
            assert (head.size, head.checksum, dict(head.user)) == (3, None, {})
            assert head.modified == (root / "a/b").stat().st_mtime_ns / 1e9

    run(story())


# Links


@pytest.fixture
def linked(root: Path) -> Path:
    write(root / "real" / "file", b"real")
    (root / "file-link").symlink_to("real/file")
    (root / "folder-link").symlink_to("real")
    (root / "out-link").symlink_to("../outside/secret")
    (root / "out-folder").symlink_to("../outside")
    (root / "absolute").symlink_to(root.parent / "outside")
    (root / "dangling").symlink_to("nowhere")
    (root / "self").symlink_to("self")
    (root / "real" / "up").symlink_to("..")
    return root


LINKED_KEYS = ["file-link", "folder-link/file", "out-link", "out-folder/secret", "absolute/secret"]


def test_links_are_not_there_unless_they_are_followed(linked: Path) -> None:
    async def story() -> None:
        async with open_directory(linked) as store:
            assert await all_keys(store) == ["real/file"]
            for key in (*LINKED_KEYS, "dangling", "self", "real/up/real/file"):
                for call in (store.open(key), store.head(key), store.delete(key, conditions=NOTHING)):
                    with pytest.raises(ObjectNotFound):
                        await call
            with pytest.raises(ObjectNotFound, match="links = follow"):
                await store.head("file-link")

    run(story())


def test_followed_links_are_what_they_lead_to_and_circles_end(linked: Path) -> None:
    async def story() -> None:
        async with open_directory(linked, links="follow") as store:
            keys = await all_keys(store)
            assert keys == in_order(keys)
            assert {*LINKED_KEYS, "real/file"} <= set(keys)
            assert len(keys) < 20
            for key in keys:
                assert (await read(store, key))[0] in (b"real", b"secret")
            for key in ("dangling", "self"):
                with pytest.raises(ObjectNotFound):
                    await store.head(key)
            assert keys_on(await page_of(store, prefix="folder-link/", limit=1)) == ["folder-link/file"]

    run(story())


def test_what_followed_links_lead_to_is_listed_as_it_is_now(root: Path) -> None:
    """The folder of the links does not change when their targets do."""
    outside = root.parent / "outside"
    (root / "coming").symlink_to(outside / "later")
    (root / "going").symlink_to(outside / "secret")
    settle(root)

    async def story() -> None:
        async with open_directory(root, links="follow") as store:
            assert await all_keys(store) == ["going"]
            write(outside / "later", b"here")
            (outside / "secret").unlink()
            assert await all_keys(store) == ["coming"]
            (outside / "later").unlink()
            write(outside / "later" / "file", b"here")
            assert await all_keys(store) == ["coming/file"]

    run(story())


def test_a_write_never_leaves_the_tree_through_a_link(linked: Path) -> None:
    async def story() -> None:
        async with open_directory(linked) as store:
            for key in (*LINKED_KEYS, "out-folder/new", "absolute/new/deep", "dangling", "dangling/x", "self"):
                with pytest.raises(Conflict):
                    await put(store, key, b"written")
            outside = linked.parent / "outside"
            assert [path.name for path in outside.iterdir()] == ["secret"]
            assert (outside / "secret").read_bytes() == b"secret"
            assert (linked / "file-link").is_symlink()
            assert not (linked.parent / "nowhere").exists()
            assert await all_keys(store) == ["real/file"]

    run(story())


def test_a_write_over_a_followed_link_takes_the_links_place(linked: Path) -> None:
    async def story() -> None:
        async with open_directory(linked, links="follow") as store:
            await put(store, "out-link", b"written")
            assert not (linked / "out-link").is_symlink()
            assert (linked.parent / "outside" / "secret").read_bytes() == b"secret"
            await put(store, "out-folder/new", b"written")
            assert (linked.parent / "outside" / "new").read_bytes() == b"written"

    run(story())


# What is no file


def test_pipes_sockets_and_devices_are_not_served_and_not_touched(root: Path) -> None:
    async def story() -> None:
        write(root / "file")
        os.mkfifo(root / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(root / "socket"))
            with contextlib.suppress(PermissionError):
                os.mknod(root / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            async with open_directory(root) as store:
                assert await all_keys(store) == ["file"]
                for name in ("pipe", "socket", "device"):
                    for call in (store.open(name), store.head(name), store.delete(name, conditions=NOTHING)):
                        with pytest.raises(ObjectNotFound):
                            await call
                    if (root / name).exists():
                        with pytest.raises(Conflict, match="left alone"):
                            await put(store, name, b"x")
        assert stat.S_ISFIFO((root / "pipe").stat().st_mode)

    run(story())


def test_a_pipes_writer_is_not_woken(root: Path) -> None:
    """Opening a pipe to see what it is would let its writer go on, into nothing."""

    async def story() -> None:
        os.mkfifo(root / "pipe")
        woken = asyncio.get_running_loop().run_in_executor(None, os.open, root / "pipe", os.O_WRONLY)
        async with open_directory(root) as store:
            for _ in range(50):
                with pytest.raises(ObjectNotFound):
                    await store.head("pipe")
            assert not woken.done()
        reader = os.open(root / "pipe", os.O_RDONLY)
        os.close(await woken)
        os.close(reader)

    run(story())


# Names


@pytest.mark.parametrize(
    "key", ["a//b", "/a", "a/", ".", "..", "../outside/secret", "a/../../outside/secret", "a/.", "x" * 256, "é" * 128]
)
def test_a_key_that_no_file_can_have_is_refused_and_never_rewritten(root: Path, key: str) -> None:
    async def story() -> None:
        write(root / "a" / "b")
        async with open_directory(root) as store:
            for call in (
                store.open(key),
                store.head(key),
                put(store, key, b"x"),
                store.delete(key, conditions=NOTHING),
            ):
                with pytest.raises(BadRequest):
                    await call
            assert await all_keys(store) == ["a/b"]

    run(story())


def test_names_that_are_no_keys_are_left_out(root: Path) -> None:
    async def story() -> None:
        write(root / "good")
        for name in (b"latin-\xe9", b"line\nbreak", b"bell\x07", b"delete\x7f", b".shardmill-0123456789abcdef"):
            with open(os.fsencode(root) + b"/" + name, "wb"):
                pass
        deep = root
        for _ in range(6):
            deep = deep / ("d" * 200)
            deep.mkdir()
            write(deep / "file")
        async with open_directory(root) as store:
            keys = await all_keys(store)
            assert "good" in keys
            assert len(keys) == 6
            assert max(len(key.encode()) for key in keys) <= MAX_KEY
            for key in keys:
                await store.head(key)
            with pytest.raises(BadRequest, match="uploads in progress"):
                await store.head(".shardmill-0123456789abcdef")

    run(story())


# Versions


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 2000),
        lambda path: path.write_bytes(b"y" * 1000),
        lambda path: os.truncate(path, 10),
        os.utime,
        lambda path: path.chmod(0o600),
    ],
    ids=["grown", "overwritten", "cut", "touched", "mode"],
)
def test_a_file_that_changes_under_its_reader_ends_the_answer(root: Path, change: Callable[[Path], object]) -> None:
    async def story() -> None:
        path = write(root / "file", b"x" * 1000)
        os.utime(path, ns=(10**18, 10**18))
        async with open_directory(root) as store:
            source = await store.open("file")
            await source.ensure(0, 1000)
            await source.check_unchanged()
            change(path)
            with pytest.raises(Conflict, match="changed while it was read; read it again"):
                await source.check_unchanged()
            source.close()
            assert (await store.head("file")).etag != source.meta.etag

    run(story())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: os.replace(write(path.with_name("new"), b"other"), path),
        lambda path: os.link(path, path.with_name("other")),
        lambda path: path.parent.rename(path.parent.with_name("moved")),
    ],
    ids=["removed", "replaced", "linked", "folder moved"],
)
def test_a_file_that_only_its_name_changed_is_read_to_its_end(root: Path, change: Callable[[Path], object]) -> None:
    async def story() -> None:
        path = write(root / "folder" / "file", b"x" * 1000)
        async with open_directory(root) as store:
            source = await store.open("folder/file")
            change(path)
            await source.check_unchanged()
            assert os.pread(source.descriptor, 2000, 0) == b"x" * 1000
            source.close()

    run(story())


def test_the_listing_shows_a_change_that_comes_right_after_it(root: Path) -> None:
    """Within one tick of the clock the folder's time may stay the same."""

    async def story() -> None:
        async with open_directory(root) as store:
            present: list[str] = []
            for number in range(300):
                key = f"{number:03d}"
                write(root / key)
                present.append(key)
                assert await all_keys(store) == present
                if number % 3 == 0:
                    (root / present.pop(0)).unlink()
                    assert await all_keys(store) == present

    run(story())


# Listings of large and of any folders


@pytest.mark.parametrize("window", [2, 3, 50, 100_000])
def test_a_folder_larger_than_what_is_held_at_once_is_listed_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(walks, "WINDOW", window)

    async def story() -> None:
        numbers = list(range(300))
        random.Random(1).shuffle(numbers)
        for number in numbers:
            write(root / "flat" / (f"{number:03d}" if number % 3 else f"{number:03d}/inner"))
        write(root / "after")
        await asyncio.to_thread(settle, root / "flat", root)
        keys = [f"flat/{number:03d}" + ("" if number % 3 else "/inner") for number in range(300)]
        async with open_directory(root) as store:
            for limit in (7, 1000):
                assert await all_keys(store, limit=limit) == ["after", *in_order(keys)]
            for after in ("flat/150", "flat/150/inner", "flat/150/zz", "flat/1500", "flat/", "flat/299"):
                later = [key for key in in_order(keys) if key.encode() > after.encode()]
                assert keys_on(await page_of(store, prefix="flat/", after=after, limit=5)) == later[:5]

    run(story())


def test_names_are_read_once_until_the_folder_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        write(root / "flat" / f"{number:03d}")
    read: list[bytes] = []
    as_ever = Walk._read

    def counted(walk: Walk, folder: int, low: bytes) -> walks._Window:
        read.append(low)
        return as_ever(walk, folder, low)

    monkeypatch.setattr(Walk, "_read", counted)

    async def story() -> None:
        async with open_directory(root) as store:
            await asyncio.to_thread(settle, root, root / "flat")
            await all_keys(store, limit=10)
            assert len(read) == 2  # the root and the folder
            await page_of(store, prefix="flat/2", after="flat/250", limit=10)
            assert len(await all_keys(store, limit=1000)) == 500
            assert len(read) == 2
            (root / "flat" / "999").touch()
            assert len(await all_keys(store, limit=1000)) == 501
            assert len(read) == 3
            # A name that goes, and the folder's own time put back: only the time of its inode tells.
            before = (root / "flat").stat()
            (root / "flat" / "000").unlink()
            os.utime(root / "flat", ns=(before.st_atime_ns, before.st_mtime_ns))
            assert len(await all_keys(store, limit=1000)) == 500

    run(story())


def test_names_are_listed_as_they_are_where_times_of_folders_tell_nothing(root: Path) -> None:
    write(root / "first")
    settle(root)
    before = root.stat()

    async def story() -> None:
        async with open_directory(root, is_made_up=True) as store:
            assert not store.is_keeping
            assert await all_keys(store) == ["first"]
            write(root / "second")
            with pytest.MonkeyPatch.context() as patch:
                real = os.fstat
                inode = before.st_ino
                patch.setattr(os, "fstat", lambda file: before if real(file).st_ino == inode else real(file))
                assert await all_keys(store) == ["first", "second"]

    run(story())


def test_memory_for_a_huge_folder_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "WINDOW", 200)
    monkeypatch.setattr(walks, "KEPT", 100_000)
    count = 4000
    for number in range(count):
        (root / f"{number * 7919 % count:05d}{'n' * 200}").touch()

    async def story() -> None:
        await asyncio.to_thread(settle, root)
        async with open_directory(root) as store:
            tracemalloc.start()
            try:
                seen = 0
                after: str | None = ""
                while after is not None:
                    page = await page_of(store, after=after, limit=100)
                    seen += len(page.objects)
                    after = page.next
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert seen == count
            # All names at once are 1 MB; two windows and a page with its metadata are a quarter of that.
            assert peak < 500_000

    run(story())


NAMES = st.sampled_from(["a", "a.", "a0", "b", "é", ".", "-", "ab"]).map(
    lambda name: name.replace(".", "._") if name == "." else name
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    paths=st.lists(st.lists(NAMES, min_size=1, max_size=4).map("/".join), max_size=15),
    bound=st.text(alphabet="ab./0é-_", max_size=6),
    window=st.integers(2, 4),
)
def test_a_walk_from_any_key_is_the_sorted_rest(tmp_path: Path, paths: list[str], bound: str, window: int) -> None:
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    present = set()
    for path in paths:
        with contextlib.suppress(OSError):  # a file stands where a folder should
            write(root / path)
            present.add(path)
    present = {path for path in present if (root / path).is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walks, "WINDOW", window)
        walk = Walk(Tree(os.fsencode(root), follows=False), is_hidden=lambda _: False)
        for _ in range(2):
            found = [key.decode() for key, at in walk.seek(bound.encode()) if walk.status(at) is not None]
            assert found == [key for key in in_order(present) if key.encode() >= bound.encode()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(paths=st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=12), limit=st.integers(1, 4))
def test_pages_with_prefix_and_delimiter_are_the_rule(tmp_path: Path, paths: list[str], limit: int) -> None:
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path in paths:
        with contextlib.suppress(OSError):
            write(root / path)
    present = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]

    async def story() -> None:
        async with open_directory(root) as store:
            for prefix in ("", "a", "a/", "a0/", "é/a"):
                found: list[str] = []
                after: str | None = ""
                while after is not None:
                    page = await page_of(store, prefix=prefix, delimiter="/", after=after, limit=limit)
                    found += in_order([*keys_on(page), *page.prefixes])
                    after = page.next
                assert found == entries(present, prefix, "/")

    run(story())


# Failures


def test_what_cannot_be_read_is_a_failure_and_no_absence(root: Path) -> None:
    async def story() -> None:
        write(root / "file").chmod(0)
        write(root / "closed" / "file")
        (root / "closed").chmod(0)
        try:
            with common_threads() as threads:
                store = DirectoryStore(
                    DIRECTORY, root, links="refuse", threads=threads, is_durable=True, shelf=Shelf(16)
                )
                for key in ("file", "closed/file"):
                    for call in (store.open(key), store.head(key), put(store, key, b"x")):
                        with pytest.raises(ServerError, match="Permission denied") as failed:
                            await call
                        assert str(root) not in str(failed.value)
                for prefix in ("", "closed/"):
                    with pytest.raises(ServerError, match="Permission denied"):
                        await page_of(store, prefix=prefix)
                # What needs not be entered is listed.
                assert (await page_of(store, delimiter="/", limit=5, after="closed/")).objects[0].key == "file"
        finally:
            (root / "closed").chmod(0o755)

    run(story())


def test_a_directory_that_has_gone_is_a_failure_and_no_absence(root: Path) -> None:
    async def story() -> None:
        write(root / "file")
        async with open_directory(root) as store:
            await store.head("file")
            root.rename(root.with_name("elsewhere"))
            for call in (
                store.open("file"),
                store.head("file"),
                page_of(store),
                put(store, "file", b"x"),
                store.delete("file", conditions=NOTHING),
            ):
                with pytest.raises(ServerError):
                    await call
            root.with_name("elsewhere").rename(root)
            await store.head("file")

    run(story())


def test_too_many_open_files_mean_ask_again(root: Path) -> None:
    async def story() -> None:
        write(root / "folder" / "file")
        async with open_directory(root) as store:
            await store.head("folder/file")
            with no_descriptors():
                for call in (store.open("folder/file"), page_of(store), put(store, "new", b"x")):
                    with pytest.raises(Busy):
                        await call
            assert await all_keys(store) == ["folder/file"]

    run(story())


def test_a_full_disk_leaves_the_old_file(root: Path) -> None:
    async def story() -> None:
        with small_disk(root / "disk", "8m") as is_small:
            async with open_directory(root / "disk") as store:
                await put(store, "old", b"old")
                if is_small:
                    for size in (None, 64 << 20):
                        with pytest.raises(InsufficientStorage):
                            await put(store, "old", pieces(bytes(64 << 20)), size=size)
                    fill(root / "disk" / "filler")
                    with pytest.raises(InsufficientStorage):
                        await put(store, "old", b"new")
                else:
                    with write_limit(1000), pytest.raises(InsufficientStorage):
                        await put(store, "old", bytes(2000))
                assert (await read(store, "old"))[0] == b"old"
                await store.delete("old", conditions=NOTHING)
                assert [name for name in os.listdir(root / "disk") if name != "filler"] == []

    run(story())


# Writes


def test_a_file_and_a_folder_of_one_name_are_a_conflict(root: Path) -> None:
    async def story() -> None:
        async with open_directory(root) as store:
            await put(store, "a", b"file")
            await put(store, "b/c", b"below")
            for key in ("a/x", "a/x/y", "b"):
                with pytest.raises(Conflict, match="cannot hold both"):
                    await put(store, key, b"x")
            assert await all_keys(store) == ["a", "b/c"]
            assert (await read(store, "a"))[0] == b"file"

    run(story())


def test_folders_come_and_go_with_their_files(root: Path) -> None:
    async def story() -> None:
        (root / "kept" / "by" / "hand").mkdir(parents=True)
        async with open_directory(root) as store:
            await put(store, "a/b/c/one", b"x")
            await put(store, "a/two", b"x")
            await store.delete("a/b/c/one", conditions=NOTHING)
            assert sorted(path.name for path in (root / "a").iterdir()) == ["two"]
            await store.delete("a/two", conditions=NOTHING)
            assert [path.name for path in root.iterdir()] == ["kept"]
            await put(store, "a", b"now a file")
            assert (root / "kept" / "by" / "hand").is_dir()

    run(story())


def test_a_folder_that_is_emptied_while_another_file_comes_loses_none(root: Path) -> None:
    async def story() -> None:
        async with open_directory(root, is_durable=False) as store:

            async def come_and_go(name: str) -> None:
                for _ in range(60):
                    await put(store, f"folder/{name}", name.encode())
                    assert (await read(store, f"folder/{name}"))[0] == name.encode()
                    await store.delete(f"folder/{name}", conditions=NOTHING)

            await asyncio.gather(*[come_and_go(name) for name in "abcd"])
            assert list(root.iterdir()) == []

    run(story())


def test_a_folder_on_another_file_system_is_a_conflict_with_the_reason(root: Path) -> None:
    async def story() -> None:
        with small_disk(root / "mounted", "2m") as is_small:
            async with open_directory(root) as store:
                if is_small:
                    with pytest.raises(Conflict, match="another file system"):
                        await put(store, "mounted/file", b"x")
                    write(root / "mounted" / "file", b"there")
                else:
                    await put(store, "mounted/file", b"there")
                assert (await read(store, "mounted/file"))[0] == b"there"
                assert os.listdir(root) == ["mounted"]

    run(story())


def test_the_steps_of_a_put_are_in_the_durable_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def call(
            first: int | bytes, *rest: object, name: str = name, real: Callable[..., object] = real, **named: object
        ) -> object:
            what = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(rest[0])
            steps.append(f"{name} {'upload' if '.shardmill-' in what else os.path.relpath(what, root)}")
            return real(first, *rest, **named)

        monkeypatch.setattr(os, name, call)

    async def story() -> None:
        async with open_directory(root) as store:
            await put(store, "a/b/file", b"x")
            assert steps[:2] == ["fsync upload", f"rename {os.path.relpath(str(b'file'), root)}"]
            assert steps[2:] == ["fsync a/b", "fsync a", "fsync ."]

    run(story())


def test_uploads_of_killed_nodes_are_swept_and_those_that_go_on_are_not(root: Path) -> None:
    async def story() -> None:
        is_waiting, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield bytes(2 << 20)
            is_waiting.set()
            await go_on.wait()

        write(root / ".shardmill-0123456789abcdef", b"half")
        write(root / "folder" / ".shardmill-not-one-of-ours", b"kept")
        async with open_directory(root) as store, open_directory(root) as other:
            upload = asyncio.ensure_future(put(store, "slow", slow()))
            await is_waiting.wait()
            other.sweep()
            assert not (root / ".shardmill-0123456789abcdef").exists()
            assert (root / "folder" / ".shardmill-not-one-of-ours").exists()
            go_on.set()
            await upload
            assert (await read(store, "slow"))[0] == bytes(2 << 20)

    run(story())


def test_user_metadata_that_is_no_json_is_left_out(root: Path) -> None:
    async def story() -> None:
        path = write(root / "file")
        async with open_directory(root) as store:
            for value in (b"", b"\xff", b"[1]", b"{") if keeps_attributes() else ():
                os.setxattr(path, "user.shardmill.meta", value)
                assert dict((await store.head("file")).user) == {}

    run(story())
