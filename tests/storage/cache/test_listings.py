"""Remembered pages of listings: for a moment, as many as fit, none from before a change."""

import asyncio

import pytest

from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.storage.cache import listings
from shardmill.storage.cache.listings import Listings
from tests.storage.cache.support import run


class Store:
    """An origin whose listing is what it has when it is asked."""

    def __init__(self) -> None:
        self.keys = ["a", "b"]
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        self.asked += 1
        found = tuple(
            ObjectMeta(key=key, size=1, etag=None, version="v", modified=0.0)
            for key in self.keys
            if key.startswith(prefix) and key > after
        )
        if self.gate is not None:
            await self.gate.wait()
        return ListPage(found[:limit], (), None)


async def keys(pages: Listings, store: Store, prefix: str = "") -> list[str]:
    page = await pages.get(store, prefix=prefix, delimiter="", after="", limit=1000)
    return [meta.key for meta in page.objects]


def test_a_page_is_kept_for_its_time_and_until_a_change() -> None:
    async def story() -> None:
        store, pages = Store(), Listings(1000.0)
        assert await keys(pages, store) == await keys(pages, store) == ["a", "b"]
        assert store.asked == 1
        store.keys.append("c")
        assert await keys(pages, store) == ["a", "b"]
        pages.clear()
        assert await keys(pages, store) == ["a", "b", "c"]
        brief = Listings(0.0)
        assert await keys(brief, store) == await keys(brief, store)
        assert store.asked == 4

    run(story())


def test_a_page_that_was_asked_for_before_a_change_is_not_kept() -> None:
    async def story() -> None:
        store, pages = Store(), Listings(1000.0)
        store.gate = asyncio.Event()
        early = asyncio.ensure_future(keys(pages, store))
        await asyncio.sleep(0)
        store.keys.append("c")
        pages.clear()
        store.gate.set()
        assert await early == ["a", "b"]
        assert await keys(pages, store) == ["a", "b", "c"]

    run(story())


def test_pages_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "_KEPT", 10)

    async def story() -> None:
        store, pages = Store(), Listings(1000.0)
        store.keys = [f"{letter}{number}" for letter in "abcd" for number in range(3)]
        for letter in "abcd":
            assert len(await keys(pages, store, letter)) == 3
        # The last two fit, with one for each page; the first is the one to go.
        assert store.asked == 4
        for letter in "dc":
            await keys(pages, store, letter)
        assert store.asked == 4
        await keys(pages, store, "a")
        assert store.asked == 5

    run(story())


def test_the_last_page_outlives_its_time_but_no_change() -> None:
    async def story() -> None:
        store, pages = Store(), Listings(0.0)
        await keys(pages, store)
        store.keys.append("c")
        await keys(pages, store)
        last = pages.last(prefix="", delimiter="", after="", limit=1000)
        assert last is not None
        assert [meta.key for meta in last.objects] == ["a", "b", "c"]
        assert pages.last(prefix="", delimiter="", after="", limit=999) is None
        pages.clear()
        assert pages.last(prefix="", delimiter="", after="", limit=1000) is None

    run(story())
