"""The index: keys in order whatever their length, complete after any end of the process, thrown away if it is not."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardmill.core.errors import Busy, InsufficientStorage, ServerError
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.storage import index as indexes
from shardmill.storage.index import Index
from shardmill.testing.stores import entries, in_order, keys_on
from tests.storage.full_disk import fill, small_disk
from tests.storage.support import run

STORE, OTHER = "00" * 8, "ff" * 8
LONG = "k" * 487
Objects = dict[tuple[str, str], ObjectMeta]


def meta_of(key: str, size: int = 1) -> ObjectMeta:
    return ObjectMeta(
        key, size, "e" * 32, f"v{size}-{'e' * 32}", 1.5, f"xxh3:{'e' * 32}", {"n": "v"} if size > 1 else {}
    )


@asynccontextmanager
async def open_index(
    directory: Path,
    objects: Objects | None = None,
    *,
    is_new: bool = False,
    notes: Iterable[tuple[str, str]] = (),
    scan: Callable[[], Iterator[tuple[str, ObjectMeta]]] | None = None,
) -> AsyncIterator[Index]:
    """An index over `objects`, as the files would tell them."""
    files = objects if objects is not None else {}

    def look(store: str, key: str) -> ObjectMeta | None:
        return files.get((store, key))

    def tell() -> Iterator[tuple[str, ObjectMeta]]:
        return iter([(store, meta) for (store, _), meta in files.items()])

    with ThreadPoolExecutor(4) as threads:
        index = await Index.open(directory, threads, is_new=is_new, notes=notes, look=look, scan=scan or tell)
        try:
            yield index
        finally:
            await index.close()


async def page(
    index: Index, store: str = STORE, *, prefix: str = "", delimiter: str = "", after: str = "", limit: int = 1000
) -> ListPage:
    return await index.list(store, prefix=prefix, delimiter=delimiter, after=after, limit=limit)


async def all_keys(index: Index, store: str = STORE, *, limit: int = 1000) -> list[str]:
    await index.wait_complete()
    assert index.is_complete
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        here = await page(index, store, after=after, limit=limit)
        found += keys_on(here)
        after = here.next
    return found


def forget_boot(directory: Path) -> None:
    """Make it look as after a power cut: written in an earlier boot, and not closed."""
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "boot": "another", "clean": False}))


def test_entries_say_what_was_stored(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_index(tmp_path / "i", is_new=True) as index:
            assert index.is_complete
            assert await index.is_empty(STORE)
            for meta in (meta_of("a", 5), meta_of(LONG + "x" * 500, 7)):
                await index.put(STORE, meta)
                assert (await page(index, prefix=meta.key)).objects == (meta,)
            await index.put(STORE, meta_of("a", 6))
            assert (await page(index)).objects[0] == meta_of("a", 6)
            assert not await index.is_empty(STORE)
            assert await index.is_empty(OTHER)
            await index.remove(STORE, "a")
            await index.remove(STORE, "never there")
            assert await all_keys(index) == [LONG + "x" * 500]

    run(story())


def test_it_is_complete_again_when_it_was_closed(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_index(tmp_path / "i", is_new=True) as index:
            await index.put(STORE, meta_of("a"))
        async with open_index(tmp_path / "i", scan=lambda: pytest.fail("it was scanned")) as index:
            assert index.is_complete
            assert await all_keys(index) == ["a"]

    run(story())


def test_stores_do_not_see_each_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_index(tmp_path / "i", is_new=True) as index:
            middle = "7f" * 8
            for store in (STORE, middle, OTHER):
                for number in range(1500):
                    await index.put(store, meta_of(f"{number:05d}")) if number % 500 == 0 else None
            await asyncio.gather(*[index.put(middle, meta_of(f"{number:05d}")) for number in range(1500)])
            await index.forget_store(middle)
            assert await all_keys(index, middle) == []
            assert await all_keys(index, STORE) == await all_keys(index, OTHER) == ["00000", "00500", "01000"]

    run(story())


@pytest.mark.parametrize("tied", [2, 1000])
def test_keys_that_are_cut_at_one_place_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: int
) -> None:
    """Longer than LMDB's 511 bytes, alike up to where they are cut; some at a time, for bounded memory."""
    monkeypatch.setattr(indexes, "_TIED", tied)

    async def story() -> None:
        keys = [LONG, LONG[:-1], LONG[:-1] + "j", LONG[:-1] + "l", LONG + "/", LONG + "é" * 200, "k", "z"]
        keys += [f"{LONG}/{number:03d}" for number in range(20)] + [f"{LONG}{number:02d}" for number in range(20)]
        keys += [f"{LONG[:-1]}j{number}" for number in range(5)] + [f"{LONG[:-1]}l{number}" for number in range(5)]
        async with open_index(tmp_path / "i", is_new=True) as index:
            await asyncio.gather(*[index.put(STORE, meta_of(key)) for key in keys])
            for limit in (1, 3, 1000):
                assert await all_keys(index, limit=limit) == in_order(keys)
            for prefix in (LONG, LONG + "/", LONG + "1", LONG[:-1]):
                for delimiter in ("", "/"):
                    here = await page(index, prefix=prefix, delimiter=delimiter)
                    assert in_order([*keys_on(here), *here.prefixes]) == entries(keys, prefix, delimiter)
            for after in (LONG + "/010", LONG + "10", LONG, LONG[:-1] + "j3"):
                assert keys_on(await page(index, after=after)) == [key for key in in_order(keys) if key > after]

    run(story())


