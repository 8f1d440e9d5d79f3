"""Stores that speak S3 over plain HTTP are read without the library, and tell the same through it and past it."""

import asyncio
from collections.abc import Iterator

import pytest

from shardmill.core.errors import BackendDenied, BackendUnavailable
from shardmill.core.origins import DrawnRead
from shardmill.core.values import Secret
from shardmill.storage.origins.remote import RemoteOrigin
from shardmill.testing.faults import Fault, FaultServer, MadeUp, Served, fault_server
from shardmill.testing.origins import read
from tests.storage.origins.support import Dialect, opened

DATA = MadeUp(3_000_000)[:]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.mark.parametrize("dialect", ["s3", "gs", "az", "http"])
def test_long_bodies_are_received_by_threads_where_threads_can(server: FaultServer, dialect: Dialect) -> None:
    server.put("/bucket/a b/ü+.tar", DATA)

    async def story() -> None:
        async with opened(dialect, server) as origin:
            async with origin.read("a b/ü+.tar") as reading:
                assert isinstance(reading, DrawnRead)
                assert reading.is_drawn == (dialect in ("s3", "http"))
            assert (await read(origin, "a b/ü+.tar", start=1000, stop=2_999_000))[0] == DATA[1000:2_999_000]

    asyncio.run(story())


@pytest.mark.parametrize("faults", [(), (Fault("no_etag"),), (Fault("weak_etag"),)], ids=["etag", "none", "weak"])
def test_a_reading_tells_what_a_head_tells(server: FaultServer, faults: tuple[Fault, ...]) -> None:
    """Else each would take the other's version for a change."""
    server.put("/bucket/key", Served(DATA, content_type="image/png", headers={"x-amz-meta-Made-By": "somebody"}))
    both = tuple(Fault(fault.kind, methods=("GET", "HEAD")) for fault in faults)

    async def story() -> None:
        async with opened("s3", server) as origin:
            server.misbehave("/bucket/key", *both)
            told = await origin.head("key")
            async with origin.read("key") as reading:
                assert reading.facts == told
            assert told.user == {"made-by": "somebody"}
            assert told.content_type == "image/png"

    asyncio.run(story())


def test_a_request_is_signed_with_all_that_decides_its_answer(server: FaultServer) -> None:
    served = server.put("/bucket/key", DATA)

    async def story() -> None:
        async with opened("s3", server) as origin:
            await read(origin, "key", start=5, stop=10, version=f"etag:{served.tag}")
        async with opened("s3", server, access_key_id="", secret_access_key=Secret(), anonymous=True) as origin:
            await read(origin, "key")

    asyncio.run(story())
    signed, anonymous = server.asked("GET", "/bucket/key")
    assert "SignedHeaders=host;if-match;range;x-amz-content-sha256;x-amz-date," in signed.headers["authorization"]
    assert signed.headers["range"] == "bytes=5-9"
    assert {signed.headers["accept-encoding"], anonymous.headers["accept-encoding"]} == {"identity"}
    assert "authorization" not in anonymous.headers


def test_without_a_length_or_keys_nothing_is_read(server: FaultServer) -> None:
    server.put("/bucket/key", DATA)

    async def story() -> None:
        async with opened("s3", server, access_key_id="", secret_access_key=Secret()) as origin:
            assert isinstance(origin, RemoteOrigin)
            with pytest.raises(BackendDenied):
                await read(origin, "key")
        assert not server.requests
        async with opened("s3", server) as origin:
            for kind in ("chunked", "unending"):
                server.misbehave("/bucket/key", Fault("chunked" if kind == "chunked" else "unending"))
                with pytest.raises(BackendUnavailable):
                    await read(origin, "key")

    asyncio.run(story())
