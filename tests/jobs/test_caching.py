"""Jobs of the kinds prefetch and evict, on a node before a web server or an emulated S3 that counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client, JobFailed
from shardmill.core.errors import BadRequest, BucketNotFound, ObjectNotFound
from shardmill.jobs.caching import Pace
from shardmill.testing.node import running_node
from tests.jobs.support import wait_for
from tests.server.readers import wait_until
from tests.storage.cache.support import MIB, make
from tests.storage.cache.web import Served, Web, web

FAR = "gs://far"
NAMES = [f"train/{number}.tar" for number in range(4)]


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        for number, name in enumerate(NAMES):
            found.objects[f"shards/{name}"] = Served(make(3 * MIB + number, number), "v1")
        yield found


@pytest.fixture
def client(origin: Web, tmp_path: Path) -> Iterator[Client]:
    flags = ("--bucket", f"{FAR}={origin.url}/shards", "--bucket", "ais://pool", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as found:
        yield found


def cached(client: Client) -> dict[str, int]:
    return {found.key: found.cached for found in client.bucket(FAR).cached()}


def sizes(origin: Web, *names: str) -> dict[str, int]:
    return {name: len(origin.objects[f"shards/{name}"].data) for name in names}


def test_what_is_prefetched_is_read_from_the_disk(origin: Web, client: Client) -> None:
    client.bucket(FAR).object(NAMES[1]).get_range(0, 10)
    job = client.jobs.prefetch(FAR, template="train/{0..2}.tar")
    info = client.jobs.wait(job, timeout=60).job
    assert (info.state, info.done, info.total, info.manifest) == ("done", 3, 3, None)
    assert cached(client) == sizes(origin, *NAMES[:3])
    # A block was there.
    assert info.bytes_out == sum(sizes(origin, *NAMES[:3]).values()) - MIB
    assert info.bytes_done == info.bytes == sum(sizes(origin, *NAMES[:3]).values())
    origin.reset()
    for name in NAMES[:3]:
        assert client.bucket(FAR).object(name).read() == origin.objects[f"shards/{name}"].data
    assert origin.sent == 0


def test_asked_for_again_it_fetches_what_changed_and_what_is_gone(origin: Web, client: Client) -> None:
    client.jobs.wait(client.jobs.prefetch(FAR, names=NAMES), timeout=60)
    evicted = client.jobs.wait(client.jobs.evict(FAR, names=[NAMES[2], "train/never.tar"]), timeout=60).job
    assert (evicted.done, evicted.bytes_out >= len(origin.objects[f"shards/{NAMES[2]}"].data)) == (1, True)
    assert cached(client) == sizes(origin, NAMES[0], NAMES[1], NAMES[3])
    origin.reset()
    info = client.jobs.wait(client.jobs.prefetch(FAR, names=NAMES), timeout=60).job
    assert (info.done, info.found) == (4, 3)
    assert origin.sent == len(origin.objects[f"shards/{NAMES[2]}"].data)
    assert cached(client) == sizes(origin, *NAMES)


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"prefix": ""}, []),
        ({"prefix": "train/2"}, [0, 1, 3]),
        ({"template": "train/%d.tar"}, []),
        ({"template": "train/{1,3}.tar"}, [0, 2]),
        ({"prefix": "none"}, [0, 1, 2, 3]),
    ],
)
def test_evict_takes_what_is_chosen_of_what_is_there(
    origin: Web, client: Client, chosen: dict[str, str], left: list[int]
) -> None:
    client.jobs.wait(client.jobs.prefetch(FAR, names=NAMES), timeout=60)
    info = client.jobs.wait(client.jobs.evict(FAR, **chosen), timeout=60).job
    assert (info.state, info.done) == ("done", 4 - len(left))
    assert list(cached(client)) == [NAMES[number] for number in left]
    (bucket,) = client.cache().buckets
    assert (bucket.bytes > 0) == bool(left)


def test_a_prefetch_can_be_cancelled_and_goes_on(origin: Web, client: Client) -> None:
    origin.gate_at = MIB
    job = client.jobs.prefetch(FAR, names=NAMES[:1])
    wait_for(client, job.id, lambda details: bool(details.running), "it is at work")
    assert client.jobs.cancel(job).state == "cancelled"
    origin.gate.set()
    info = client.jobs.wait(client.jobs.prefetch(FAR, names=NAMES[:1]), timeout=60).job
    assert (info.state, info.done) == ("done", 1)
    assert cached(client) == sizes(origin, NAMES[0])


def test_an_object_that_fails_is_told_and_the_others_are_there(origin: Web, client: Client) -> None:
    del origin.objects[f"shards/{NAMES[0]}"]
    with pytest.raises(ObjectNotFound, match="nothing was begun"):
        client.jobs.prefetch(FAR, names=NAMES)
    origin.objects[f"shards/{NAMES[0]}"] = Served(make(100), "v1")
    with pytest.raises(BadRequest, match="no store behind it"):
        client.jobs.prefetch("ais://pool", names=["a"])
    with pytest.raises(BadRequest, match="no store behind it"):
        client.jobs.evict("ais://pool", prefix="")
    with pytest.raises(BucketNotFound):
        client.jobs.evict("gs://none", prefix="")


def test_without_room_a_prefetch_ends_and_says_so(origin: Web, tmp_path: Path) -> None:
    flags = ("--bucket", f"{FAR}={origin.url}/shards", "--workers", "1")
    environment = {"SHARDMILL_CACHE_CAPACITY": "2MiB"}
    with (
        running_node(*flags, data=tmp_path / "small", environ=environment) as node,
        Client(node.endpoint) as client,
    ):
        with pytest.raises(JobFailed, match="no room"):
            client.jobs.wait(client.jobs.prefetch(FAR, names=NAMES), timeout=60)
        assert client.bucket(FAR).object(NAMES[0]).read() == origin.objects[f"shards/{NAMES[0]}"].data


def test_with_a_rate_it_comes_in_pieces(origin: Web, client: Client) -> None:
    data = make(20 * MIB)
    origin.objects["shards/large"] = Served(data, "v1")
    info = client.jobs.wait(client.jobs.prefetch(FAR, names=["large"], rate=100 * MIB), timeout=60).job
    assert (info.request.rate, info.bytes_out) == (100 * MIB, len(data))
    pieces = [(8 * MIB * number, 8 * MIB * (number + 1)) for number in range(3)]
    assert [asked.range for asked in origin.gets()] == [
        f"bytes={start}-{min(stop, len(data) if start else stop) - 1}" for start, stop in pieces
    ]
    assert client.bucket(FAR).object("large").read() == data


def test_a_pace_is_shared_by_all_who_fetch() -> None:
    pace = Pace(1000)
    assert [pace.reserve(500, 10.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert pace.reserve(100, 11.2) == pytest.approx(0.3)
    assert pace.reserve(100, 20.0) == 0.0


def test_a_plan_says_what_would_be_fetched_and_evicted_and_does_nothing(origin: Web, client: Client) -> None:
    client.bucket(FAR).object(NAMES[0]).read()
    client.bucket(FAR).object(NAMES[1]).get_range(0, 10)
    wait_until(lambda: cached(client) == {**sizes(origin, NAMES[0]), NAMES[1]: MIB}, "what was read is there")
    found, whole = cached(client), sizes(origin, *NAMES)
    plan = client.jobs.plan_prefetch(FAR, names=NAMES)
    assert [(each.object, each.size, each.done) for each in plan.objects] == [
        (name, whole[name], name == NAMES[0]) for name in NAMES
    ]
    assert (plan.total, plan.done, plan.bytes) == (4, 1, sum(whole.values()))
    assert plan.left == sum(whole.values()) - sum(found.values())
    plan = client.jobs.plan_evict(FAR, prefix="train/")
    assert [(each.object, each.size, each.done) for each in plan.objects] == [
        (name, size, False) for name, size in found.items()
    ]
    assert (plan.total, plan.done, plan.left) == (2, 0, sum(found.values()))
    assert client.jobs.list() == []
    assert cached(client) == found
    with pytest.raises(ObjectNotFound):
        client.jobs.plan_prefetch(FAR, names=["train/never.tar"])
