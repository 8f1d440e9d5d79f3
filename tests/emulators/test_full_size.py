"""Promises of the cache in the size that they are given in: a shard of 64 MB, 2 GB through a disk of 256 MB."""

import pytest

from tests.storage.cache import test_promises as promises
from tests.storage.cache.test_promises import (
    FULL,
    node,
    origin,
    test_a_small_disk_is_read_through_by_more_than_it_holds,
    test_two_hundred_readers_of_a_cold_shard_cause_one_fetch,
)

__all__ = [
    "node",
    "origin",
    "test_a_small_disk_is_read_through_by_more_than_it_holds",
    "test_two_hundred_readers_of_a_cold_shard_cause_one_fetch",
]


@pytest.fixture
def size() -> promises.Size:
    return FULL
