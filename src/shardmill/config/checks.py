"""What settings must agree in, beyond each one's own kind; every problem is a line for the user."""

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from shardmill.config.machine import is_loopback
from shardmill.config.settings import SECTIONS, BucketSettings, Config, EnvironmentSettings, PackageSettings
from shardmill.core.errors import BadRequest
from shardmill.core.refs import ALIASES, Bucket

PACKAGES_PREFIX = "packages-"  # of the names of environments that the node builds itself

_ENVIRONMENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def checked_buckets(tables: Sequence[BucketSettings], problems: list[str]) -> tuple[BucketSettings, ...]:
    """The buckets by URI, a later one in place of an earlier."""
    checked: dict[Bucket, BucketSettings] = {}
    for table in tables:
        try:
            bucket = Bucket.parse(table.uri)
        except BadRequest as error:
            problems.append(f"bucket {table.uri!r}: {error}")
            continue
        named = {"ais": "pool", "http": ""}.get(bucket.provider, str(bucket))
        settings = replace(table, uri=str(bucket), backing=table.backing or named)
        problems += [f"bucket {bucket}: {problem}" for problem in _bucket_problems(bucket, settings)]
        checked[bucket] = settings
    return tuple(checked.values())


def _bucket_problems(bucket: Bucket, settings: BucketSettings) -> list[str]:
    backing = settings.backing
    if not backing:
        return [f"which web server? give its URL: {bucket}=https://HOST/PATH"]
    if settings.is_remote:
        return _remote_problems(settings)
    given = [name for name in _REMOTE_ONLY if getattr(settings, name)]
    if given:
        return [f"{', '.join(given)}: only remote stores have these"]
    if backing in ("dir:", "dir-rw:"):
        return [f"{backing!r} names no directory; write {backing}PATH"]
    if settings.directory is not None:
        return [] if settings.directory.is_dir() else [f"{settings.directory} is not a directory"]
    if backing != "pool":
        return [f"unknown backing {backing!r}; write pool, dir:PATH, dir-rw:PATH or a URL"]
    return []


_ANY_BACKING = ("uri", "backing", "writable", "revalidate", "ttl")
_REMOTE_ONLY = tuple(item.name for item in fields(BucketSettings) if item.name not in _ANY_BACKING)


def _remote_problems(settings: BucketSettings) -> list[str]:
    """What is wrong with the settings of a bucket that has a remote store behind it."""
    scheme, _, rest = settings.backing.partition("://")
    provider = ALIASES.get(scheme, scheme)
    if provider == "https" or (provider == "http" and scheme == "http"):
        return [] if rest.partition("/")[0] else [f"{settings.backing!r} names no host"]
    problems = []
    if provider not in ("s3", "gs", "az"):
        problems.append(f"unknown backing {settings.backing!r}; write s3://, gs://, az:// or https://HOST/PATH")
    elif "/" in rest.removesuffix("/"):
        problems.append(f"{settings.backing!r} has a path; name it as prefix")
    if bool(settings.access_key_id) != bool(settings.secret_access_key):
        problems.append("access_key_id and secret_access_key go together")
    if settings.anonymous and any((settings.access_key_id, settings.account_key, settings.sas_token, settings.token)):
        problems.append("anonymous and credentials exclude each other")
    if settings.endpoint and not re.match(r"https?://[^/]", settings.endpoint):
        problems.append(f"endpoint {settings.endpoint!r} is not a URL such as https://HOST")
    if settings.credentials_file is not None and not settings.credentials_file.is_file():
        problems.append(f"credentials_file {settings.credentials_file} does not exist")
    return problems


def checked_environments(tables: Sequence[EnvironmentSettings], problems: list[str]) -> tuple[EnvironmentSettings, ...]:
    checked: dict[str, EnvironmentSettings] = {}
    for table in tables:
        if not _ENVIRONMENT_NAME.fullmatch(table.name):
            problems.append(f"environment {table.name!r}: bad name")
        elif table.name.startswith(PACKAGES_PREFIX):
            problems.append(f"environment {table.name!r}: {PACKAGES_PREFIX}… are those that the node builds itself")
        elif not os.access(table.python, os.X_OK) or table.python.is_dir():
            problems.append(f"environment {table.name!r}: {table.python} is not an interpreter that can be run")
        checked[table.name] = table
    return tuple(checked.values())


def check(config: Config, problems: list[str]) -> None:
    for name, settings in SECTIONS.items():
        section = getattr(config, name)
        problems += [
            f"{name}.{item.name} {getattr(section, item.name)}: at least {item.metadata['least']} is needed"
            for item in fields(settings)
            if item.metadata["least"] and getattr(section, item.name) < item.metadata["least"]
        ]
    server = config.server
    try:
        host, port = server.address
        if not 0 <= port <= 65535:
            raise ValueError
        if not is_loopback(host) and not server.insecure_no_auth:
            problems.append(
                f"listen {server.listen!r}: who reaches it could run code on this machine; listen on 127.0.0.1, "
                "or say --insecure-no-auth if the network is trusted"
            )
    except ValueError:
        problems.append(f"listen {server.listen!r}: write HOST:PORT")
    if (server.tls_cert is None) != (server.tls_key is None):
        problems.append("tls: --tls-cert and --tls-key go together")
    problems += [
        f"tls: {path} does not exist" for path in (server.tls_cert, server.tls_key) if path and not path.exists()
    ]
    problems += _package_problems(config.packages)
    if not config.cache.low <= config.cache.high <= 100:
        problems.append(
            f"cache: low {config.cache.low} and high {config.cache.high} are not in order, or over 100 percent"
        )
    if server.log_level not in ("debug", "info", "warning", "error"):
        problems.append(f"log_level {server.log_level!r} is not one of debug, info, warning, error")


def _package_problems(packages: PackageSettings) -> list[str]:
    problems = []
    if (packages.policy == "allow-list") != bool(packages.allow):
        problems.append('packages: policy = "allow-list" and the names in allow go together')
    if packages.no_index and not packages.find_links:
        problems.append("packages: no_index leaves nothing but find_links, and that is empty")
    problems += [
        f"packages.find_links {place}: is neither a URL nor a directory"
        for place in packages.wheel_places
        if "://" not in place and not Path(place).is_dir()
    ]
    return problems
