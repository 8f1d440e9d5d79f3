"""From a bucket's settings to its origin."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import aiohttp

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.origins import ReadOrigin
from shardmill.core.refs import ALIASES
from shardmill.storage.origins.credentials import Surroundings
from shardmill.storage.origins.remote import RemoteOrigin, uncarried
from shardmill.storage.origins.s3_listing import S3Listing
from shardmill.storage.origins.s3_reading import S3Reading
from shardmill.storage.origins.stores import Provider, build_stores
from shardmill.storage.origins.web import BUFFER, WebOrigin


@asynccontextmanager
async def open_origin(
    settings: BucketSettings,
    origins: OriginSettings,
    *,
    environ: Mapping[str, str] | None = None,
    home: Path | None = None,
) -> AsyncIterator[ReadOrigin]:
    """The origin of a bucket whose settings say `is_remote`; it asks nobody before it is asked.

    Whether it can list or write is told by `isinstance(origin, ListOrigin)` and `WriteOrigin`.

    Args:
        settings: Checked ones, as of `load_config`.
        origins: How long to wait and how often to try.
        environ: Where ambient credentials are looked for; default: the process's.
        home: Whose files are looked for; default: the user's.

    Raises:
        BadRequest: The settings do not suffice, e.g. no storage account is named.
    """
    scheme, _, rest = settings.backing.partition("://")
    provider = ALIASES.get(scheme, scheme)
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=origins.connect_timeout, sock_read=origins.idle_timeout, connect=None
    )
    if provider in ("http", "https"):
        async with WebOrigin.open(settings, origins, timeout) as web:
            yield web
        return
    surroundings = Surroundings.look(os.environ if environ is None else environ, home or Path.home())
    name = rest.removesuffix("/")
    stores = build_stores(cast(Provider, provider), name, settings, origins, surroundings)
    async with aiohttp.ClientSession(
        timeout=timeout, auto_decompress=False, read_bufsize=BUFFER, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        lister = reader = None
        if stores.endpoint:
            lister = S3Listing(
                session,
                stores.endpoint,
                name,
                cut=settings.prefix,
                label=f"{provider}://{name}",
                credentials=stores.credentials,
                can_carry=lambda path: uncarried(path, provider) is None,
                requester_pays=settings.requester_pays,
                is_by_folder=False if _is_known_to_list_by_key(provider, stores.endpoint) else None,
            )
        if provider == "s3" and stores.endpoint.startswith("http://"):
            reader = S3Reading(
                session,
                stores.endpoint,
                name,
                credentials=stores.credentials,
                requester_pays=settings.requester_pays,
                idle_seconds=origins.idle_timeout,
            )
        yield RemoteOrigin(stores, settings.prefix, origins, lister, reader)


def _is_known_to_list_by_key(provider: str, endpoint: str) -> bool:
    """What else speaks S3 is asked."""
    host = urlsplit(endpoint).hostname or ""
    return provider != "s3" or host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
