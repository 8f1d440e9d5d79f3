"""What every test of the engine gets: children of other suites' nodes are not counted as its own."""

from collections.abc import Iterator

import pytest

from tests.etl.support import NEIGHBOURS, children


@pytest.fixture(autouse=True)
def neighbours() -> Iterator[None]:
    NEIGHBOURS.update(children())
    yield
    NEIGHBOURS.clear()
