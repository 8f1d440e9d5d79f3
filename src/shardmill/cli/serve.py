"""`serve`: run a node. The only module of the client side that reaches the server, and only when asked to."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from shardmill.cli.output import say
from shardmill.config import load_config
from shardmill.core.errors import BadRequest

SERVER_PARTS = ("aiohttp", "lmdb", "xxhash", "prometheus_client")
"""What the extra `server` brings and a node cannot start without."""


def serve(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Serve it as ais://NAME, as it stands.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Default: 127.0.0.1:51080.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: $XDG_DATA_HOME/shardmill.")] = None,
    bucket: Annotated[
        list[str] | None, typer.Option(metavar="URI[=BACKING]", help="BACKING: dir:PATH, dir-rw:PATH or pool.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PYTHON", help="An interpreter in which transforms may run.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings (TOML).")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Samples in work at once; default: the cores there are.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further host name that requests may carry.")
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Listen on other than loopback, open to all who reach it.")
    ] = False,
    sample_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="That one sample may take; default: 60s.")
    ] = None,
    object_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of work that one object may take; default: 3600s.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one worker process; default: 4GiB.")] = None,
    results: Annotated[
        str | None, typer.Option(metavar="on|off", help="Whether finished transformed shards are kept; default: on.")
    ] = None,
    results_capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk that they may take; default: 10GiB.")
    ] = None,
    durability: Annotated[
        str | None, typer.Option(metavar="power|kill", help="What stored objects survive; default: power.")
    ] = None,
    drain: Annotated[
        str | None, typer.Option(metavar="TIME", help="That answers may still take after SIGTERM; default: 30s.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
) -> None:
    """Run a node until SIGTERM or Ctrl-C.

    Every flag has a twin in --config, and in the environment as SHARDMILL_SECTION_NAME.
    """
    check_server_is_installed()
    buckets = list(bucket or [])
    if directory is not None:
        buckets.append(f"ais://{_bucket_name(directory)}=dir:{directory}")
    settings = load_config(
        config,
        flags={
            "server": {
                "listen": listen,
                "data": data,
                "hosts": host or None,
                "tls_cert": tls_cert,
                "tls_key": tls_key,
                "insecure_no_auth": insecure_no_auth or None,
                "drain": drain,
                "log_level": log_level,
            },
            "storage": {"durability": durability},
            "transforms": {
                "workers": workers,
                "sample_timeout": sample_timeout,
                "object_timeout": object_timeout,
                "memory": memory,
            },
            "results": {"mode": results, "capacity": results_capacity},
        },
        buckets=buckets,
        environments=env or [],
    )
    from shardmill.server.main import serve as run_server

    raise typer.Exit(run_server(settings))


def check_server_is_installed() -> None:
    """Exit with status 2 and the way out where only the client is installed."""
    missing = [name for name in SERVER_PARTS if importlib.util.find_spec(name) is None]
    if missing:
        say("shardmill: only the client is installed; for a node: pip install 'shardmill[server]'")
        raise typer.Exit(2)


def _bucket_name(directory: Path) -> str:
    """A bucket's name from a directory's: what is not allowed in it becomes `-`."""
    name = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in _base(directory))
    name = name.lower().strip("._-")[:63].rstrip("._-")
    if len(name) < 3:
        raise BadRequest(f"{directory}: its name makes no bucket; write --bucket ais://NAME=dir:{directory}")
    return name


def _base(directory: Path) -> str:
    return directory.expanduser().resolve().name
