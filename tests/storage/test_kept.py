"""Objects kept open: never one that was changed, never more than the bound, and nothing for ever."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shardmill.core.conditions import Conditions
from shardmill.core.errors import ObjectNotFound
from shardmill.core.kept import Kept
from shardmill.core.meta import ObjectMeta
from shardmill.core.sources import WriteStore
from shardmill.storage.kept import KeptKeys, Shelf
from shardmill.storage.pool import PoolStore
from tests.storage.support import open_directory, open_pool, run

NOTHING = Conditions()


class Opened:
    """What a store opens, without a file."""

    descriptor = -1
    is_whole = True

    def __init__(self, key: str) -> None:
        self.meta = ObjectMeta(key, 1, None, "1", 0.0)
        self.is_closed = False

    async def ensure(self, start: int, stop: int) -> None: ...

    async def ensure_some(self, start: int, stop: int) -> int:
        return stop

    def release(self, position: int) -> None: ...

    async def check_unchanged(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


async def opened(source: Opened, gate: asyncio.Event | None = None) -> Opened:
    if gate is not None:
        await gate.wait()
    return source


async def missing() -> Opened:
    raise ObjectNotFound("no object")


async def keep(keys: KeptKeys, key: str) -> tuple[Kept, Opened]:
    source = Opened(key)
    kept = await keys.open(key, opened(source), lambda _: lambda start, stop: True)
    assert kept is not None
    return kept, source


def test_what_is_kept_is_handed_out_until_it_changes() -> None:
    async def story() -> None:
        keys = KeptKeys(Shelf(8))
        kept, source = await keep(keys, "a")
        assert keys.get("a") is kept
        with keys.changing("a"):
            assert keys.get("a") is None
            assert not kept.is_current
            assert source.is_closed
        assert keys.get("a") is None

    run(story())


def test_an_opening_that_a_change_crossed_is_not_kept() -> None:
    async def story() -> None:
        keys = KeptKeys(Shelf(8))
        for ends_first in (True, False):
            gate, source = asyncio.Event(), Opened("a")
            opening = asyncio.ensure_future(keys.open("a", opened(source, gate), lambda _: lambda start, stop: True))
            await asyncio.sleep(0)
            with keys.changing("a"):
                if not ends_first:
                    gate.set()
                    assert await opening is None
            gate.set()
            assert await opening is None
            assert source.is_closed
            assert keys.get("a") is None

    run(story())


def test_that_there_is_no_object_is_kept_until_there_is_one() -> None:
    async def story() -> None:
        keys = KeptKeys(Shelf(8))
        kept = await keys.open("a", missing(), lambda _: lambda start, stop: True)
        assert kept is not None
        assert isinstance(kept.absent, ObjectNotFound)
        assert keys.get("a") is kept
        with keys.changing("a"):
            pass
        assert not kept.is_current

    run(story())


def test_a_lease_keeps_the_descriptor_of_what_has_left() -> None:
    async def story() -> None:
        keys = KeptKeys(Shelf(8))
        kept, source = await keep(keys, "a")
        kept.lease()
        keys.drop("a")
        assert not source.is_closed
        kept.release()
        assert source.is_closed

    run(story())


def test_the_bound_holds_over_all_stores_and_what_is_used_stays() -> None:
    async def story() -> None:
        shelf = Shelf(4)
        first, second = KeptKeys(shelf), KeptKeys(shelf)
        used, _ = await keep(first, "used")
        for number in range(20):
            used.is_used = True
            kept, _ = await keep(second if number % 2 else first, str(number))
            kept.is_used = False
            assert len(shelf) <= 4
        assert first.get("used") is used

    run(story())


def test_what_nobody_asked_for_between_two_sweeps_is_closed() -> None:
    async def story() -> None:
        shelf = Shelf(4)
        keys = KeptKeys(shelf)
        kept, source = await keep(keys, "a")
        shelf.sweep()
        assert keys.get("a") is kept
        shelf.sweep()
        assert keys.get("a") is None
        assert source.is_closed

    run(story())


def test_a_closed_store_keeps_nothing_more() -> None:
    async def story() -> None:
        keys = KeptKeys(Shelf(4))
        await keep(keys, "a")
        keys.close()
        assert keys.get("a") is None
        assert await keys.open("a", opened(Opened("a")), lambda _: lambda start, stop: True) is None

    run(story())


async def put(store: WriteStore, key: str, data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield data

    await store.put(key, body(), size=len(data), user={}, conditions=NOTHING, checksum=None)


@asynccontextmanager
async def pool(tmp_path: Path) -> AsyncIterator[PoolStore]:
    async with open_pool(tmp_path / "data", durability="kill") as store:
        yield store


def test_a_stored_object_is_kept_until_it_is_replaced_or_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with pool(tmp_path) as store:
            absent = await store.keep("k")
            assert absent is not None
            assert absent.source is None
            await put(store, "k", b"one")
            assert not absent.is_current
            kept = await store.keep("k")
            assert kept is not None
            assert kept.source is not None
            assert os.pread(kept.source.descriptor, 3, 0) == b"one"
            await put(store, "k", b"two")
            assert not kept.is_current
            again = await store.keep("k")
            assert again is not None
            await store.delete("k", conditions=NOTHING)
            assert not again.is_current

    run(story())


def test_blocks_are_ready_once_they_are_verified(tmp_path: Path) -> None:
    async def story() -> None:
        async with pool(tmp_path) as store:
            await put(store, "k", bytes(3 << 20))
            kept = await store.keep("k")
            assert kept is not None
            assert kept.source is not None
            assert kept.is_ready is not None
            assert not kept.is_ready(0, 1)
            await kept.source.ensure(1 << 20, (1 << 20) + 1)
            assert [kept.is_ready(start, start + 1) for start in (0, 1 << 20, 2 << 20)] == [False, True, False]
            await kept.source.ensure(0, 3 << 20)
            assert kept.is_ready(0, 3 << 20)

    run(story())


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"12")
    os.rename(other, path)


def overwrite(path: Path) -> None:
    path.write_bytes(b"123")


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def lead_elsewhere(path: Path) -> None:
    """The folder is a link to where the folder was moved: the same file, by a way that is not taken."""
    moved = path.parent.with_name("moved")
    os.rename(path.parent, moved)
    path.parent.symlink_to(moved)


@pytest.mark.parametrize("change", [remove, replace, overwrite, touch, lead_elsewhere])
def test_a_file_that_is_changed_by_hand_is_noticed(tmp_path: Path, change: object) -> None:
    async def story() -> None:
        (tmp_path / "sub").mkdir()
        path = tmp_path / "sub" / "file"
        path.write_bytes(b"12")
        async with open_directory(tmp_path) as store:
            kept = await store.keep("sub/file")
            assert kept is not None
            assert kept.is_there is not None
            assert kept.is_there()
            assert callable(change)
            change(path)
            assert not kept.is_there()
            kept.leave()

    run(story())


def test_a_file_that_appears_is_noticed_and_a_root_that_is_gone_is_no_absence(tmp_path: Path) -> None:
    async def story() -> None:
        root = tmp_path / "root"
        root.mkdir()
        async with open_directory(root) as store:
            absent = await store.keep("sub/file")
            assert absent is not None
            assert absent.is_there is not None
            assert absent.is_there()
            (root / "sub").mkdir()
            assert absent.is_there()
            (root / "sub" / "file").write_bytes(b"")
            assert not absent.is_there()
            (root / "sub" / "file").unlink()
            assert absent.is_there()
            os.rename(root, tmp_path / "away")
            assert not absent.is_there()

    run(story())
