"""Whole objects of a cache that the front keeps open: as long as they are current, and counted like others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node
from tests.etl.over_http import Answer
from tests.etl.over_http import Served as Asking
from tests.server.readers import open_files, wait_until
from tests.storage.cache.support import MIB, make
from tests.storage.cache.web import Served, Web, web

RAW = "/o/gs/far/a.bin"
DATA, OTHER = make(3 * MIB, 1), make(2 * MIB, 2)


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        found.objects["shards/a.bin"] = Served(DATA, "v1")
        yield found


@pytest.fixture
def node(origin: Web, tmp_path: Path) -> Iterator[RunningNode]:
    with running_node("--bucket", f"gs://far={origin.url}/shards", data=tmp_path / "data") as found:
        yield found


def is_open(node: RunningNode) -> bool:
    """A finished file of the cache is open. Whoever else reads one has closed it soon after the answer."""
    return any("/cache/" in file and "/part/" not in file for file in open_files(node.pid))


def fill(node: RunningNode) -> Asking:
    """Bring it, and read it until it is kept open."""
    asking = Asking(node)
    assert asking.ask("GET", RAW).body == DATA

    def reads() -> bool:
        assert asking.ask("GET", RAW).body == DATA
        return is_open(node)

    wait_until(reads, "it is not kept open")
    return asking


def shown(answer: Answer) -> dict[str, str]:
    """Headers but those of one answer."""
    return {name: value for name, value in answer.headers.items() if name not in ("date", "shardmill-request-id")}


def test_what_is_kept_open_is_answered_as_before_and_counted(origin: Web, tmp_path: Path) -> None:
    flags, answers = ("--bucket", f"gs://far={origin.url}/shards"), []
    for front in ("off", "on"):
        environ = {"SHARDMILL_SERVER_FRONT": front}
        with running_node(*flags, data=tmp_path / "data", environ=environ) as node, Client(node.endpoint) as client:
            # The same file for both nodes, that of the second is looked at once by whoever can repair it.
            asking = Asking(node) if front == "off" else fill(node)
            assert asking.ask("GET", RAW).body == DATA
            origin.reset()
            (before,) = client.cache().buckets
            found = [asking.ask("GET", RAW), asking.ask("HEAD", RAW)]
            (after,) = client.cache().buckets
            assert (after.hits, after.served) == (before.hits + 1, before.served + len(DATA))
            assert origin.asked == []
            answers.append([(answer.status, shown(answer), answer.body) for answer in found])
    assert answers[0] == answers[1]


def test_what_is_evicted_is_closed_and_brought_again(origin: Web, node: RunningNode) -> None:
    asking = fill(node)
    with Client(node.endpoint) as client:
        (found,) = client.bucket("gs://far").cached()
        assert found.readers == 0
        client.jobs.wait(client.jobs.evict("gs://far", names=["a.bin"]).id)
        assert not is_open(node)
        origin.reset()
        assert asking.ask("GET", RAW).body == DATA
        assert len(origin.gets()) == 1


def test_a_version_that_the_origin_has_since_is_seen_when_the_policy_asks(origin: Web, tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text(f'[[bucket]]\nuri = "gs://far"\nbacking = "{origin.url}/shards"\nttl = "1s"\n')
    with running_node("--config", str(config), data=tmp_path / "data") as node:
        asking = fill(node)
        origin.objects["shards/a.bin"] = Served(OTHER, "v2")
        wait_until(lambda: asking.ask("GET", RAW).body == OTHER, "the new version is not seen")
        assert asking.ask("GET", RAW).headers["etag"] == '"v2"'
        del origin.objects["shards/a.bin"]
        wait_until(lambda: asking.ask("GET", RAW).status == 404, "it is still there")
        assert not is_open(node)


def test_what_must_be_asked_for_each_time_is_not_kept(origin: Web, tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text(f'[[bucket]]\nuri = "gs://far"\nbacking = "{origin.url}/shards"\nrevalidate = "always"\n')
    with running_node("--config", str(config), data=tmp_path / "data") as node:
        asking = Asking(node)
        for data, etag in ((DATA, "v1"), (OTHER, "v2"), (DATA, "v3")):
            origin.objects["shards/a.bin"] = Served(data, etag)
            for _ in range(2):
                assert asking.ask("GET", RAW).body == data


def test_what_nobody_asks_for_is_closed(node: RunningNode) -> None:
    fill(node)
    wait_until(lambda: not is_open(node), "it stays open")


def test_what_is_damaged_on_the_disk_is_repaired(origin: Web, tmp_path: Path) -> None:
    flags = ("--bucket", f"gs://far={origin.url}/shards")
    with running_node(*flags, data=tmp_path / "data") as node:
        fill(node)
        assert node.terminate() == 0
    (path,) = [path for path in (tmp_path / "data" / "cache").rglob("*") if path.is_file()]
    with path.open("r+b") as file:
        file.seek(MIB + 5)
        file.write(b"damage")
    origin.reset()
    with running_node(*flags, data=tmp_path / "data") as node:
        fill(node)
    assert len(origin.gets()) == 1
