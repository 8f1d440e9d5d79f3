"""A node for jobs: real shards, destinations of every backing, and functions over samples and over objects."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node
from tests.jobs.support import SOURCE


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory behind `gs://stored`, which can be written."""
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="session")
def node(shards: Path, stored: Path) -> Iterator[RunningNode]:
    """Serves the shards as `gs://sharded-imagenet`, read-only, and `gs://stored`, which can be written."""
    buckets = ("--bucket", f"{SOURCE}=dir:{shards}", "--bucket", f"gs://stored=dir-rw:{stored}")
    with running_node(*buckets, "--workers", "2", "--durability", "kill") as running:
        yield running


@pytest.fixture
def client(node: RunningNode) -> Iterator[Client]:
    with Client(node.endpoint) as client:
        yield client


@pytest.fixture
def destination(client: Client) -> Iterator[str]:
    """The URI of an empty bucket of this test's own."""
    handle = client.bucket("ais://destination")
    handle.create()
    yield handle.uri
    handle.remove(force=True)
