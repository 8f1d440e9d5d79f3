"""Nodes that these tests speak to in bytes: one with the usual deadlines, one in a hurry."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.testing.node import running_node
from tests.server.wire import Wire

MAX_OBJECT = 100_000_000  # bytes


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory behind `ais://notes`."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="session")
def wire(shards: Path, notes: Path) -> Iterator[Wire]:
    """`ais://pool`; `gs://sharded-imagenet`, read-only; `ais://notes`, a directory that can be written."""
    buckets = ["ais://pool", f"gs://sharded-imagenet=dir:{shards}", f"ais://notes=dir-rw:{notes}"]
    flags = [word for bucket in buckets for word in ("--bucket", bucket)]
    environ = {"SHARDMILL_STORAGE_MAX_OBJECT": str(MAX_OBJECT)}
    with running_node(*flags, "--workers", "2", "--durability", "kill", environ=environ) as node:
        yield Wire(node, (str(shards), str(notes)))


@pytest.fixture(scope="session")
def hasty(shards: Path) -> Iterator[Wire]:
    """Waits a second or two where others wait a minute, and holds few connections."""
    settings = {
        "HEADER_TIMEOUT": "1s",
        "IDLE_TIMEOUT": "60s",
        "BODY_TIMEOUT": "1s",
        "SEND_TIMEOUT": "1s",
        "MAX_CONNECTIONS": "600",
    }
    environ = {f"SHARDMILL_SERVER_{name}": value for name, value in settings.items()}
    buckets = ("--bucket", "ais://pool", "--bucket", f"gs://sharded-imagenet=dir:{shards}")
    with running_node(*buckets, "--workers", "2", "--durability", "kill", environ=environ) as node:
        yield Wire(node, (str(shards),))
