"""Fixtures of the shard tests."""

from pathlib import Path

import pytest

from tests.shards.archives import make_picture_shards, picture_shards


@pytest.fixture(scope="session")
def shard_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG shards: real ones where they are given, else made here."""
    return picture_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(params=["given", "made"])
def shard_path(request: pytest.FixtureRequest, shard_paths: list[Path], tmp_path: Path) -> Path:
    """One of the given shards, and one made here."""
    return shard_paths[0] if request.param == "given" else make_picture_shards(tmp_path)[0]
