"""Whatever a store does wrong, what is read is right to the byte or an error in bounded time, and no version is mixed."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from shardmill.core.errors import (
    BackendBusy,
    BackendDenied,
    BackendTimeout,
    BackendUnavailable,
    BucketNotFound,
    ObjectChanged,
    ObjectNotFound,
    ShardmillError,
)
from shardmill.core.origins import ReadOrigin
from shardmill.core.values import Secret
from shardmill.storage.origins.remote import PIECE
from shardmill.testing.faults import Fault, FaultServer, Served, fault_server
from shardmill.testing.origins import page_of, read
from tests.storage.origins.support import CLOUDS, DIALECTS, QUICK, Dialect, opened

SIZE = 3_000_000
OLD = Served(random.Random(1).randbytes(SIZE), content_type="application/x-tar")
NEW = Served(random.Random(2).randbytes(SIZE), modified=1_700_000_100.0)
PHASES = (0, 1, SIZE // 2, SIZE - 1)
NEED_NO_ETAG: tuple[Dialect, ...] = ("s3", "http")  # the library takes no answer without one from the others

Story = Callable[[ReadOrigin], Awaitable[None]]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as server:
        server.put("/bucket/object", OLD)
        yield server


def play(dialect: Dialect, server: FaultServer, story: Story, **options: Any) -> None:
    async def run() -> None:
        async with opened(dialect, server, **options) as origin:
            async with asyncio.timeout(30):
                await story(origin)

    asyncio.run(run())


async def fails(kind: type[ShardmillError], call: Awaitable[object]) -> ShardmillError:
    """The error of exactly this kind that the call raises."""
    with pytest.raises(ShardmillError) as caught:
        await call
    assert type(caught.value) is kind
    return caught.value


async def is_well(server: FaultServer, origin: ReadOrigin) -> None:
    """Once the store behaves again, so does the origin."""
    server.forget()
    data = server.objects()["/bucket/object"].data
    assert (await read(origin, "object"))[0] == data


@pytest.mark.parametrize("dialect", DIALECTS)
class TestEverywhere:
    def test_a_body_that_is_cut_once_is_resumed(self, dialect: Dialect, server: FaultServer) -> None:
        """From the byte where it stopped, and as the same version."""

        async def story(origin: ReadOrigin) -> None:
            for at in PHASES:
                for start, stop in ((0, None), (0, SIZE), (7, None), (7, SIZE - 7)):
                    server.forget()
                    server.misbehave("/bucket/object", Fault("cut", at=min(at, SIZE - 20), times=1))
                    found, facts = await read(origin, "object", start=start, stop=stop)
                    assert found == OLD.data[start:stop]
                    assert facts.etag == OLD.tag
                    _, again = server.asked("GET", "/bucket/object")
                    resumed = int(again.headers["range"].removeprefix("bytes=").partition("-")[0])
                    # The library gives out whole pieces only; what is left of one is fetched again.
                    assert 0 <= start + min(at, SIZE - 20) - resumed < (PIECE if dialect != "http" else 1)
                    assert again.headers["if-match"] == f'"{OLD.tag}"'
            await is_well(server, origin)

        play(dialect, server, story)

    def test_a_body_that_stalls_once_is_resumed(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("stall", at=SIZE // 2, times=1))
            found, _ = await read(origin, "object")
            assert found == OLD.data

        play(dialect, server, story)

    def test_an_object_that_is_replaced_before_it_is_resumed_is_not_mixed(
        self, dialect: Dialect, server: FaultServer
    ) -> None:
        """Whether the store judges If-Match, or ignores it."""

        async def story(origin: ReadOrigin) -> None:
            faults: list[tuple[Fault, ...]] = [(), (Fault("no_conditions"),)]
            if dialect in NEED_NO_ETAG:
                faults.append((Fault("no_conditions"), Fault("no_etag")))
            for fault in faults:
                for at in PHASES:
                    server.put("/bucket/object", OLD)
                    server.misbehave("/bucket/object", Fault("cut", at=at, times=1, replacement=NEW), *fault)
                    found = bytearray()
                    with pytest.raises(ObjectChanged):
                        async with origin.read("object") as reading:
                            async for piece in reading:
                                found += piece
                    assert found == OLD.data[: len(found)]
                    assert len(found) <= at
                    assert reading.facts.modified == OLD.modified
                    await is_well(server, origin)

        play(dialect, server, story)

    def test_a_body_that_never_gets_further_fails_in_bounded_time(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            for at in (0, 10):
                for kind, error in (("cut", BackendUnavailable), ("stall", BackendTimeout)):
                    server.misbehave("/bucket/object", Fault("cut" if kind == "cut" else "stall", at=at))
                    began = time.monotonic()
                    found = bytearray()
                    with pytest.raises(BackendUnavailable) as caught:
                        async with origin.read("object") as reading:
                            async for piece in reading:
                                found += piece
                    assert type(caught.value) in (error, BackendUnavailable)
                    assert time.monotonic() - began < 20
                    assert found == OLD.data[: len(found)]
                    await is_well(server, origin)

        play(dialect, server, story)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, BackendDenied),
            (403, BackendDenied),
            (404, ObjectNotFound),
            (429, BackendBusy),
            (500, BackendUnavailable),
            (502, BackendUnavailable),
            (503, BackendBusy),
            (504, BackendTimeout),
        ],
    )
    def test_a_refusal_says_what_it_is(
        self, dialect: Dialect, server: FaultServer, status: int, kind: type[ShardmillError]
    ) -> None:
        """And only what may pass is tried again, as often as allowed."""

        async def story(origin: ReadOrigin) -> None:
            await is_well(server, origin)
            server.misbehave("/bucket/object", Fault("status", status=status, methods=("GET", "HEAD")))
            tries = QUICK.retries + 1 if kind.retryable else 1
            for call in (read(origin, "object"), read(origin, "object", start=5, stop=9), origin.head("object")):
                server.requests.clear()
                error = await fails(kind, call)
                assert len(server.requests) == tries
                assert "as told" not in str(error)
            await is_well(server, origin)
            server.misbehave("/bucket/object", Fault("status", status=status, times=1))
            if kind.retryable:
                assert (await read(origin, "object"))[0] == OLD.data
            else:
                await fails(kind, read(origin, "object"))
            outcomes = origin.statistics().requests
            assert outcomes[kind.code] >= 3
            assert outcomes["ok"] >= 2

        play(dialect, server, story)

    def test_a_store_that_says_nothing_is_waited_for_no_longer_than_allowed(
        self, dialect: Dialect, server: FaultServer
    ) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("silent", methods=("GET", "HEAD")))
            began = time.monotonic()
            await fails(BackendTimeout, read(origin, "object"))
            await fails(BackendTimeout, origin.head("object"))
            assert time.monotonic() - began < 20
            await is_well(server, origin)
            server.misbehave("/bucket/object", Fault("silent", times=1))
            assert (await read(origin, "object"))[0] == OLD.data

        play(dialect, server, story)

    def test_a_page_in_place_of_the_object_is_refused(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("html", methods=("GET", "HEAD")))
            await fails(BackendUnavailable, read(origin, "object"))
            await fails(BackendUnavailable, origin.head("object"))
            await is_well(server, origin)

        play(dialect, server, story)

    def test_content_that_is_said_to_be_compressed_is_not_touched(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("gzip", methods=("GET", "HEAD")))
            found, facts = await read(origin, "object")
            assert found == OLD.data
            assert facts.size == SIZE
            assert (await read(origin, "object", start=100, stop=200))[0] == OLD.data[100:200]

        play(dialect, server, story)

    def test_without_an_etag_size_and_date_tell_versions(self, dialect: Dialect, server: FaultServer) -> None:
        """A weak ETag is none."""

        async def story(origin: ReadOrigin) -> None:
            for fault in (
                Fault("no_etag", methods=("GET", "HEAD")),
                Fault("weak_etag", methods=("GET", "HEAD")),
            ):
                if fault.kind == "no_etag" and dialect not in NEED_NO_ETAG:
                    continue
                server.put("/bucket/object", OLD)
                server.misbehave("/bucket/object", fault, Fault("cut", at=SIZE // 2, times=1))
                found, facts = await read(origin, "object")
                assert found == OLD.data
                assert facts.validator == "dated"
                assert (await origin.head("object")).version == facts.version
                server.put("/bucket/object", NEW)
                await fails(ObjectChanged, read(origin, "object", version=facts.version))

        play(dialect, server, story)

    def test_what_tells_no_version_at_all_is_not_resumed(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            nothing = (Fault("no_etag"), Fault("no_modified"))
            server.misbehave("/bucket/object", *nothing)
            if dialect not in NEED_NO_ETAG:
                await fails(BackendUnavailable, read(origin, "object"))
                return
            found, facts = await read(origin, "object")
            assert found == OLD.data
            assert facts.validator == "none"
            server.misbehave("/bucket/object", *nothing, Fault("cut", at=SIZE // 2, times=1, replacement=NEW))
            await fails(BackendUnavailable, read(origin, "object"))
            await is_well(server, origin)

        play(dialect, server, story)

    def test_another_range_than_asked_for_is_refused(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("wrong_range"))
            await fails(BackendUnavailable, read(origin, "object", start=100, stop=200))
            await is_well(server, origin)

        play(dialect, server, story)

    def test_a_store_that_is_not_there_is_unavailable(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.__exit__()
            await fails(BackendUnavailable, read(origin, "object"))
            await fails(BackendUnavailable, origin.head("object"))
            server.__init__()  # type: ignore[misc] # a closed one cannot be closed again
            server.__enter__()

        play(dialect, server, story)


class TestTheWeb:
    def test_a_server_without_lengths_is_read_to_the_end_of_its_chunks(self, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("chunked", methods=("GET", "HEAD")))
            assert (await origin.head("object")).size is None
            found, facts = await read(origin, "object")
            assert found == OLD.data
            assert (facts.size, facts.validator) == (None, "strong")
            assert (await read(origin, "object", start=7, stop=70_000))[0] == OLD.data[7:70_000]
            for at in PHASES:
                server.misbehave("/bucket/object", Fault("chunked"), Fault("cut", at=at, times=1))
                assert (await read(origin, "object"))[0] == OLD.data

        play("http", server, story)

    def test_a_body_that_only_closing_ends_is_refused(self, server: FaultServer) -> None:
        """A cut of it could not be told from its end."""

        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("unending"))
            error = await fails(BackendUnavailable, read(origin, "object"))
            assert "neither a length nor chunks" in str(error)
            await is_well(server, origin)

        play("http", server, story)

    def test_the_whole_for_a_range_is_sliced(self, server: FaultServer) -> None:
        """And the facts say that ranges are dear."""

        async def story(origin: ReadOrigin) -> None:
            assert (await origin.head("object")).takes_ranges
            server.misbehave("/bucket/object", Fault("no_ranges"))
            for start, stop in ((0, 10), (7, 70_000), (SIZE // 2, None), (SIZE - 1, SIZE + 10)):
                found, facts = await read(origin, "object", start=start, stop=stop)
                assert found == OLD.data[start:stop]
                assert (facts.size, facts.takes_ranges) == (SIZE, False)
            server.misbehave("/bucket/object", Fault("no_ranges"), Fault("cut", at=SIZE // 2, times=1))
            assert (await read(origin, "object", start=100))[0] == OLD.data[100:]

        play("http", server, story)

    def test_a_redirect_is_followed_to_where_it_may_lead(self, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.put("/elsewhere", NEW)
            server.misbehave("/bucket/object", Fault("redirect", location="/elsewhere", methods=("GET", "HEAD")))
            assert (await read(origin, "object"))[0] == NEW.data
            assert (await origin.head("object")).etag == NEW.tag
            server.misbehave("/bucket/object", Fault("redirect", location="/bucket/object"))
            error = await fails(BackendUnavailable, read(origin, "object"))
            assert "in a circle" in str(error)

        play("http", server, story)

    def test_a_redirect_to_a_private_address_is_refused_unless_it_is_meant(self, server: FaultServer) -> None:
        port = server.endpoint.rpartition(":")[2]
        server.put("/secret", b"of the node's own network")
        places = [
            f"http://127.0.0.2:{port}/secret",
            f"http://localhost:{port}/secret",
            f"http://[::ffff:127.0.0.1]:{port}/secret",
            "http://169.254.169.254/latest/meta-data/",
            "http://10.0.0.1/",
            "http://[fd00:ec2::254]/",
            "http://0.0.0.0/",
            "http://2130706433/",
        ]

        async def story(origin: ReadOrigin) -> None:
            for place in places:
                server.misbehave("/bucket/object", Fault("redirect", location=place))
                with pytest.raises((BackendDenied, BackendUnavailable)):
                    await read(origin, "object")
            for place in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
                server.misbehave("/bucket/object", Fault("redirect", location=place))
                await fails(BackendUnavailable, read(origin, "object"))
            assert server.asked("GET", "/secret") == []
            await is_well(server, origin)

        play("http", server, story)

        async def meant(origin: ReadOrigin) -> None:
            for name in ("127.0.0.2", "localhost"):
                server.misbehave("/bucket/object", Fault("redirect", location=f"http://{name}:{port}/secret"))
                if name == "localhost":
                    assert (await read(origin, "object"))[0] == b"of the node's own network"
                else:
                    # Allowed, and asked; nobody listens there.
                    await fails(BackendUnavailable, read(origin, "object"))

        play("http", server, meant, allow_private=True)

    def test_a_token_goes_to_its_own_server_only(self, server: FaultServer) -> None:
        with fault_server() as other:
            other.put("/elsewhere", NEW)

            async def story(origin: ReadOrigin) -> None:
                assert (await read(origin, "object"))[0] == OLD.data
                server.misbehave("/bucket/object", Fault("redirect", location=f"{other.endpoint}/elsewhere"))
                assert (await read(origin, "object"))[0] == NEW.data
                tokens = {request.headers.get("authorization") for request in server.requests}
                assert tokens == {"Bearer hunter2"}
                assert {request.headers.get("authorization") for request in other.requests} == {None}

            play("http", server, story, token=Secret("hunter2"), allow_private=True)

    def test_a_server_without_head_is_asked_for_the_object(self, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket/object", Fault("status", status=405, methods=("HEAD",)))
            facts = await origin.head("object")
            assert (facts.size, facts.etag) == (SIZE, OLD.tag)

        play("http", server, story)


@pytest.mark.parametrize("dialect", CLOUDS)
class TestListings:
    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            (Fault("status", status=403), BackendDenied),
            (Fault("status", status=404), BucketNotFound),
            (Fault("status", status=503), BackendBusy),
            (Fault("status", status=500), BackendUnavailable),
            (Fault("cut", at=100), BackendUnavailable),
            (Fault("stall", at=100), BackendTimeout),
            (Fault("html"), BackendUnavailable),
        ],
    )
    def test_a_listing_is_whole_or_an_error(
        self, dialect: Dialect, server: FaultServer, fault: Fault, kind: type[ShardmillError]
    ) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("/bucket", fault)
            with pytest.raises(ShardmillError) as caught:
                await page_of(origin)
            # The library does not always tell what broke off from what was waited for.
            assert type(caught.value) is kind or (type(caught.value), kind) == (BackendUnavailable, BackendTimeout)
            server.forget()
            assert [meta.key for meta in (await page_of(origin)).objects] == ["object"]

        play(dialect, server, story)

    def test_a_missing_bucket_is_told_from_a_missing_object(self, dialect: Dialect, server: FaultServer) -> None:
        async def story(origin: ReadOrigin) -> None:
            server.misbehave("*", Fault("status", status=404, methods=("GET", "HEAD")))
            await fails(BucketNotFound, read(origin, "object"))
            await fails(BucketNotFound, origin.head("object"))
            server.forget()
            await fails(ObjectNotFound, origin.head("missing"))
            server.forget()
            await fails(ObjectNotFound, origin.head("missing"))
            assert len(server.requests) == 1

        play(dialect, server, story)

    def test_long_listings_come_page_by_page(self, dialect: Dialect, server: FaultServer) -> None:
        keys = [f"many/{number:05d}/x" for number in range(4500)] + [f"one/{number:04d}" for number in range(2500)]
        for key in keys:
            server.put(f"/bucket/{key}", b"x")

        async def story(origin: ReadOrigin) -> None:
            found: list[str] = []
            after: str | None = ""
            while after is not None:
                page = await page_of(origin, after=after, limit=1000)
                assert len(page.objects) <= 1000
                found += [meta.key for meta in page.objects]
                after = page.next
            assert found == [*keys[:4500], "object", *keys[4500:]] or sorted(found) == sorted([*keys, "object"])
            assert found == sorted(found)
            top = await page_of(origin, delimiter="/")
            assert (list(top.prefixes), [meta.key for meta in top.objects]) == (["many/", "one/"], ["object"])
            some = await page_of(origin, prefix="one/12", limit=1000)
            assert [meta.key for meta in some.objects] == [f"one/{number}" for number in range(1200, 1300)]

        play(dialect, server, story)


class TestOddKeys:
    KEYS = ("a//b", "dir/", "./x", "ctrl\x01", "good", "dir/good", "k" * 1500)

    @pytest.mark.parametrize("dialect", ["s3"])
    def test_a_bucket_with_keys_that_nobody_can_have_is_still_listed(
        self, dialect: Dialect, server: FaultServer
    ) -> None:
        server.remove("/bucket/object")
        for key in self.KEYS:
            server.put(f"/bucket/{key}", b"x")

        async def story(origin: ReadOrigin) -> None:
            page = await page_of(origin)
            assert [meta.key for meta in page.objects] == ["dir/good", "good"]
            assert origin.statistics().unlisted == 5
            # Each page goes on behind what it left out.
            assert [meta.key for meta in (await page_of(origin, limit=1)).objects] == ["dir/good"]
            assert [meta.key for meta in (await page_of(origin, limit=1, after="dir/good")).objects] == ["good"]

        play(dialect, server, story)

    @pytest.mark.parametrize("dialect", ["gs", "az"])
    def test_where_only_the_library_lists_they_make_an_error(self, dialect: Dialect, server: FaultServer) -> None:
        server.put("/bucket/a//b", b"x")

        async def story(origin: ReadOrigin) -> None:
            error = await fails(BackendUnavailable, page_of(origin))
            assert "cannot be listed" in str(error)

        play(dialect, server, story)

    def test_public_buckets_of_google_are_listed_without_the_library(self, server: FaultServer) -> None:
        server.put("/bucket/a//b", b"x")

        async def story(origin: ReadOrigin) -> None:
            assert [meta.key for meta in (await page_of(origin)).objects] == ["object"]
            assert all("authorization" not in request.headers for request in server.requests)

        play("gs", server, story, token=Secret(""), anonymous=True)
