"""Objects that are stored through a cache: what has passed is there for whoever reads it, of the version it became."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import aiohttp
import pytest

from shardmill.client import Client
from shardmill.core.conditions import Conditions
from shardmill.core.errors import BackendUnavailable, BadRequest, ObjectNotFound
from shardmill.core.origins import OriginFacts
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.cache.store import CachedBucket
from shardmill.storage.pool import Stored
from shardmill.testing.faults import Fault, FaultServer, fault_server
from shardmill.testing.node import running_node
from tests.etl.over_http import Served as Asking
from tests.server.readers import wait_until as wait_for
from tests.storage.cache.support import MIB, disk_use, make, open_cache, read, run, wait_until
from tests.storage.cache.test_promises import configured
from tests.storage.cache.web import Served, Web, WebOrigin, web

PIECE = 300_000
SLACK = 64 << 10  # bytes: what a file system takes beyond what is counted


class WritableOrigin(WebOrigin):
    """Stores into the web server, and does before its answer what it is told."""

    def __init__(self, server: Web, url: str, session: aiohttp.ClientSession) -> None:
        super().__init__(url, session)
        self.server = server
        self.stored: Callable[[], None] | None = None
        """Called when the store has an object, and nobody knows it."""
        self.gates: dict[bytes, asyncio.Event] = {}
        """What the answers wait for, by the first byte of an object."""

    async def put(
        self,
        key: str,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        content_type: str | None,
        if_match: str | None,
        if_absent: bool,
    ) -> OriginFacts:
        data = b"".join([bytes(piece) async for piece in body])
        etag = blake2b(data, digest_size=8).hexdigest()
        self.server.objects[key] = Served(data, etag)
        if self.stored is not None:
            self.stored()
        if data[:1] in self.gates:
            await self.gates[data[:1]].wait()
        facts = await self.head(key)
        if facts.etag == etag:
            return facts
        return replace(facts, etag=etag, size=len(data), is_confirmed=False)

    async def delete(self, key: str) -> None:
        self.server.objects.pop(key, None)

    async def copy(self, key: str, target: str) -> None:
        self.server.objects[target] = self.server.objects[key]


class Maker:
    """Makes the origin of a cache, and has it then."""

    def __init__(self, server: Web) -> None:
        self._server = server
        self.made: WritableOrigin

    def __call__(self, url: str, session: aiohttp.ClientSession) -> WebOrigin:
        self.made = WritableOrigin(self._server, url, session)
        return self.made


async def pieces(data: bytes, size: int = PIECE) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def put(store: CachedBucket, key: str, data: bytes, *, is_announced: bool = True, piece: int = PIECE) -> Stored:
    return await store.put(
        key,
        pieces(data, piece),
        size=len(data) if is_announced else None,
        user={},
        conditions=Conditions(),
        checksum=None,
    )


@pytest.mark.parametrize("revalidate", ["always", "ttl", "never"])
@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("size", [0, 1, MIB, 5 * MIB + 7])
def test_what_was_stored_is_read_without_the_origin(
    tmp_path: Path, size: int, is_announced: bool, revalidate: str
) -> None:
    """But for the question whether it is still current, where the policy asks that; in the next process, too."""
    policy = CachePolicy(revalidate=revalidate)  # type: ignore[arg-type]  # one of its values
    old, new = make(2 * MIB, 1), make(size, 2)

    async def story(server: Web) -> None:
        maker = Maker(server)
        async with open_cache(server, tmp_path / "data", policy, client=maker) as store:
            server.objects["key"] = Served(old, "old")
            assert await read(store, "key") == old
            before = store.statistics()
            stored = await put(store, "key", new, is_announced=is_announced)
            assert not stored.created
            server.reset()
            assert await read(store, "key") == new
            assert server.gets() == []
            assert len(server.heads()) == (1 if revalidate == "always" else 0)
            after = store.statistics()
            assert (after.fetches, after.fetched, after.misses) == (before.fetches, before.fetched, before.misses)
            assert (after.objects, after.hits) == (1, before.hits + (1 if new else 0))
            assert (await store.head("key")).etag == stored.meta.etag
            assert [(found.key, found.size) for found in store.cached("")] == [("key", size)]
            assert after.bytes == store.disk.used
            # The old one may be getting its name while it leaves.
            await wait_until(lambda: len([path for path in (tmp_path / "data").rglob("*") if path.is_file()]) == 1)
            assert disk_use(tmp_path / "data") <= store.disk.used + SLACK
        server.reset()
        async with open_cache(server, tmp_path / "data", policy, client=maker) as store:
            assert await read(store, "key") == new
            assert server.gets() == []
            assert store.disk.used == after.bytes

    with web() as server:
        run(story(server))


def test_what_comes_in_tiny_pieces_is_kept(tmp_path: Path) -> None:
    """More of them than one call of the kernel takes."""
    data = make(2 * MIB + 3)

    async def story(server: Web) -> None:
        async with open_cache(server, tmp_path / "data", client=Maker(server)) as store:
            await put(store, "key", data, piece=512)
            assert await read(store, "key") == data
            assert server.gets() == []

    with web() as server:
        run(story(server))


def test_what_somebody_else_replaced_at_once_is_not_kept(tmp_path: Path) -> None:
    mine, other = make(2 * MIB, 1), make(MIB, 2)

    async def story(server: Web) -> None:
        maker = Maker(server)
        async with open_cache(server, tmp_path / "data", CachePolicy(revalidate="never"), client=maker) as store:
            maker.made.stored = lambda: server.objects.update(key=Served(other, "other"))
            stored = await put(store, "key", mine)
            assert stored.meta.size == len(mine)
            assert (store.statistics().objects, store.disk.used) == (0, 0)
            assert await read(store, "key") == other

    with web() as server:
        run(story(server))


@pytest.mark.parametrize("is_first", [True, False])
def test_two_who_store_the_same_object_leave_what_the_origin_has(tmp_path: Path, is_first: bool) -> None:
    """However their answers come: who reads gets what is there, never what it was."""
    one, two = b"1" + make(2 * MIB, 1), b"2" + make(MIB, 2)

    async def story(server: Web) -> None:
        maker = Maker(server)
        async with open_cache(server, tmp_path / "data", CachePolicy(revalidate="never"), client=maker) as store:
            origin = maker.made
            origin.gates = {b"1": asyncio.Event(), b"2": asyncio.Event()}
            first = asyncio.ensure_future(put(store, "key", one))
            await wait_until(lambda: "key" in server.objects)
            second = asyncio.ensure_future(put(store, "key", two))
            await wait_until(lambda: server.objects["key"].data == two)
            for name in (b"1", b"2") if is_first else (b"2", b"1"):
                origin.gates[name].set()
                await (first if name == b"1" else second)
            assert await read(store, "key") == two
            assert store.disk.used == store.statistics().bytes

    with web() as server:
        run(story(server))


def test_what_is_deleted_while_it_is_stored_is_not_kept(tmp_path: Path) -> None:
    data = b"1" + make(MIB)

    async def story(server: Web) -> None:
        maker = Maker(server)
        async with open_cache(server, tmp_path / "data", CachePolicy(revalidate="never"), client=maker) as store:
            maker.made.gates = {b"1": asyncio.Event()}
            # The store answers for what it had, and the other one removes that before the answer is here.
            storing = asyncio.ensure_future(put(store, "key", data))
            await wait_until(lambda: "key" in server.objects)
            await store.delete("key", conditions=Conditions())
            server.objects["key"] = Served(data, blake2b(data, digest_size=8).hexdigest())
            maker.made.gates[b"1"].set()
            await storing
            assert (store.statistics().objects, store.disk.used) == (0, 0)
            del server.objects["key"]
            with pytest.raises(ObjectNotFound):
                await read(store, "key")

    with web() as server:
        run(story(server))


@pytest.mark.parametrize("is_announced", [True, False])
def test_without_room_it_is_stored_and_not_kept(tmp_path: Path, is_announced: bool) -> None:
    data, pinned = make(3 * MIB, 1), make(2 * MIB, 2)

    async def story(server: Web) -> None:
        maker = Maker(server)
        server.objects["held"] = Served(pinned, "held")
        async with open_cache(server, tmp_path / "data", capacity=4 * MIB, client=maker) as store:
            source = await store.open("held", expected=(0, None))
            try:
                await source.ensure(0, len(pinned))
                used = store.disk.used
                await put(store, "key", data, is_announced=is_announced)
                assert server.objects["key"].data == data
                assert store.disk.used == used
                assert [found.key for found in store.cached("")] == ["held"]
            finally:
                source.close()
            assert await read(store, "key") == data
            huge = make(6 * MIB, 3)
            await put(store, "huge", huge, is_announced=is_announced)
            assert server.objects["huge"].data == huge
            assert store.disk.used <= store.disk.high

    with web() as server:
        run(story(server))


def test_what_is_stored_takes_the_room_of_what_was_used_least(tmp_path: Path) -> None:
    objects = {f"{number}": make(MIB, number) for number in range(8)}

    async def story(server: Web) -> None:
        maker = Maker(server)
        async with open_cache(server, tmp_path / "data", capacity=5 * MIB, client=maker) as store:
            for key, data in objects.items():
                await put(store, key, data)
                assert store.disk.used <= store.disk.high
            assert store.statistics().evicted
            server.reset()
            assert await read(store, "7") == objects["7"]
            assert server.gets() == []
            assert await read(store, "0") == objects["0"]
            assert len(server.gets()) == 1
        assert disk_use(tmp_path / "data") <= 5 * MIB + SLACK

    with web() as server:
        run(story(server))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    old, new = make(MIB, 1), make(3 * MIB, 2)

    async def story(server: Web) -> None:
        maker = Maker(server)
        server.objects["key"] = Served(old, "old")
        async with open_cache(server, tmp_path / "data", client=maker) as store:
            assert await read(store, "key") == old
            used = store.disk.used

            def refuse() -> None:
                server.objects["key"] = Served(old, "old")
                raise BackendUnavailable("no")

            maker.made.stored = refuse
            with pytest.raises(BackendUnavailable):
                await put(store, "key", new)
            with pytest.raises(BadRequest):
                await store.put(
                    "key", pieces(new), size=None, user={}, conditions=Conditions(), checksum=f"xxh3:{'0' * 32}"
                )
            assert store.disk.used == used
            server.reset()
            assert await read(store, "key") == old
            assert server.gets() == []
        assert disk_use(tmp_path / "data") <= used + SLACK

    with web() as server:
        run(story(server))


@pytest.fixture
def origin() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


def test_an_uploaded_object_is_read_without_a_get_of_the_store(origin: FaultServer, tmp_path: Path) -> None:
    data = make(3 * MIB + 5)
    given = configured(origin, tmp_path, "writable = true\n")
    with running_node(*given, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        handle = client.object("s3://far/a")
        handle.put(data)
        assert handle.read() == data
        assert origin.asked("GET", "/far/a") == []
        cache = client.cache()
        assert (cache.buckets[0].fetched, cache.buckets[0].misses) == (0, 0)
        assert abs(disk_use(tmp_path / "data" / "cache") - cache.used) <= SLACK


def test_a_node_that_is_killed_before_the_answer_has_nothing_wrong(origin: FaultServer, tmp_path: Path) -> None:
    """The store has the new object, and nobody was told so."""
    old, new = make(3 * MIB, 1), make(2 * MIB, 2)
    origin.put("/far/a", old)
    given = configured(origin, tmp_path, "writable = true\n")
    with running_node(*given, data=tmp_path / "data") as node:
        assert Asking(node).ask("GET", "/o/s3/far/a").body == old
        origin.misbehave("/far/a", Fault("silent", methods=("PUT",)))
        with socket.create_connection(Asking(node).address, timeout=60) as sock:
            sock.sendall(f"PUT /o/s3/far/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(new)}\r\n\r\n".encode())
            sock.sendall(new)
            wait_for(lambda: origin.objects()["/far/a"].data == new, "the store has it")
            node.kill()
    origin.misbehave("/far/a")
    with running_node(*given, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        assert client.object("s3://far/a").read() == new
        wait_for(lambda: not client.cache().buckets[0].filling, "all has arrived")
        assert abs(disk_use(tmp_path / "data" / "cache") - client.cache().used) <= SLACK
