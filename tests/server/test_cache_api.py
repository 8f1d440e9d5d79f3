"""`/api/cache` and the metrics of caches: what is on the disk of buckets with a store behind them, and what it cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from shardmill.core.api import CachedDetails, CachedPage, CacheInfo
from shardmill.testing.node import running_node
from tests.server.wire import Wire, wait_for
from tests.storage.cache.support import MIB, make
from tests.storage.cache.web import Served, Web, web

FAR = "gs://far"
Answer = TypeVar("Answer")


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        yield found


@pytest.fixture
def near(origin: Web, tmp_path: Path) -> Iterator[Wire]:
    """A node before the origin."""
    flags = ("--bucket", f"{FAR}={origin.url}/shards", "--bucket", "ais://pool", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data") as node:
        yield Wire(node, ())


def ask(wire: Wire, path: str, kind: type[Answer]) -> Answer:
    answer = wire.get(path)
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body, type=kind)


def test_a_cache_tells_what_it_has_and_what_it_cost(origin: Web, near: Wire) -> None:
    origin.objects["shards/a.bin"] = Served(make(3 * MIB + 7), "v1")
    origin.objects["shards/b.bin"] = Served(make(10 * MIB), "v1")
    empty = ask(near, "/api/cache", CacheInfo)
    assert (empty.used, [each.bucket for each in empty.buckets]) == (0, [FAR])
    assert 0 < empty.high < empty.capacity
    for _ in range(2):
        assert near.get("/o/gs/far/a.bin").status == 200
    near.get("/o/gs/far/b.bin", f"Range: bytes={2 * MIB}-{3 * MIB - 1}")
    assert near.get("/o/gs/far/none").status == 404
    wait_for(lambda: not ask(near, "/api/cache", CacheInfo).buckets[0].filling, "all has arrived")
    info = ask(near, "/api/cache", CacheInfo)
    (found,) = info.buckets
    assert (found.objects, found.hits, found.misses, found.passed, found.evicted) == (2, 1, 2, 0, 0)
    assert (found.served, found.fetched) == (2 * (3 * MIB + 7) + MIB, 4 * MIB + 7)
    assert info.used == found.bytes >= found.fetched
    assert found.requests == {"ok": 2, "object_not_found": 1}
    assert (found.fetches, found.fetch_seconds > 0) == (2, True)
    metrics = near.metrics()
    assert {name: value for name, value in metrics.items() if FAR in name and "created" not in name} == {
        f'shardmill_cache_objects{{bucket="{FAR}"}}': 2,
        f'shardmill_cache_bytes{{bucket="{FAR}"}}': found.bytes,
        f'shardmill_cache_fills{{bucket="{FAR}"}}': 0,
        f'shardmill_cache_served_bytes_total{{bucket="{FAR}"}}': found.served,
        f'shardmill_cache_passed_total{{bucket="{FAR}"}}': 0,
        f'shardmill_cache_revalidated_total{{bucket="{FAR}"}}': found.revalidated,
        f'shardmill_cache_evicted_total{{bucket="{FAR}"}}': 0,
        f'shardmill_cache_repaired_blocks_total{{bucket="{FAR}"}}': 0,
        f'shardmill_cache_reads_total{{bucket="{FAR}",outcome="hit"}}': 1,
        f'shardmill_cache_reads_total{{bucket="{FAR}",outcome="miss"}}': 2,
        f'shardmill_origin_bytes_total{{bucket="{FAR}"}}': found.fetched,
        f'shardmill_origin_written_bytes_total{{bucket="{FAR}"}}': 0,
        f'shardmill_origin_fetches_total{{bucket="{FAR}"}}': 2,
        f'shardmill_origin_first_byte_seconds_total{{bucket="{FAR}"}}': pytest.approx(found.fetch_seconds),
        f'shardmill_origin_requests_total{{bucket="{FAR}",status="ok"}}': 2,
        f'shardmill_origin_requests_total{{bucket="{FAR}",status="object_not_found"}}': 1,
    }
    assert metrics["shardmill_cache_used_bytes"] == info.used
    assert metrics["shardmill_cache_high_bytes"] == info.high


def test_a_configured_capacity_is_told(origin: Web, tmp_path: Path) -> None:
    room = {"SHARDMILL_CACHE_CAPACITY": "10MiB"}
    with running_node("--bucket", f"{FAR}={origin.url}/shards", data=tmp_path / "data", environ=room) as node:
        found = ask(Wire(node, ()), "/api/cache", CacheInfo)
        assert (found.capacity, found.high, found.used) == (10 * MIB, 9 * MIB, 0)


def test_cached_objects_are_listed_page_by_page(origin: Web, near: Wire) -> None:
    names = ["a/1", "a/2", "a.b", "b/é", "c"]
    for name in names:
        origin.objects[f"shards/{name}"] = Served(make(1000), "v1")
    for name in ("a/1", "a/2", "a.b", "b/%C3%A9"):
        assert near.get(f"/o/gs/far/{name}").status == 200
    keys, after = [], ""
    while True:
        page = ask(near, f"/api/cache/objects?bucket={FAR}&limit=2&after={after}", CachedPage)
        keys += [found.key for found in page.objects]
        if page.next is None:
            break
        assert len(page.objects) == 2
        after = page.next
    assert keys == ["a.b", "a/1", "a/2", "b/é"]
    below = ask(near, f"/api/cache/objects?bucket={FAR}&prefix=a/", CachedPage)
    assert [(found.key, found.size, found.cached, found.etag) for found in below.objects] == [
        ("a/1", 1000, 1000, "v1"),
        ("a/2", 1000, 1000, "v1"),
    ]
    assert below.next is None


def test_one_object_tells_its_ranges_version_and_age(origin: Web, near: Wire) -> None:
    origin.objects["shards/b.bin"] = Served(make(10 * MIB), "v1")
    path = f"/api/cache/object?object={FAR}/b.bin"
    assert ask(near, path, CachedDetails) == CachedDetails(None, [])
    for block in (2, 3, 7):
        near.get("/o/gs/far/b.bin", f"Range: bytes={block * MIB}-{block * MIB + 10}")
    wait_for(
        lambda: sum(stop - start for start, stop in ask(near, path, CachedDetails).ranges) == 3 * MIB,
        "the blocks have arrived",
    )
    details = ask(near, path, CachedDetails)
    assert details.ranges == [(2 * MIB, 4 * MIB), (7 * MIB, 8 * MIB)]
    found = details.object
    assert found is not None
    assert (found.size, found.cached, found.version, found.pinned) == (10 * MIB, 3 * MIB, "etag:v1", False)
    assert found.age is not None
    assert found.age >= 0
    assert ask(near, "/api/cache/object?object=ais://pool/a", CachedDetails) == CachedDetails(None, [])


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/cache/objects", 400, "bucket is missing"),
        ("/api/cache/objects?bucket=ais://pool", 400, "no store behind it"),
        ("/api/cache/objects?bucket=gs://none", 404, "gs://none"),
        ("/api/cache/objects?bucket=gs://far&limit=x", 400, "limit"),
        ("/api/cache/object", 400, "object is missing"),
        ("/api/cache/object?object=gs://far", 400, ""),
        ("/api/cache/object?object=gs://none/a", 404, "gs://none"),
        ("/api/cache?x=1", 400, "x"),
    ],
)
def test_wrong_questions_are_refused(near: Wire, path: str, status: int, said: str) -> None:
    answer = near.get(path)
    assert answer.status == status
    assert said in answer.body.decode()
