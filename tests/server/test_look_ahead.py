"""An announced list: the next shard is begun while one is read, and nothing is lost where that was in vain."""

import contextlib
import hashlib
import io
import json
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node

SAMPLES = 20
SHARDS = 4
FUNCTIONS = """
import random, time

def draw(sample):
    time.sleep(0.002)
    sample["txt"] = f"{random.random()} " * 500
    return sample
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ahead")
    for shard in range(SHARDS):
        with tarfile.open(directory / f"s-{shard}.tar", "w") as archive:
            for number in range(SAMPLES):
                member = tarfile.TarInfo(f"{shard}{number:03d}.txt")
                member.size = 4
                archive.addfile(member, io.BytesIO(b"text"))
    (directory / "functions.py").write_text(FUNCTIONS)
    return directory


@pytest.fixture
def started(directory: Path) -> Iterator[tuple[RunningNode, Client, str]]:
    with (
        running_node("--bucket", f"gs://own=dir:{directory}", "--workers", "2") as node,
        Client(node.endpoint) as client,
    ):
        yield node, client, client.transforms.add(f"{directory / 'functions.py'}:draw", "draw").uuid


def samples_done(client: Client) -> int:
    total = 0.0
    for line in client.metrics().splitlines():
        if line.startswith("shardmill_transform_samples_total{"):
            total += float(line.rpartition(" ")[2])
    return int(total)


def has_done(client: Client, samples: int) -> bool:
    return samples_done(client) == samples


def fetch(url: str) -> tuple[str, dict[str, str]]:
    with urllib.request.urlopen(url, timeout=30) as response:
        data = response.read()
        assert len(tarfile.open(fileobj=io.BytesIO(data)).getnames()) == SAMPLES
        return hashlib.sha256(data).hexdigest(), dict(response.headers)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_next_shard_is_done_before_it_is_asked_for(
    started: tuple[RunningNode, Client, str], seed: int | None
) -> None:
    _, client, spec = started
    urls = client.expand_object_urls("gs://own", spec, "s-{0..3}.tar", seed=seed)
    found = []
    for number, url in enumerate(urls):
        found.append(fetch(url)[0])
        expected = min(number + 2, SHARDS) * SAMPLES
        wait_until(partial(has_done, client, expected))
    assert len(set(found)) == SHARDS
    assert samples_done(client) == SHARDS * SAMPLES, "nothing was done twice"
    again = [fetch(url)[0] for url in urls]
    assert (again == found) is (seed is not None)


def test_what_was_begun_without_a_seed_is_the_first_readers_alone(started: tuple[RunningNode, Client, str]) -> None:
    _, client, spec = started
    urls = client.expand_object_urls("gs://own", spec, "s-{0..1}.tar")
    fetch(urls[0])
    wait_until(lambda: samples_done(client) == 2 * SAMPLES)
    first, headers = fetch(urls[1])
    assert samples_done(client) == 2 * SAMPLES
    second, _ = fetch(urls[1])
    assert first != second
    assert samples_done(client) == 3 * SAMPLES
    # The seed that was drawn ahead is the one that the reader is told.
    with client.object("gs://own/s-1.tar").get(spec, seed=int(headers["Shardmill-Seed"])) as reader:
        assert hashlib.sha256(reader.read()).hexdigest() == first


def test_an_unannounced_url_begins_nothing_else(started: tuple[RunningNode, Client, str]) -> None:
    _, client, spec = started
    fetch(client.object_url("gs://own", "s-0.tar", spec))
    fetch(client.object_url("gs://own", "s-1.tar", spec))
    assert samples_done(client) == 2 * SAMPLES


def test_lists_that_are_not_read_stop_costing_anything(started: tuple[RunningNode, Client, str]) -> None:
    """A missing object in the list, and names of no registered version, harm nobody."""
    _, client, spec = started
    urls = client.expand_object_urls("gs://own", spec, names=["s-0.tar", "missing.tar", "s-1.tar"])
    fetch(urls[0])
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(urls[1])
    caught.value.close()
    assert caught.value.code == 404
    fetch(urls[2])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"paths": "x"}', b'{"paths": ["/x/gs/own/s-0.tar"]}', b'{"paths": ["/t/gs/own/x"], "a": 1}']
)
def test_a_bad_announcement_is_refused(started: tuple[RunningNode, Client, str], body: bytes) -> None:
    node, _, _ = started
    request = urllib.request.Request(f"{node.endpoint}/api/lookahead", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(urllib.request.urlopen(request, timeout=10))
    with caught.value as error:
        assert error.code == 400
        assert json.loads(error.read())["code"] == "bad_request"


def test_urls_are_made_though_nobody_listens() -> None:
    urls = Client("http://127.0.0.1:9").expand_object_urls("gs://own", "draw@0123456789ab", "s-{0..3}.tar")
    assert len(urls) == 4
