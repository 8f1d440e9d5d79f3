"""Stores that speak S3 and list by folder are listed in key order, whole; others pay one request to be told from them."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.errors import BackendUnavailable
from shardmill.core.origins import OriginFacts, ReadOrigin
from shardmill.storage.origins.folders import Document, is_by_folder, list_below, list_level
from shardmill.testing.faults import FaultServer, fault_server
from shardmill.testing.origins import entries, page_of, raising
from tests.storage.origins.support import opened

parts = st.text("ab.-0", min_size=1, max_size=3)
keys_of_paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
ends = st.sampled_from(["", "", "/"])
names = st.builds(lambda path, end: path + end, keys_of_paths, ends) | st.just("")


class Store:
    """Keys, listed by key or by folder, and how often it was asked."""

    def __init__(self, keys: Sequence[str], *, by_folder: bool) -> None:
        self._keys = keys
        self._by_folder = by_folder
        self.asked = 0

    async def ask(self, query: dict[str, str]) -> Document:
        self.asked += 1
        after, token = query.get("start-after", ""), query.get("continuation-token", "")
        found = entries(self._keys, query["prefix"], query.get("delimiter", ""))
        if self._by_folder:
            found = sorted(found, key=lambda name: name.split("/"))
            found = [name for name in found if name.split("/") > after.split("/")]
            found = [name for name in found if not after or not name.startswith(after + "/")]
        else:
            found = [name for name in found if name > after]
        found = found[found.index(token) + 1 :] if token else found
        some = found[: int(query["max-keys"])]
        objects = [OriginFacts(name, 1, None, None) for name in some if name in self._keys]
        return Document(objects, [name for name in some if name not in self._keys], some[-1] if found != some else None)


@given(st.sets(keys_of_paths, max_size=30), names, names, st.sampled_from([1, 2, 100]), st.booleans())
def test_any_page_has_what_comes_behind_its_start(
    keys: set[str], prefix: str, after: str, limit: int, by_folder: bool
) -> None:
    store = Store(sorted(keys), by_folder=by_folder)

    async def story() -> None:
        for make, delimiter in ((list_level, "/"), (list_below, "")):
            async with aclosing(make(store.ask, prefix, after, limit=limit)) as found:
                listed = [name async for name, _ in found]
            assert listed == [name for name in entries(sorted(keys), prefix, delimiter) if name > after]

    asyncio.run(story())


@given(st.sets(keys_of_paths, min_size=1, max_size=30), st.data())
def test_any_folder_tells_the_order_of_a_store(keys: set[str], data: st.DataObject) -> None:
    folders = sorted({key[: end + 1] for key in keys for end, letter in enumerate(key) if letter == "/"})
    if folders:
        folder = data.draw(st.sampled_from(folders))
        prefix = folder[: data.draw(st.integers(folder.rfind("/", 0, -1) + 1, len(folder) - 1))]
        for by_folder in (True, False):
            store = Store(sorted(keys), by_folder=by_folder)
            assert asyncio.run(is_by_folder(store.ask, prefix, folder)) is by_folder


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


async def pages(origin: ReadOrigin, limit: int) -> list[str]:
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await page_of(origin, after=after, limit=limit)
        found += [meta.key for meta in page.objects]
        after = page.next
    return found


def test_a_page_costs_one_request_where_keys_come_in_order(server: FaultServer) -> None:
    """And the first one with a folder one more, to find that out."""
    keys = [f"set/{number:03d}/x" for number in range(50)]
    for key in keys:
        server.put(f"/bucket/{key}", b"x")

    async def story() -> None:
        async with opened("s3", server) as origin:
            assert await pages(origin, 10) == keys
            assert len(server.requests) == 5 + 1
        async with opened("s3", server) as origin:
            assert [meta.key for meta in (await page_of(origin, after="set/024/x", limit=5)).objects] == keys[25:30]
            before = len(server.requests)
            assert [meta.key for meta in (await page_of(origin, after="set/024/x", limit=5)).objects] == keys[25:30]
            assert len(server.requests) == before + 1

    asyncio.run(story())


def test_a_long_folder_that_is_listed_by_folder_costs_few_requests_a_page(server: FaultServer) -> None:
    server.lists = "by folder"
    keys = [f"set/train-{number:04d}.tar" for number in range(400)]
    for key in keys:
        server.put(f"/bucket/{key}", b"x")

    async def story() -> None:
        async with opened("s3", server) as origin:
            await page_of(origin, limit=1)
            before = len(server.requests)
            assert await pages(origin, 100) == keys
            # The folders that hold the start of the page, and what could lie beside it in `train-0099/`.
            assert len(server.requests) - before <= 4 * 4

    asyncio.run(story())


def test_a_store_without_any_order_is_not_listed_in_part(server: FaultServer) -> None:
    server.lists = "by age"
    for key in ("b/1", "c", "a"):
        server.put(f"/bucket/{key}", b"x")

    async def story() -> None:
        async with opened("s3", server) as origin:
            for limit in (1, 100):
                with raising(BackendUnavailable):
                    await pages(origin, limit)

    asyncio.run(story())


def test_the_library_lists_no_store_by_folder_in_part(server: FaultServer) -> None:
    """What is listed through it, since the keys are its own to send, cannot be put in order."""
    server.lists = "by folder"
    for key in ("a/b", "a.b", "c"):
        server.put(f"/bucket/{key}", b"x")

    async def story() -> None:
        async with opened("gs", server) as origin:
            with raising(BackendUnavailable):
                await page_of(origin)

    asyncio.run(story())
