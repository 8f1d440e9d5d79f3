"""Origins over the fault server, in each dialect that it understands."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.origins import ReadOrigin
from shardmill.core.values import Seconds, Secret
from shardmill.storage.origins import open_origin
from shardmill.testing.faults import FaultServer

Dialect = Literal["s3", "gs", "az", "http"]
DIALECTS: tuple[Dialect, ...] = ("s3", "gs", "az", "http")

CLOUDS: tuple[Dialect, ...] = ("s3", "gs", "az")

QUICK = OriginSettings(
    connect_timeout=Seconds(2), idle_timeout=Seconds(0.5), retries=2, backoff=Seconds(0.01), max_backoff=Seconds(0.02)
)

NOWHERE = Path("/nonexistent")


def settings_of(dialect: Dialect, endpoint: str, **options: Any) -> BucketSettings:
    """A bucket named `bucket` at an endpoint."""
    given: dict[Dialect, BucketSettings] = {
        "s3": BucketSettings(
            "s3://bucket", "s3://bucket", endpoint=endpoint, access_key_id="name", secret_access_key=Secret("secret")
        ),
        "gs": BucketSettings("gs://bucket", "gs://bucket", endpoint=endpoint, token=Secret("token")),
        "az": BucketSettings(
            "az://bucket", "az://bucket", endpoint=endpoint, account="account", account_key=Secret("c2VjcmV0")
        ),
        "http": BucketSettings("ht://bucket", f"{endpoint}/bucket"),
    }
    return replace(given[dialect], **options)


@asynccontextmanager
async def opened(
    dialect: Dialect, server: FaultServer, *, origins: OriginSettings = QUICK, **options: Any
) -> AsyncIterator[ReadOrigin]:
    """An origin over what the server has at `/bucket/…`; nothing of this machine's own credentials is seen."""
    settings = settings_of(dialect, server.endpoint, **options)
    async with open_origin(settings, origins, environ={}, home=NOWHERE) as origin:
        yield origin
