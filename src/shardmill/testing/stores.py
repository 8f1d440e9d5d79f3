"""What every store that can be written promises, as tests that any of them can be given.

Subclass `StoreSuite` in a test module, name the class `Test…` and define `open_store`; pytest does the rest. The
protocols are those of `shardmill.core.sources`.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from shardmill.core.conditions import Conditions, http_date
from shardmill.core.errors import BadRequest, Conflict, ObjectNotFound, PreconditionFailed, ShardmillError
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.core.refs import MAX_KEY
from shardmill.core.sources import PutResult, WriteStore

NOTHING = Conditions()
ABSENT = Conditions.parse({"If-None-Match": "*"})
SIZES = (0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 17)
SECONDS = 60.0  # one test; a store that hangs fails

Story = Callable[[WriteStore], Awaitable[None]]


class StoreSuite(ABC):
    """Tests of one kind of store."""

    holds_any_key: ClassVar[bool] = True
    """False: keys that no file can have are refused as BadRequest or Conflict."""
    keeps_user_metadata: ClassVar[bool] = True
    knows_checksum: ClassVar[bool] = True
    """HEAD tells an xxh3 of the bytes."""
    versions_are_contents: ClassVar[bool] = True
    """The ETag depends on nothing but the bytes."""

    @abstractmethod
    def open_store(self, directory: Path) -> AbstractAsyncContextManager[WriteStore]:
        """An empty store; `directory` is its own."""

    def leftovers(self, directory: Path) -> Sequence[str]:
        """What uploads have left in the directory of a store; empty where that cannot be seen."""
        return ()

    def play(self, directory: Path, story: Story) -> None:
        """Run a story on a fresh store and look for what it left."""

        async def run() -> None:
            async with self.open_store(directory) as store:
                async with asyncio.timeout(SECONDS):
                    await story(store)
                assert list(self.leftovers(directory)) == []

        asyncio.run(run())

    def test_what_is_put_is_read_back(self, tmp_path: Path) -> None:
        """Whole, by range, by HEAD and in the listing; every way says the same of one version."""

        async def story(store: WriteStore) -> None:
            for size in SIZES:
                data = random.Random(size).randbytes(size)
                before = time.time()
                result = await put(store, f"object-{size}", data)
                assert result.created
                assert (result.meta.key, result.meta.size) == (f"object-{size}", size)
                assert result.meta.etag
                assert result.meta.checksum in (None, checksum_of(data))
                head = await store.head(f"object-{size}")
                assert same(head, result.meta)
                assert abs(head.modified - before) < 60
                if self.knows_checksum:
                    assert head.checksum == checksum_of(data)
                (listed,) = (await page_of(store, prefix=f"object-{size}", limit=1)).objects
                assert same(listed, head)
                source = await store.open(f"object-{size}")
                try:
                    assert same(source.meta, head)
                    await source.ensure(0, size)
                    assert os.pread(source.descriptor, size, 0) == data
                    for start, stop in ((0, 1), (size // 2, size // 2 + 10), (max(0, size - 5), size + 5)):
                        await source.ensure(start, stop)
                        assert os.pread(source.descriptor, min(stop, size) - start, start) == data[start:stop]
                    await source.check_unchanged()
                finally:
                    source.close()

        self.play(tmp_path / "store", story)

    def test_what_is_not_there_is_not_found(self, tmp_path: Path) -> None:
        """By any verb; and a prefix or a part of a key is not its object."""

        async def story(store: WriteStore) -> None:
            await put(store, "dir/object", b"x")
            for key in ("missing", "dir", "dir/objec", "dir/object2", "dir/object/below", "DIR/object"):
                for call in (store.open(key), store.head(key), store.delete(key, conditions=NOTHING)):
                    with raising(ObjectNotFound):
                        await call
            assert keys_on(await page_of(store)) == ["dir/object"]

        self.play(tmp_path / "store", story)

    def test_an_object_is_replaced_while_a_reader_keeps_the_old_one(self, tmp_path: Path) -> None:
        """And when it is removed under a reader."""

        async def story(store: WriteStore) -> None:
            await put(store, "key", b"old" * 500_000)
            old = await store.open("key")
            replaced = await put(store, "key", b"new")
            assert not replaced.created
            assert replaced.meta.etag != old.meta.etag
            assert replaced.meta.version != old.meta.version
            new = await store.open("key")
            await store.delete("key", conditions=NOTHING)
            for source, data in ((old, b"old" * 500_000), (new, b"new")):
                await source.ensure(0, len(data))
                assert os.pread(source.descriptor, source.meta.size, 0) == data
                await source.check_unchanged()
                source.close()
                source.close()
            with raising(ObjectNotFound):
                await store.head("key")
            assert keys_on(await page_of(store)) == []
            assert (await put(store, "key", b"again")).created

        self.play(tmp_path / "store", story)

    def test_the_same_bytes_are_another_version(self, tmp_path: Path) -> None:
        """Though their ETag may be the same."""

        async def story(store: WriteStore) -> None:
            first = (await put(store, "key", b"bytes")).meta
            second = (await put(store, "key", b"bytes")).meta
            assert first.version != second.version
            if self.versions_are_contents:
                assert first.etag == second.etag

        self.play(tmp_path / "store", story)

    def test_user_metadata_is_kept_with_its_version(self, tmp_path: Path) -> None:
        """Where the store keeps any."""

        async def story(store: WriteStore) -> None:
            if not self.keeps_user_metadata:
                with raising(BadRequest):
                    await put(store, "key", b"x", user={"name": "value"})
                return
            user = {"name": "value", "other": "värde", "long": "x" * 1900}
            assert dict((await put(store, "key", b"x", user=user)).meta.user) == user
            assert dict((await store.head("key")).user) == user
            await put(store, "key", b"x")
            assert dict((await store.head("key")).user) == {}

        self.play(tmp_path / "store", story)

    def test_a_write_has_conditions(self, tmp_path: Path) -> None:
        """They are judged against what is replaced, which stays if they fail."""

        async def story(store: WriteStore) -> None:
            with raising(PreconditionFailed):
                await put(store, "key", b"never", conditions=Conditions.parse({"If-Match": "*"}))
            assert keys_on(await page_of(store)) == []
            first = (await put(store, "key", b"first", conditions=ABSENT)).meta
            is_first, is_other = (Conditions.parse({"If-Match": f'"{etag}"'}) for etag in (first.etag, "other"))
            unmodified = Conditions.parse({"If-Unmodified-Since": http_date(first.modified - 10)})
            for conditions in (ABSENT, is_other, unmodified):
                with raising(PreconditionFailed):
                    await put(store, "key", b"never", conditions=conditions)
                with raising(PreconditionFailed):
                    await store.delete("key", conditions=conditions)
            assert await read(store, "key") == (b"first", first.etag)
            await put(store, "key", b"second", conditions=is_first)
            with raising(PreconditionFailed):
                await store.delete("key", conditions=is_first)
            assert (await read(store, "key"))[0] == b"second"
            await store.delete("key", conditions=Conditions.parse({"If-Match": "*"}))
            with raising(ObjectNotFound):
                await store.delete("key", conditions=ABSENT)

        self.play(tmp_path / "store", story)

    def test_of_many_who_create_one_object_one_does(self, tmp_path: Path) -> None:
        """And of many who replace one version."""

        async def story(store: WriteStore) -> None:
            async def attempt(number: int, conditions: Conditions) -> bytes | None:
                data = b"%d" % number * 1000
                try:
                    await put(store, "key", data, conditions=conditions)
                except PreconditionFailed:
                    return None
                return data

            for _ in range(3):
                won = [data for data in await asyncio.gather(*[attempt(n, ABSENT) for n in range(20)]) if data]
                assert len(won) == 1
                data, etag = await read(store, "key")
                assert data == won[0]
                same_version = Conditions.parse({"If-Match": f'"{etag}"'})
                won = [
                    data for data in await asyncio.gather(*[attempt(n, same_version) for n in range(20, 40)]) if data
                ]
                assert len(won) == 1
                assert (await read(store, "key"))[0] == won[0]
                await store.delete("key", conditions=NOTHING)

        self.play(tmp_path / "store", story)

    def test_of_many_who_write_at_once_the_last_one_stays_whole(self, tmp_path: Path) -> None:
        """Readers meanwhile see one whole version or another, with its own length and ETag."""

        async def story(store: WriteStore) -> None:
            bodies = [random.Random(number).randbytes(1 + number * 70_001) for number in range(20)]
            wanted = {hashlib.sha256(body).digest() for body in bodies}
            await put(store, "key", bodies[0])
            is_writing = True
            seen = 0

            async def watch() -> None:
                nonlocal seen
                while is_writing:
                    data, _ = await read(store, "key")
                    assert hashlib.sha256(data).digest() in wanted
                    seen += 1

            watchers = [asyncio.ensure_future(watch()) for _ in range(3)]
            results = await asyncio.gather(*[put(store, "key", body) for body in bodies * 2])
            is_writing = False
            await asyncio.gather(*watchers)
            assert seen
            data, etag = await read(store, "key")
            assert data in bodies
            assert etag in {result.meta.etag for result in results}
            (listed,) = (await page_of(store)).objects
            assert same(listed, await store.head("key"))

        self.play(tmp_path / "store", story)

    def test_a_body_that_is_not_what_was_announced_leaves_the_old_object(self, tmp_path: Path) -> None:
        """Shorter, longer, with another checksum, broken off, or its sender gone."""

        async def story(store: WriteStore) -> None:
            await put(store, "key", b"old")
            before = await store.head("key")
            large = bytes(2 << 20)
            for size in (0, 4, 6, 1 << 30):
                with raising(BadRequest):
                    await put(store, "key", b"12345", size=size)
                with raising(BadRequest):
                    await put(store, "new", b"12345", size=size)
            for wrong in (b"", b"1234", b"12346"):
                with raising(BadRequest):
                    await put(store, "key", b"12345", checksum=checksum_of(wrong))
            for body in (broken(b""), broken(large), broken(b"x" * 100)):
                with raising(ConnectionResetError):
                    await put(store, "key", body)
            for data in (b"", large):
                await cancel_amid(store, data)
            assert await store.head("key") == before
            assert await read(store, "key") == (b"old", before.etag)
            assert keys_on(await page_of(store)) == ["key"]
            await put(store, "key", b"12345", size=5, checksum=checksum_of(b"12345"))
            assert (await read(store, "key"))[0] == b"12345"

        self.play(tmp_path / "store", story)

    def test_whoever_asked_may_leave_at_any_moment(self, tmp_path: Path) -> None:
        """The object is then the old one or the new one, the listing says which, and nothing stays open."""

        async def story(store: WriteStore) -> None:
            bodies = {number: b"%d" % number * 5000 for number in range(120)}
            for number, data in bodies.items():
                task = asyncio.ensure_future(put(store, "key", data))
                for _ in range(number % 40):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
                listed = keys_on(await page_of(store))
                if listed:
                    found, etag = await read(store, "key")
                    assert found in bodies.values()
                    assert (await page_of(store)).objects[0].etag == etag
                else:
                    with raising(ObjectNotFound):
                        await store.head("key")
                opening = asyncio.ensure_future(store.open("key"))
                for _ in range(number % 10):
                    await asyncio.sleep(0)
                opening.cancel()
                await asyncio.wait([opening])
                if not opening.cancelled() and opening.exception() is None:
                    opening.result().close()

        self.play(tmp_path / "store", story)

    def test_a_key_is_kept_exactly(self, tmp_path: Path) -> None:
        """Or, where no file can have it, refused."""

        async def story(store: WriteStore) -> None:
            plain = [
                "a b", "a+b", "a%2Fb", "a%", "#", "?", "&", "$HOME", "{0..3}", "*", "~", "-rf", "'", '"', "\\", ":",
                "\u00e9", "e\u0301", "\U0001f642", "A", "a.tar", ".hidden", "...", "a" * 255, "CON", "dir/" * 50 + "x",
                "/".join(["k" * 200] * 5), "x" * 254 + "/" + "é" * 127,
            ]  # fmt: skip
            odd = [
                "a//b",
                "/a",
                "b/",
                ".",
                "..",
                "../a",
                "a/./b",
                "a/../b",
                "a" * 256,
                "k" * MAX_KEY,
                "k" * (MAX_KEY - 1) + "j",
            ]
            kept = list(plain)
            for number, key in enumerate(plain):
                await put(store, key, b"%d" % number)
            for key in odd:
                if self.holds_any_key:
                    await put(store, key, b"%d" % len(kept))
                    kept.append(key)
                    continue
                for call in (
                    put(store, key, b"x"),
                    store.open(key),
                    store.head(key),
                    store.delete(key, conditions=NOTHING),
                ):
                    with raising(BadRequest, Conflict):
                        await call
            for number, key in enumerate(kept):
                assert (await read(store, key))[0] == b"%d" % number
            assert keys_on(await page_of(store)) == in_order(kept)
            for key in kept:
                await store.delete(key, conditions=NOTHING)
            assert keys_on(await page_of(store)) == []

        self.play(tmp_path / "store", story)

    def test_pages_of_a_listing_are_in_order_and_complete(self, tmp_path: Path) -> None:
        """For any prefix, delimiter, start and size of page."""

        async def story(store: WriteStore) -> None:
            assert await page_of(store) == ListPage((), (), None)
            keys = ["a", "a.b", "a/b", "a/c/d", "a/c/e", "a0", "b/x", "b/y", "ab/c", "é/1", "\uffff", "\U0001f642", "z"]
            keys = [key for key in keys if self.holds_any_key or not any(other.startswith(f"{key}/") for other in keys)]
            for key in keys:
                await put(store, key, b"x")
            for prefix in ("", "a", "a/", "a/c", "a/c/", "b/", "é", "x", "a/c/d", "a/c/d/"):
                for delimiter in ("", "/", ".", "c/"):
                    expected = entries(keys, prefix, delimiter)
                    for limit in (1, 2, 3, 100):
                        found: list[str] = []
                        after: str | None = ""
                        while after is not None:
                            page = await page_of(store, prefix=prefix, delimiter=delimiter, after=after, limit=limit)
                            names = in_order([*keys_on(page), *page.prefixes])
                            assert len(names) <= limit
                            assert keys_on(page) == in_order(keys_on(page))
                            found += names
                            after = page.next
                        assert found == expected
                    for after in ("a", "a/", "a/b", "a/c/", "a/c/e", "b", "é/1", "\uffff", "zz"):
                        page = await page_of(store, prefix=prefix, delimiter=delimiter, after=after, limit=100)
                        later = [name for name in expected if name.encode() > after.encode()]
                        assert in_order([*keys_on(page), *page.prefixes]) == later
                        assert page.next is None

        self.play(tmp_path / "store", story)

    def test_any_history_is_that_of_a_dictionary(self, tmp_path: Path) -> None:
        """Puts, replacements and deletions by chance, with a listing after each."""

        async def story(store: WriteStore) -> None:
            chance = random.Random(20261124)
            model: dict[str, bytes] = {}
            names = [f"{folder}{name}" for folder in ("", "f/", "f/g/", "h.", "h/") for name in ("1", "2", "ü")]
            for step in range(300):
                key = chance.choice(names)
                if chance.random() < 0.6:
                    data = b"%d" % step
                    assert (await put(store, key, data)).created is (key not in model)
                    model[key] = data
                elif key in model:
                    await store.delete(key, conditions=NOTHING)
                    del model[key]
                else:
                    with raising(ObjectNotFound):
                        await store.delete(key, conditions=NOTHING)
                assert keys_on(await page_of(store)) == in_order(model)
                if key in model:
                    assert (await read(store, key))[0] == model[key]

        self.play(tmp_path / "store", story)


async def put(
    store: WriteStore,
    key: str,
    data: bytes | AsyncIterator[bytes],
    *,
    size: int | None = None,
    user: dict[str, str] | None = None,
    conditions: Conditions = NOTHING,
    checksum: str | None = None,
) -> PutResult:
    """Store bytes, in pieces as a socket gives them, or what an iterator yields."""
    body = pieces(data) if isinstance(data, bytes) else data
    return await store.put(key, body, size=size, user=user or {}, conditions=conditions, checksum=checksum)


async def read(store: WriteStore, key: str) -> tuple[bytes, str | None]:
    """All bytes of the current version and its ETag."""
    source = await store.open(key)
    try:
        await source.ensure(0, source.meta.size)
        data = os.pread(source.descriptor, source.meta.size, 0)
        await source.check_unchanged()
        assert len(data) == source.meta.size
        assert source.meta.checksum in (None, checksum_of(data))
        return data, source.meta.etag
    finally:
        source.close()


async def page_of(
    store: WriteStore, *, prefix: str = "", delimiter: str = "", after: str = "", limit: int = 1000
) -> ListPage:
    """One page of the listing."""
    return await store.list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)


def keys_on(page: ListPage) -> list[str]:
    """The keys of a page, as they come."""
    return [meta.key for meta in page.objects]


def in_order(names: Any) -> list[str]:
    """Names by their UTF-8 bytes."""
    return sorted(names, key=lambda name: str(name).encode())


def entries(keys: Sequence[str], prefix: str, delimiter: str) -> list[str]:
    """All entries of a listing, by the rule."""
    found = set()
    for key in keys:
        if key.startswith(prefix):
            head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
            found.add(prefix + head + mark)
    return in_order(found)


def same(listed: ObjectMeta, meta: ObjectMeta) -> bool:
    """Whether both describe one version; a listing need not tell checksum and user metadata."""
    names = ("key", "size", "etag", "version", "modified")
    return all(getattr(listed, name) == getattr(meta, name) for name in names) and (
        listed.checksum in (None, meta.checksum) or meta.checksum is None
    )


def checksum_of(data: bytes) -> str:
    """As stores tell it."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


async def pieces(data: bytes, size: int = 65_536) -> AsyncIterator[bytes]:
    """A body as it comes from a socket."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def broken(data: bytes) -> AsyncIterator[bytes]:
    """A body whose sender goes away."""
    async for piece in pieces(data):
        yield piece
    raise ConnectionResetError("the sender went away")


async def cancel_amid(store: WriteStore, data: bytes) -> None:
    """Begin to store an object and leave before its body ends."""
    is_waiting, never = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        async for piece in pieces(data):
            yield piece
        is_waiting.set()
        await never.wait()

    task = asyncio.ensure_future(put(store, "key", body()))
    await is_waiting.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@contextlib.contextmanager
def raising(*kinds: type[ShardmillError] | type[ConnectionError]) -> Iterator[None]:
    """Fails unless one of these is raised inside."""
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"none of {', '.join(kind.__name__ for kind in kinds)} was raised")
