"""What every origin promises, kept over servers that others wrote.

Google's XML interface has no emulator of its own. moto's S3 is near enough to it for reading, writing and listing, but
knows neither its metadata nor its conditions nor its way to copy; fake-gcs-server knows how to read by it. The rest is
checked by the shape of the requests alone, in `tests/storage/origins`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.origins import ReadOrigin
from shardmill.core.values import Seconds, Secret
from shardmill.storage.origins import open_origin
from shardmill.testing.emulators import (
    ACCESS_KEY,
    ACCOUNT,
    ACCOUNT_KEY,
    Emulator,
    make_azure_container,
    make_gcs_bucket,
    make_moto_bucket,
    make_seaweedfs_bucket,
    upload_gcs,
)
from shardmill.testing.origins import PLAIN_KEYS, ListSuite, ReadSuite, WriteSuite

PATIENT = OriginSettings(idle_timeout=Seconds(30))


@asynccontextmanager
async def opened(settings: BucketSettings) -> AsyncIterator[ReadOrigin]:
    async with open_origin(settings, PATIENT, environ={}, home=Path("/nonexistent")) as origin:
        yield origin


class TestS3OnMoto(WriteSuite):
    prefix: ClassVar[str] = ""

    @pytest.fixture(autouse=True)
    def _server(self, moto: Emulator) -> None:
        self.server = moto

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        name = make_moto_bucket(self.server)
        settings = BucketSettings(
            f"s3://{name}",
            f"s3://{name}",
            endpoint=self.server.endpoint,
            prefix=self.prefix,
            access_key_id="name",
            secret_access_key=Secret("secret"),
        )
        async with opened(settings) as origin:
            yield origin


class TestS3OnMotoBelowAPrefix(TestS3OnMoto):
    prefix = "sets/one-"


class TestS3OnSeaweedfs(WriteSuite):
    """A store that verifies signatures, and keeps what it is given in folders of its own."""

    @pytest.fixture(autouse=True)
    def _server(self, seaweedfs: Emulator) -> None:
        self.server = seaweedfs

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        name = make_seaweedfs_bucket(self.server)
        settings = BucketSettings(
            f"s3://{name}",
            f"s3://{name}",
            endpoint=self.server.endpoint,
            access_key_id=ACCESS_KEY[0],
            secret_access_key=Secret(ACCESS_KEY[1]),
        )
        async with opened(settings) as origin:
            yield origin


class TestGoogleOnMoto(WriteSuite):
    keeps_user_metadata = False
    judges_conditions = False
    copies = False

    @pytest.fixture(autouse=True)
    def _server(self, moto: Emulator) -> None:
        self.server = moto

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        name = make_moto_bucket(self.server)
        settings = BucketSettings(f"gs://{name}", f"gs://{name}", endpoint=self.server.endpoint, token=Secret("token"))
        async with opened(settings) as origin:
            yield origin


class TestGoogleOnFakeGcs(ListSuite):
    @pytest.fixture(autouse=True)
    def _server(self, fake_gcs: Emulator) -> None:
        self.server = fake_gcs

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        self.bucket = make_gcs_bucket(self.server)
        settings = BucketSettings(
            f"gs://{self.bucket}", f"gs://{self.bucket}", endpoint=self.server.endpoint, token=Secret("token")
        )
        async with opened(settings) as origin:
            yield origin

    async def place(self, origin: ReadOrigin, key: str, data: bytes) -> None:
        upload_gcs(self.server, self.bucket, key, data)


class TestAzureOnAzurite(WriteSuite):
    @pytest.fixture(autouse=True)
    def _server(self, azurite: Emulator) -> None:
        self.server = azurite

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        name = make_azure_container(self.server)
        settings = BucketSettings(
            f"az://{name}",
            f"az://{name}",
            endpoint=self.server.endpoint,
            account=ACCOUNT,
            account_key=Secret(ACCOUNT_KEY),
        )
        async with opened(settings) as origin:
            yield origin


class TestWebOnNginx(ReadSuite):
    has_folders = True
    # No file's name is longer than 255 bytes.
    keys = tuple(key for key in PLAIN_KEYS if len(key.encode()) < 250)

    @pytest.fixture(autouse=True)
    def _server(self, nginx: Emulator) -> None:
        self.server = nginx

    @asynccontextmanager
    async def open_origin(self) -> AsyncIterator[ReadOrigin]:
        name = self.server.next_name()
        self.root = self.server.directory / "root" / name
        self.root.mkdir()
        async with opened(BucketSettings("ht://bucket", f"{self.server.endpoint}/{name}")) as origin:
            yield origin

    async def place(self, origin: ReadOrigin, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not written over: its readers keep the file that they have.
        new = self.root / "upload in progress"
        new.write_bytes(data)
        os.replace(new, path)
