"""Both stores of this machine keep what every store promises."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from shardmill.core.sources import WriteStore
from shardmill.testing.stores import StoreSuite
from tests.storage.support import keeps_attributes, open_directory, open_pool, temporary_files


class TestPool(StoreSuite):
    def open_store(self, directory: Path) -> AbstractAsyncContextManager[WriteStore]:
        return open_pool(directory)

    def leftovers(self, directory: Path) -> Sequence[str]:
        return temporary_files(directory)


class TestPoolThatSurvivesAKillOnly(TestPool):
    def open_store(self, directory: Path) -> AbstractAsyncContextManager[WriteStore]:
        return open_pool(directory, durability="kill")


class TestDirectory(StoreSuite):
    holds_any_key = False
    keeps_user_metadata = keeps_attributes()
    knows_checksum = False
    versions_are_contents = False

    def open_store(self, directory: Path) -> AbstractAsyncContextManager[WriteStore]:
        directory.mkdir()
        return open_directory(directory)

    def leftovers(self, directory: Path) -> Sequence[str]:
        return sorted(str(path) for path in directory.glob("**/.shardmill-*"))


class TestDirectoryThatFollowsLinks(TestDirectory):
    def open_store(self, directory: Path) -> AbstractAsyncContextManager[WriteStore]:
        directory.mkdir()
        return open_directory(directory, links="follow", is_durable=False)