def test_notes_of_changes_that_were_on_their_way_complete_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_index(tmp_path / "i", is_new=True) as index:
            for key in ("replaced", "removed", "kept"):
                await index.put(STORE, meta_of(key))
        files = {
            (STORE, "replaced"): meta_of("replaced", 9),
            (STORE, "new"): meta_of("new"),
            (STORE, "kept"): meta_of("kept"),
        }
        notes = [(STORE, key) for key in ("replaced", "removed", "new", "never stored")]
        async with open_index(tmp_path / "i", files, notes=notes) as index:
            assert await all_keys(index) == ["kept", "new", "replaced"]
            assert (await page(index, prefix="replaced")).objects[0].size == 9

    run(story())


def test_a_note_whose_file_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    """A failure is not an absence, and no reason not to start."""

    async def story() -> None:
        async with open_index(tmp_path / "i", is_new=True) as index:
            await index.put(STORE, meta_of("unreadable"))

        def look(store: str, key: str) -> ObjectMeta | None:
            raise ServerError("the disk failed")

        with ThreadPoolExecutor(2) as threads:
            index = await Index.open(
                tmp_path / "i", threads, is_new=False, notes=[(STORE, "unreadable")], look=look, scan=list
            )
            assert await all_keys(index) == ["unreadable"]
            await index.close()

    run(story())


@pytest.mark.parametrize(
    "loss", ["power cut", "deleted", "no state", "strange state", "older format", "no database", "garbage", "cut"]
)
def test_it_is_built_again_when_it_cannot_be_trusted(tmp_path: Path, loss: str) -> None:
    async def story() -> None:
        directory = tmp_path / "i"
        async with open_index(directory, is_new=True) as index:
            for number in range(300):
                await index.put(STORE, meta_of(f"stale/{number}"))
        if loss == "power cut":
            forget_boot(directory)
        elif loss == "deleted":
            shutil.rmtree(directory)
        elif loss == "no state":
            (directory / "state.json").unlink()
        elif loss == "strange state":
            (directory / "state.json").write_bytes(b"\xff{")
        elif loss == "older format":
            (directory / "state.json").write_text('{"format": 0, "boot": "x", "clean": true}')
        elif loss == "no database":
            (directory / "db" / "data.mdb").unlink()
        elif loss == "garbage":
            (directory / "db" / "data.mdb").write_bytes(b"garbage!" * 4096)
        else:
            with (directory / "db" / "data.mdb").open("r+b") as file:
                file.truncate(3 * 4096)
        files = {(STORE, key): meta_of(key, 2) for key in ("a", "b")}
        async with open_index(directory, files) as index:
            assert await all_keys(index) == ["a", "b"]
        async with open_index(directory, scan=lambda: pytest.fail("it was scanned")) as index:
            assert await all_keys(index) == ["a", "b"]

    run(story())


