"""What every origin promises, as tests that any of them can be given.

Subclass `ReadSuite`, and where the origin has the verbs `ListSuite` and `WriteSuite`, in a test module, name the class
`Test…` and define `open_origin`; pytest does the rest. The protocols are those of `shardmill.core.origins`.
"""

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from shardmill.core.errors import (
    BadRequest,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    ShardmillError,
)
from shardmill.core.meta import ListPage
from shardmill.core.origins import ListOrigin, OriginFacts, ReadOrigin, WriteOrigin

SECONDS = 100.0  # one test; an origin that hangs fails
LARGE = (20 << 20) + 17  # bytes; more than one part of an upload
PLAIN_KEYS = (
    "a b", "a+b", "a%2Fb", "a%", "#", "?", "&", "$HOME", "{0..3}", "*", "~", "'", '"', ":", "a=b", "é", "e\u0301",
    "\U0001f642", "A", "a.tar", ".hidden", "...", "k" * 200, "dir/" * 20 + "x", "a~b@c", "a|b", "a;b,c", "<x>",
)  # fmt: skip
ODD_KEYS = ("a//b", "/a", "b/", ".", "..", "../a", "a/./b", "a/../b")

Story = Callable[[ReadOrigin], Awaitable[None]]


class ReadSuite(ABC):
    """Tests of reading."""

    tells_etags: ClassVar[bool] = True
    has_folders: ClassVar[bool] = False
    """A part of a key may be something that is refused."""
    keys: ClassVar[Sequence[str]] = PLAIN_KEYS
    """That it carries exactly."""

    @abstractmethod
    def open_origin(self) -> AbstractAsyncContextManager[ReadOrigin]:
        """An origin over an empty bucket."""

    async def place(self, origin: ReadOrigin, key: str, data: bytes) -> None:
        """Have an object there; by other means where the origin cannot be written to."""
        await put(origin, key, data)

    def play(self, story: Story) -> None:
        """Run a story on a fresh origin."""

        async def run() -> None:
            async with self.open_origin() as origin:
                async with asyncio.timeout(SECONDS):
                    await story(origin)

        asyncio.run(run())

    def test_an_object_is_read_whole_and_in_parts(self) -> None:
        """And all that is told of it, by whatever verb, is of one version."""

        async def story(origin: ReadOrigin) -> None:
            for size in (0, 1, 70_000, (3 << 20) + 17):
                data = random.Random(size).randbytes(size)
                await self.place(origin, f"dir/object-{size}", data)
                head = await origin.head(f"dir/object-{size}")
                assert (head.key, head.size) == (f"dir/object-{size}", size)
                assert head.validator == ("strong" if self.tells_etags else "dated")
                found, facts = await read(origin, head.key)
                assert found == data
                assert facts.version == head.version
                assert facts.size == size
                ranges = ((0, 1), (size // 2, size // 2 + 10), (max(0, size - 5), size + 5), (size // 3, None))
                for start, stop in ranges if size else ():
                    found, facts = await read(origin, head.key, start=start, stop=stop, version=head.version)
                    assert found == data[start:stop]
                    assert (facts.version, facts.size) == (head.version, size)

        self.play(story)

    def test_a_range_behind_the_end_cannot_be_had(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            await self.place(origin, "object", b"12345")
            for start, stop in ((5, 6), (5, None), (1000, 2000)):
                with raising(RangeNotSatisfiable):
                    await read(origin, "object", start=start, stop=stop)

        self.play(story)

    def test_what_is_not_there_is_not_found(self) -> None:
        """And a part of a key is not its object."""

        async def story(origin: ReadOrigin) -> None:
            await self.place(origin, "dir/object", b"x")
            for key in ("missing", "dir/objec", "dir/object2", "DIR/object", *(() if self.has_folders else ("dir",))):
                with raising(ObjectNotFound):
                    await origin.head(key)
                with raising(ObjectNotFound):
                    await read(origin, key)
                # A store may judge the version first: RFC 9110 §13.1.1.
                with raising(ObjectNotFound, ObjectChanged):
                    await read(origin, key, start=1, stop=5, version="etag:abc")

        self.play(story)

    def test_a_version_that_was_replaced_is_not_read(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            await self.place(origin, "object", b"first")
            first = (await origin.head("object")).version
            assert (await read(origin, "object", version=first))[0] == b"first"
            await self.place(origin, "object", b"the second")
            for start, stop in ((0, None), (1, 3)):
                with raising(ObjectChanged):
                    await read(origin, "object", start=start, stop=stop, version=first)
            found, facts = await read(origin, "object")
            assert found == b"the second"
            assert facts.version == (await origin.head("object")).version != first

        self.play(story)

    def test_a_key_is_carried_exactly_or_refused(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            for number, key in enumerate(self.keys):
                await self.place(origin, key, b"%d" % number)
            for number, key in enumerate(self.keys):
                found, facts = await read(origin, key)
                assert (found, facts.key) == (b"%d" % number, key)
            for key in ODD_KEYS:
                with raising(BadRequest, ObjectNotFound):
                    await origin.head(key)
                with raising(BadRequest, ObjectNotFound):
                    await read(origin, key)

        self.play(story)

    def test_a_reader_may_leave_at_any_moment(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            data = random.Random(1).randbytes(LARGE)
            await self.place(origin, "object", data)
            for pieces in (0, 1, 3):
                async with origin.read("object") as reading:
                    left = pieces
                    async for piece in reading:
                        assert len(piece)
                        left -= 1
                        if left <= 0:
                            break
            for turns in (0, 1, 5, 50):
                task = asyncio.ensure_future(read(origin, "object"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            assert (await read(origin, "object"))[0] == data

        self.play(story)

    def test_many_read_at_once(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            data = random.Random(2).randbytes(300_000)
            await self.place(origin, "object", data)
            before = origin.statistics()
            found = await asyncio.gather(*[read(origin, "object", start=n * 7, stop=200_000 + n) for n in range(20)])
            assert [piece for piece, _ in found] == [data[n * 7 : 200_000 + n] for n in range(20)]
            after = origin.statistics()
            assert after.bytes_read - before.bytes_read == sum(len(piece) for piece, _ in found)
            assert after.requests["ok"] - before.requests.get("ok", 0) >= 20

        self.play(story)


class ListSuite(ReadSuite, ABC):
    """Tests of listing, too."""

    def test_pages_of_a_listing_are_in_order_and_complete(self) -> None:
        """For any prefix, delimiter, start and size of page."""

        async def story(origin: ReadOrigin) -> None:
            assert await page_of(origin) == ListPage((), (), None)
            keys = ["a", "a.b", "a/b", "a/c/d", "a/c/e", "a0", "b/x", "b/y", "ab/c", "é/1", "\U0001f642", "z"]
            for key in keys:
                await self.place(origin, key, b"x")
            for prefix in ("", "a", "a/", "a/c", "b/", "é", "x", "a/c/d/"):
                for delimiter in ("", "/", "."):
                    expected = entries(keys, prefix, delimiter)
                    for limit in (1, 3, 100):
                        found: list[str] = []
                        after: str | None = ""
                        while after is not None:
                            page = await page_of(origin, prefix=prefix, delimiter=delimiter, after=after, limit=limit)
                            names = in_order([*(meta.key for meta in page.objects), *page.prefixes])
                            assert len(names) <= limit
                            found += names
                            after = page.next
                        assert found == expected, (prefix, delimiter, limit)
            for after in ("a", "a/", "a/b", "a/c/", "b", "é/1", "zz"):
                for delimiter in ("", "/"):
                    page = await page_of(origin, delimiter=delimiter, after=after, limit=100)
                    names = in_order([*(meta.key for meta in page.objects), *page.prefixes])
                    later = [name for name in entries(keys, "", delimiter) if name.encode() > after.encode()]
                    assert names == later, (after, delimiter)

        self.play(story)

    def test_a_listing_says_of_a_version_what_a_head_says(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            for key in self.keys[:12]:
                await self.place(origin, key, key.encode())
            page = await page_of(origin)
            assert [meta.key for meta in page.objects] == in_order(self.keys[:12])
            for meta in page.objects:
                head = await origin.head(meta.key)
                assert (meta.size, meta.etag, meta.version) == (head.size, head.etag, head.version)
                assert head.modified is not None
                assert abs(meta.modified - head.modified) < 2

        self.play(story)


class WriteSuite(ListSuite, ABC):
    """Tests of writing, too."""

    keeps_user_metadata: ClassVar[bool] = True
    judges_conditions: ClassVar[bool] = True
    copies: ClassVar[bool] = True

    def test_what_is_put_is_read_back(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            for size in (0, 5, 70_000, LARGE):
                data = random.Random(size).randbytes(size)
                for announced in (size, None):
                    facts = await put(origin, "object", data, size=announced)
                    assert (facts.key, facts.size) == ("object", size)
                    found, read_facts = await read(origin, "object")
                    assert found == data
                    assert read_facts.version == facts.version
                    assert read_facts.modified == facts.modified

        self.play(story)

    def test_metadata_are_kept(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            user = {"epoch": "3", "owner": "somebody else"} if self.keeps_user_metadata else {}
            for data in (b"small", random.Random(3).randbytes(LARGE)):
                stored = await put(origin, "object", data, user=user, content_type="application/x-tar")
                head = await origin.head("object")
                assert head.content_type == "application/x-tar"
                assert head.user == stored.user == user

        self.play(story)

    def test_conditions_are_judged_by_the_store(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            if not self.judges_conditions:
                return
            with raising(PreconditionFailed):
                await put(origin, "object", b"never", if_match="0" * 32)
            first = await put(origin, "object", b"first", if_absent=True)
            with raising(PreconditionFailed):
                await put(origin, "object", b"never", if_absent=True)
            second = await put(origin, "object", b"second", if_match=first.etag)
            with raising(PreconditionFailed):
                await put(origin, "object", b"never", if_match=first.etag)
            assert (await read(origin, "object"))[0] == b"second"
            await put(origin, "object", b"third", if_match=second.etag)
            assert (await read(origin, "object"))[0] == b"third"

        self.play(story)

    def test_a_body_that_is_not_what_was_announced_leaves_the_old_object(self) -> None:
        """Shorter, longer, broken off, or its sender gone; small and in parts."""

        async def story(origin: ReadOrigin) -> None:
            await put(origin, "object", b"old")
            for data in (b"12345", bytes(LARGE)):
                for wrong in (-1, 1):
                    with raising(BadRequest):
                        await put(origin, "object", data, size=len(data) + wrong)
                with raising(ConnectionResetError):
                    await put(origin, "object", broken(data))
                await cancel_amid(origin, data)
            assert (await read(origin, "object"))[0] == b"old"

        self.play(story)

    def test_what_is_deleted_is_gone(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            assert isinstance(origin, WriteOrigin)
            await put(origin, "object", b"x")
            await put(origin, "other", b"y")
            await origin.delete("object")
            await origin.delete("object")
            with raising(ObjectNotFound):
                await origin.head("object")
            assert [meta.key for meta in (await page_of(origin)).objects] == ["other"]

        self.play(story)

    def test_a_copy_is_made_in_the_store(self) -> None:
        async def story(origin: ReadOrigin) -> None:
            assert isinstance(origin, WriteOrigin)
            if not self.copies:
                return
            await put(origin, "object one", b"first", content_type="application/x-tar")
            await origin.copy("object one", "dir/object two")
            assert (await read(origin, "dir/object two"))[0] == b"first"
            assert (await origin.head("dir/object two")).content_type == "application/x-tar"
            with raising(ObjectNotFound):
                await origin.copy("missing", "target")

        self.play(story)


async def read(
    origin: ReadOrigin, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
) -> tuple[bytes, OriginFacts]:
    """The bytes of one read, and its facts."""
    async with origin.read(key, start=start, stop=stop, version=version) as reading:
        found = b"".join([bytes(piece) async for piece in reading])
        return found, reading.facts


async def put(
    origin: ReadOrigin,
    key: str,
    data: bytes | AsyncIterator[bytes],
    *,
    size: int | None = None,
    user: dict[str, str] | None = None,
    content_type: str | None = None,
    if_match: str | None = None,
    if_absent: bool = False,
) -> OriginFacts:
    """Store bytes, in pieces as a socket gives them, or what an iterator yields."""
    assert isinstance(origin, WriteOrigin)
    body = pieces(data) if isinstance(data, bytes) else data
    return await origin.put(
        key, body, size=size, user=user or {}, content_type=content_type, if_match=if_match, if_absent=if_absent
    )


async def page_of(
    origin: ReadOrigin, *, prefix: str = "", delimiter: str = "", after: str = "", limit: int = 1000
) -> ListPage:
    """One page of the listing."""
    assert isinstance(origin, ListOrigin)
    return await origin.list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)


def entries(keys: Sequence[str], prefix: str, delimiter: str) -> list[str]:
    """All entries of a listing, by the rule."""
    found = set()
    for key in keys:
        if key.startswith(prefix):
            head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
            found.add(prefix + head + mark)
    return in_order(list(found))


def in_order(names: Sequence[str]) -> list[str]:
    """Names by their UTF-8 bytes."""
    return sorted(names, key=lambda name: name.encode())


async def pieces(data: bytes, size: int = 262_144) -> AsyncIterator[bytes]:
    """A body as it comes from a socket."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def broken(data: bytes) -> AsyncIterator[bytes]:
    """A body whose sender goes away."""
    async for piece in pieces(data):
        yield piece
    raise ConnectionResetError("the sender went away")


async def cancel_amid(origin: ReadOrigin, data: bytes) -> None:
    """Begin to store an object and leave before its body ends."""
    is_waiting, never = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        async for piece in pieces(data):
            yield piece
        is_waiting.set()
        await never.wait()

    task = asyncio.ensure_future(put(origin, "object", body()))
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
