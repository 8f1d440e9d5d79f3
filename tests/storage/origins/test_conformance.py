"""Each dialect, over the fault server as long as it behaves, keeps what every origin promises."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Literal

from shardmill.core.origins import ReadOrigin
from shardmill.testing.faults import FaultServer, Served
from shardmill.testing.origins import ListSuite, ReadSuite
from tests.storage.origins.support import Dialect, opened


class OverFaultServer(ReadSuite):
    dialect: ClassVar[Dialect]
    prefix: ClassVar[str] = ""
    lists: ClassVar[Literal["by key", "by folder"]] = "by key"

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        with FaultServer() as self.server:
            self.server.lists = self.lists
            async with opened(self.dialect, self.server, prefix=self.prefix) as origin:
                yield origin

    async def place(self, origin: ReadOrigin, key: str, data: bytes) -> None:
        self.server.put(f"/bucket/{self.prefix}{key}", Served(data))


class TestS3(OverFaultServer, ListSuite):
    dialect = "s3"


class TestS3BelowAPrefix(OverFaultServer, ListSuite):
    dialect = "s3"
    prefix = "data/set-"


class TestS3ByFolder(TestS3):
    lists = "by folder"


class TestS3ByFolderBelowAPrefix(TestS3BelowAPrefix):
    lists = "by folder"


class TestGoogle(OverFaultServer, ListSuite):
    """Its listings come through the library, since the token is the library's to send."""

    dialect = "gs"


class TestGoogleBelowAPrefix(OverFaultServer, ListSuite):
    dialect = "gs"
    prefix = "data/set-"


class TestAzure(OverFaultServer, ListSuite):
    dialect = "az"


class TestWeb(OverFaultServer):
    dialect = "http"


class TestWebBelowAPrefix(OverFaultServer):
    dialect = "http"
    prefix = "data/set-"