def test_a_build_that_was_ended_is_begun_again(tmp_path: Path) -> None:
    """What it has by then is not taken for all."""

    async def story() -> None:
        files = {(STORE, f"{number:05d}"): meta_of(f"{number:05d}") for number in range(2000)}
        has_begun, go_on = threading.Event(), threading.Event()

        def slow() -> Iterator[tuple[str, ObjectMeta]]:
            for count, ((store, _), meta) in enumerate(files.items()):
                yield store, meta
                if count == 1000:
                    has_begun.set()
                    go_on.wait(30)

        for _ in range(2):
            with ThreadPoolExecutor(2) as threads:
                index = await Index.open(
                    tmp_path / "i", threads, is_new=False, notes=(), look=lambda *_: None, scan=slow
                )
                await asyncio.get_running_loop().run_in_executor(None, has_begun.wait, 30)
                assert not index.is_complete
                closing = asyncio.ensure_future(index.close())
                await asyncio.sleep(0)
                go_on.set()
                await closing
            has_begun.clear()
            go_on.clear()
        async with open_index(tmp_path / "i", files) as index:
            assert await all_keys(index) == [key for _, key in files]

    run(story())


def test_changes_during_a_build_win_over_what_the_files_said(tmp_path: Path) -> None:
    async def story() -> None:
        files = {(STORE, key): meta_of(key, 1) for key in ("replaced", "removed", "put back", "untouched")}
        files[OTHER, "of a removed bucket"] = meta_of("of a removed bucket")
        may_go = threading.Event()

        def late() -> Iterator[tuple[str, ObjectMeta]]:
            told = [(store, meta) for (store, _), meta in files.items()]
            may_go.wait(30)
            yield from told

        async with open_index(tmp_path / "i", scan=late) as index:
            with pytest.raises(Busy, match="rebuilt") as busy:
                await page(index)
            assert busy.value.retry_after
            with pytest.raises(Busy):
                await index.is_empty(STORE)
            await index.put(STORE, meta_of("replaced", 2))
            await index.put(STORE, meta_of("new", 2))
            await index.remove(STORE, "removed")
            await index.remove(STORE, "put back")
            await index.put(STORE, meta_of("put back", 2))
            await index.forget_store(OTHER)
            may_go.set()
            assert await all_keys(index) == ["new", "put back", "replaced", "untouched"]
            assert {meta.key: meta.size for meta in (await page(index)).objects} == {
                "new": 2, "put back": 2, "replaced": 2, "untouched": 1
            }  # fmt: skip
            assert await all_keys(index, OTHER) == []

    run(story())


def test_a_full_disk_refuses_what_is_added_and_owes_what_is_removed(tmp_path: Path) -> None:
    async def story() -> None:
        with small_disk(tmp_path / "disk", "4m") as is_small:
            async with open_index(tmp_path / "disk" / "i", is_new=True) as index:
                await index.put(STORE, meta_of("removed"))
                await index.put(STORE, meta_of("kept"))
                if is_small:
                    fill(tmp_path / "disk" / "filler")
                    stored = await put_until_full(index)
                    with pytest.raises(InsufficientStorage):
                        await index.put(STORE, meta_of("x" * 400, 3))
                    try:
                        await index.remove(STORE, "removed")
                    except InsufficientStorage:
                        assert "removed" in await all_keys(index)
                    (tmp_path / "disk" / "filler").unlink()
                    await index.put(STORE, meta_of("later"))
                    assert await all_keys(index) == in_order(["kept", "later", *stored])
                    return
                await index.remove(STORE, "removed")
                assert await all_keys(index) == ["kept"]

    run(story())


