"""Stores of the library behind S3, GCS and Azure, built from a bucket's settings.

The library never tries a reading request again by itself: its own resuming knows no dates, and would multiply with
the tries of `calls.py`. Writing is the exception: the parts of an upload can only be repeated inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from obstore.store import AzureStore, GCSStore, S3Store

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.errors import BadRequest
from shardmill.storage.origins.credentials import (
    REREAD_SECONDS,
    AmbientKeys,
    Credentials,
    Surroundings,
    find_azure,
    find_gcs,
)

Provider = Literal["s3", "gs", "az"]
Store = S3Store | GCSStore | AzureStore

WHOLE_REQUEST = timedelta(days=7)  # a large body takes long; what bounds a request is the idle time-out
GOOGLE = "https://storage.googleapis.com"


@dataclass(frozen=True, slots=True)
class Stores:
    """One bucket, as the library sees it."""

    provider: Provider
    name: str
    reading: Store
    writing: Store
    credentials: Callable[[], Credentials]
    endpoint: str
    """Base URL of requests in the S3 dialect; empty: it has none."""


def build_stores(
    provider: Provider, name: str, settings: BucketSettings, origins: OriginSettings, surroundings: Surroundings
) -> Stores:
    """Stores for reading and writing; asks nobody.

    Raises:
        BadRequest: The library cannot make anything of the settings, e.g. of a broken key file.
    """
    build = {"s3": _s3, "gs": _gcs, "az": _azure}[provider]
    return build(name, settings, origins, surroundings)


def _s3(name: str, settings: BucketSettings, origins: OriginSettings, surroundings: Surroundings) -> Stores:
    keys = AmbientKeys(settings, surroundings)
    found = keys.current()
    environ = surroundings.environ
    endpoint = (
        settings.endpoint
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or f"https://s3.{found.region}.amazonaws.com"
    ).rstrip("/")

    def provide() -> dict[str, Any]:
        key = keys.current().key
        assert key is not None
        until = datetime.now(UTC) + timedelta(seconds=REREAD_SECONDS)
        return {
            "access_key_id": key.name,
            "secret_access_key": str(key.secret),
            "token": str(key.token) or None,
            "expires_at": None if settings.access_key_id else until,
        }

    def make(retries: int) -> Store:
        options: dict[str, Any] = {
            "endpoint": endpoint,
            "region": found.region,
            "virtual_hosted_style_request": False,
            "skip_signature": found.kind not in ("given", "library"),
            "request_payer": settings.requester_pays,
            # One DELETE each: many stores that speak S3 lack the call for many.
            "disable_bulk_delete": True,
        }
        if found.kind == "given":
            options["credential_provider"] = provide
        return _made(S3Store, name, origins, retries, options)

    return Stores("s3", name, make(0), make(origins.retries), keys.current, endpoint)


def _gcs(name: str, settings: BucketSettings, origins: OriginSettings, surroundings: Surroundings) -> Stores:
    found = find_gcs(settings, surroundings)
    endpoint = (settings.endpoint or GOOGLE).rstrip("/")
    options: dict[str, Any] = {"base_url": endpoint, "skip_signature": found.kind not in ("given", "library")}
    if found.file is not None:
        options["application_credentials"] = str(found.file)
    if settings.token:
        options["bearer_token"] = str(settings.token)

    def make(retries: int) -> Store:
        # Without this header the store inflates objects that are kept compressed, and no length or hash fits any more.
        return _made(GCSStore, name, origins, retries, options, {"Accept-Encoding": "gzip"})

    return Stores("gs", name, make(0), make(origins.retries), lambda: found, endpoint)


def _azure(name: str, settings: BucketSettings, origins: OriginSettings, surroundings: Surroundings) -> Stores:
    found = find_azure(settings, surroundings)
    environ = surroundings.environ
    account = settings.account or environ.get("AZURE_STORAGE_ACCOUNT_NAME") or environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise BadRequest(f"az://{name}: which storage account? set account, or AZURE_STORAGE_ACCOUNT_NAME")
    options: dict[str, Any] = {"account_name": account, "skip_signature": found.kind not in ("given", "library")}
    if settings.endpoint:
        options["endpoint"] = settings.endpoint.rstrip("/")
    if settings.account_key:
        options["account_key"] = str(settings.account_key)
    if settings.sas_token:
        options["sas_key"] = str(settings.sas_token)

    def make(retries: int) -> Store:
        return _made(AzureStore, name, origins, retries, options)

    return Stores("az", name, make(0), make(origins.retries), lambda: found, "")


def _made(
    kind: Callable[..., Store],
    name: str,
    origins: OriginSettings,
    retries: int,
    options: dict[str, Any],
    headers: dict[str, str] | None = None,
) -> Store:
    client: dict[str, Any] = {
        "allow_http": True,
        "timeout": WHOLE_REQUEST,
        "connect_timeout": timedelta(seconds=origins.connect_timeout),
        "read_timeout": timedelta(seconds=origins.idle_timeout),
    }
    if headers:
        client["default_headers"] = headers
    retry = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=(retries + 1) * origins.idle_timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=origins.backoff),
            "max_backoff": timedelta(seconds=origins.max_backoff),
            "base": 2,
        },
    }
    try:
        return kind(name, client_options=client, retry_config=retry, **options)
    except Exception as error:  # the library has no class of its own for all that it finds wrong with settings
        raise BadRequest(f"bucket {name}: its settings cannot be used: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
