"""Writing, by the shape of its requests: what the emulators of Google and Azure do not know, and what fails."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shardmill.core.errors import (
    BackendBusy,
    BackendDenied,
    BackendUnavailable,
    BadRequest,
    ObjectNotFound,
    PreconditionFailed,
    ShardmillError,
)
from shardmill.core.origins import ReadOrigin, WriteOrigin
from shardmill.storage.origins.remote import MAX_CONDITIONAL
from shardmill.testing.faults import Fault, FaultServer, Served, fault_server
from shardmill.testing.origins import pieces, put
from tests.storage.origins.support import CLOUDS, QUICK, Dialect, opened

META = {"s3": "x-amz-meta-", "gs": "x-goog-meta-", "az": "x-ms-meta-"}
CONTENT_TYPE = {"s3": "content-type", "gs": "content-type", "az": "x-ms-blob-content-type"}
COPY = {"s3": "x-amz-copy-source", "gs": "x-goog-copy-source", "az": "x-ms-copy-source"}


def written(server: FaultServer) -> dict[str, str]:
    """The headers of the one PUT."""
    (request,) = server.asked("PUT")
    return dict(request.headers)


@pytest.mark.parametrize("dialect", CLOUDS)
def test_what_is_put_carries_its_type_and_metadata(dialect: Dialect) -> None:
    async def story() -> None:
        with fault_server() as server:
            async with opened(dialect, server) as origin:
                facts = await put(origin, "dir/a b", b"12345", user={"owner": "me"}, content_type="application/x-tar")
                headers = written(server)
                assert server.objects()["/bucket/dir/a b"].data == b"12345"
                assert headers[f"{META[dialect]}owner"] == "me"
                assert headers[CONTENT_TYPE[dialect]] == "application/x-tar"
                assert (facts.size, facts.etag) == (5, server.objects()["/bucket/dir/a b"].tag)
                assert origin.statistics().bytes_written == 5

    asyncio.run(story())


@pytest.mark.parametrize(
    ("dialect", "header", "absent", "same"),
    [
        ("s3", "if-none-match", "*", None),
        ("s3", "if-match", None, '"old"'),
        ("az", "if-none-match", "*", None),
        ("az", "if-match", None, '"old"'),
        ("gs", "x-goog-if-generation-match", "0", "7"),
    ],
)
def test_a_condition_is_the_stores_to_judge(
    dialect: Dialect, header: str, absent: str | None, same: str | None
) -> None:
    """Google's go by generation, which a HEAD tells for the ETag."""

    async def story() -> None:
        with fault_server() as server:
            async with opened(dialect, server) as origin:
                await put(origin, "new", b"x", if_absent=True)
                assert written(server).get(header) == absent
                server.forget()
                server.put("/bucket/object", Served(b"old", etag="old", headers={"x-goog-generation": "7"}))
                await put(origin, "object", b"x", if_match="old")
                assert written(server).get(header) == same
                server.misbehave("/bucket/object", Fault("status", status=412, methods=("PUT",)))
                server.put("/bucket/object", Served(b"old", etag="old", headers={"x-goog-generation": "8"}))
                with pytest.raises(PreconditionFailed):
                    await put(origin, "object", b"x", if_match="old")
                with pytest.raises(PreconditionFailed):
                    await put(origin, "object", b"x", if_absent=True)
                assert server.objects()["/bucket/object"].data == b"old"

    asyncio.run(story())


def test_google_is_not_asked_to_replace_what_is_another_version_already() -> None:
    async def story() -> None:
        with fault_server() as server:
            server.put("/bucket/object", Served(b"old", etag="old", headers={"x-goog-generation": "7"}))
            async with opened("gs", server) as origin:
                for key in ("object", "missing"):
                    with pytest.raises(PreconditionFailed):
                        await put(origin, key, b"x", if_match="other")
            assert server.asked("PUT") == []

    asyncio.run(story())


@pytest.mark.parametrize("dialect", CLOUDS)
@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, BackendDenied), (401, BackendDenied), (500, BackendUnavailable), (503, BackendBusy), (429, BackendBusy)],
)
def test_a_write_that_is_refused_leaves_the_old_object(
    dialect: Dialect, status: int, kind: type[ShardmillError]
) -> None:
    async def story() -> None:
        with fault_server() as server:
            server.put("/bucket/object", b"old")
            server.misbehave("/bucket/object", Fault("status", status=status, methods=("PUT",)))
            async with opened(dialect, server) as origin:
                with pytest.raises(kind) as caught:
                    await put(origin, "object", b"new")
                assert type(caught.value) is kind
                assert server.objects()["/bucket/object"].data == b"old"
                server.misbehave("/bucket/object", Fault("status", status=503, times=1, methods=("PUT",)))
                await put(origin, "object", b"new")
                assert server.objects()["/bucket/object"].data == b"new"

    asyncio.run(story())


@pytest.mark.parametrize("dialect", CLOUDS)
def test_a_copy_is_the_stores_to_make(dialect: Dialect) -> None:
    async def story() -> None:
        with fault_server() as server:
            server.put("/bucket/dir/object one", b"x")
            async with opened(dialect, server, prefix="dir/") as origin:
                assert isinstance(origin, WriteOrigin)
                await origin.copy("object one", "two")
                assert server.objects()["/bucket/dir/two"].data == b"x"
                with pytest.raises(ObjectNotFound):
                    await origin.copy("none", "two")
            request, _ = server.asked("PUT")
            assert request.path == "/bucket/dir/two"
            # Google decodes the name; the library encodes all of it, slashes too.
            slash = "%2F" if dialect == "gs" else "/"
            assert request.headers[COPY[dialect]].endswith(f"bucket/dir{slash}object%20one")

    asyncio.run(story())


@pytest.mark.parametrize("dialect", CLOUDS)
def test_a_key_that_cannot_be_carried_is_not_written_elsewhere(dialect: Dialect) -> None:
    async def story() -> None:
        with fault_server() as server:
            async with opened(dialect, server) as origin:
                assert isinstance(origin, WriteOrigin)
                for key in ("a/", "/a", "a//b", "a/../b", ".", *(("a\\b",) if dialect == "az" else ())):
                    with pytest.raises(BadRequest):
                        await put(origin, key, b"x")
                    with pytest.raises(BadRequest):
                        await put(origin, key, bytes(20 << 20))
                    with pytest.raises(BadRequest):
                        await origin.delete(key)
                    with pytest.raises(BadRequest):
                        await origin.copy("good", key)
            assert server.requests == []

    asyncio.run(story())


def test_a_conditional_upload_is_bounded_by_memory() -> None:
    async def story(origin: ReadOrigin, server: FaultServer) -> None:
        taken = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal taken
            async for piece in pieces(bytes(MAX_CONDITIONAL * 2), 1 << 20):
                taken += len(piece)
                yield piece

        with pytest.raises(BadRequest, match="64 MiB"):
            await put(origin, "object", body(), if_absent=True)
        assert taken <= MAX_CONDITIONAL + (2 << 20)
        assert server.requests == []

    async def run() -> None:
        with fault_server() as server:
            async with opened("s3", server) as origin:
                await story(origin, server)

    asyncio.run(run())


def test_the_web_is_read_only() -> None:
    async def story() -> None:
        with fault_server() as server:
            async with opened("http", server, origins=QUICK) as origin:
                assert not isinstance(origin, WriteOrigin)

    asyncio.run(story())
