"""Lists that were announced: what follows the shard that is read is fetched from the store before it is asked for."""

from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from shardmill.client import Client
from shardmill.testing.node import running_node
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.server.readers import wait_until
from tests.storage.cache.test_node import make_shard
from tests.storage.cache.web import Served, Web, web

COUNT = 6
NAMES = [f"{number}.tar" for number in range(COUNT)]


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        for number, name in enumerate(NAMES):
            found.objects[f"shards/{name}"] = Served(make_shard(3, 300_000 + number), f"v{number}")
        yield found


def cached(client: Client) -> list[str]:
    return [info.key for info in client.bucket("gs://far").cached() if info.cached == info.size]


@pytest.mark.parametrize("is_transformed", [False, True])
def test_the_next_shards_of_an_announced_list_are_fetched_while_one_is_read(
    origin: Web, tmp_path: Path, is_transformed: bool
) -> None:
    """Two by default, and no more before they are read in their turn; nothing that is there comes twice."""
    environ = {"SHARDMILL_TRANSFORMS_LOOK_AHEAD": "0"}
    flags = ("--bucket", f"gs://far={origin.url}/shards", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data", environ=environ) as node, Client(node.endpoint) as client:
        spec = Asking(node).register(IDENTITY, decoder=None).uuid if is_transformed else None
        urls = client.expand_object_urls("gs://far", spec, "{0..5}.tar", seed=1 if is_transformed else None)
        bodies = []
        for number, url in enumerate(urls):
            with urlopen(url, timeout=60) as answer:
                bodies.append(answer.read())
            expected = NAMES[: number + 3]
            wait_until(lambda expected=expected: cached(client) == expected, f"{expected} are there")  # type: ignore[misc]
            assert len(origin.gets()) == len(expected)
        assert is_transformed or bodies == [origin.objects[f"shards/{name}"].data for name in NAMES]
        assert len(set(bodies)) == COUNT


def test_look_ahead_can_be_switched_off_and_a_missing_object_harms_nobody(origin: Web, tmp_path: Path) -> None:
    del origin.objects["shards/1.tar"]
    flags = ("--bucket", f"gs://far={origin.url}/shards", "--workers", "1")
    for depth in ("0", "3"):
        origin.reset()
        environ = {"SHARDMILL_CACHE_LOOK_AHEAD": depth}
        data = tmp_path / depth
        with running_node(*flags, data=data, environ=environ) as node, Client(node.endpoint) as client:
            urls = client.expand_object_urls("gs://far", template="{0..5}.tar")
            with urlopen(urls[0], timeout=60) as answer:
                assert answer.read() == origin.objects["shards/0.tar"].data
            expected = ["0.tar"] if depth == "0" else ["0.tar", "2.tar", "3.tar"]
            wait_until(lambda expected=expected: cached(client) == expected, f"{expected} are there")  # type: ignore[misc]
            with urlopen(urls[2], timeout=60) as answer:
                assert answer.read() == origin.objects["shards/2.tar"].data