async def put_until_full(index: Index) -> list[str]:
    stored: list[str] = []
    while True:
        try:
            await index.put(STORE, meta_of(f"{len(stored):03d}" + "x" * 400))
        except InsufficientStorage:
            return stored
        stored.append(f"{len(stored):03d}" + "x" * 400)


KEYS = st.one_of(
    st.text(alphabet="ab/.é", min_size=1, max_size=4),
    st.text(alphabet="ab/", min_size=1, max_size=3).map(lambda end: LONG + end),
    st.text(alphabet="ab/", min_size=1, max_size=3).map(lambda end: LONG[:-1] + end),
)


class IndexAgainstADictionary(RuleBasedStateMachine):
    """Any order of changes, closings and losses; the listing is always that of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Objects = {}
        self.runner = asyncio.Runner()
        self.directory = TemporaryDirectory()
        self.path = Path(self.directory.name) / "i"
        self.open_again(is_new=True)

    def open_again(self, *, is_new: bool = False) -> None:
        self.threads = ThreadPoolExecutor(2)

        async def start() -> Index:
            index = await Index.open(
                self.path,
                self.threads,
                is_new=is_new,
                notes=(),
                look=lambda store, key: self.model.get((store, key)),
                scan=lambda: [(store, meta) for (store, _), meta in self.model.items()],
            )
            await index.wait_complete()
            return index

        self.index = self.runner.run(start())

    def close(self) -> None:
        self.runner.run(self.index.close())
        self.threads.shutdown()

    @rule(store=st.sampled_from([STORE, OTHER]), key=KEYS, size=st.integers(1, 9))
    def put(self, store: str, key: str, size: int) -> None:
        self.runner.run(self.index.put(store, meta_of(key, size)))
        self.model[store, key] = meta_of(key, size)

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        store, key = data.draw(st.sampled_from(sorted(self.model)))
        self.runner.run(self.index.remove(store, key))
        del self.model[store, key]

    @rule()
    def forget_store(self) -> None:
        self.runner.run(self.index.forget_store(OTHER))
        self.model = {name: meta for name, meta in self.model.items() if name[0] != OTHER}

    @rule(is_lost=st.booleans())
    def restart(self, is_lost: bool) -> None:
        self.close()
        if is_lost:
            shutil.rmtree(self.path)
        self.open_again()

    @rule(
        store=st.sampled_from([STORE, OTHER]),
        prefix=st.sampled_from(["", "a", "a/", LONG, LONG[:-1], "é"]),
        delimiter=st.sampled_from(["", "/", "b"]),
        after=st.just("") | KEYS,
        limit=st.integers(1, 4),
    )
    def list_pages(self, store: str, prefix: str, delimiter: str, after: str, limit: int) -> None:
        keys = [key for other, key in self.model if other == store]
        expected = [name for name in entries(keys, prefix, delimiter) if name.encode() > after.encode()]
        found: list[str] = []
        start: str | None = after
        while start is not None:
            here = self.runner.run(
                page(self.index, store, prefix=prefix, delimiter=delimiter, after=start, limit=limit)
            )
            assert all(meta == self.model[store, meta.key] for meta in here.objects)
            found += in_order([*keys_on(here), *here.prefixes])
            start = here.next
        assert found == expected

    @invariant()
    def stores_are_empty_or_not(self) -> None:
        for store in (STORE, OTHER):
            assert self.runner.run(self.index.is_empty(store)) is not any(other == store for other, _ in self.model)

    def teardown(self) -> None:
        self.close()
        self.runner.close()
        self.directory.cleanup()


TestIndexAgainstADictionary = IndexAgainstADictionary.TestCase
TestIndexAgainstADictionary.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
