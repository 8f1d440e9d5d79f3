"""A real node for tests of the client and of its command."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node


@pytest.fixture(scope="session")
def node(shards: Path) -> Iterator[RunningNode]:
    """Serves the shards as `gs://sharded-imagenet`, read-only, beside a pool bucket `ais://pool`."""
    buckets = ("--bucket", f"gs://sharded-imagenet=dir:{shards}", "--bucket", "ais://pool")
    with running_node(*buckets, "--workers", "2") as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def fonts_are_open() -> None:
    """Matplotlib keeps the font files that it has once used."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle("x")
    figure.savefig(io.BytesIO())


@pytest.fixture
def client(node: RunningNode) -> Iterator[Client]:
    with Client(node.endpoint) as client:
        yield client
