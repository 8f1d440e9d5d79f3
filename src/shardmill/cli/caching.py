"""What the node's disk has of a bucket with a store behind it, before it is read and after: `prefetch evict`."""

from typing import Annotated

import typer

from shardmill.cli import jobs
from shardmill.cli.locations import EndpointOption, connect, split_prefix
from shardmill.cli.output import JsonOption, print_json
from shardmill.client import Client
from shardmill.core.errors import BadRequest
from shardmill.core.jobs import JobInfo
from shardmill.core.refs import Bucket
from shardmill.core.templates import needs_listing
from shardmill.core.values import parse_size

UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="provider://bucket/key, with braces; with -r a bucket or a prefix.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="All objects below the prefix.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")]
DetachOption = Annotated[bool, typer.Option("--detach", help="Begin, print the job's id, leave.")]


def prefetch(
    uri: UriArgument,
    recursive: RecursiveOption = False,
    rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes a second that are fetched at most, e.g. 100MB.")
    ] = None,
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Fetch objects from the store behind their bucket to the node's disk.

    That is a job of the node: it goes on where it stopped when the same command is given again.
    """
    client = connect(endpoint)
    bucket, chosen = _chosen(uri, recursive)
    if dry_run:
        _rate(rate)
        jobs.print_cache_plan(client.jobs.plan_prefetch(bucket, **chosen), "fetch", json=json)
        return
    _follow(client, client.jobs.prefetch(bucket, rate=_rate(rate), **chosen), detach=detach, json=json)


def evict(
    uri: UriArgument,
    recursive: RecursiveOption = False,
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Remove objects from the node's disk, pinned ones, too; the store behind their bucket keeps them."""
    client = connect(endpoint)
    bucket, chosen = _chosen(uri, recursive)
    if dry_run:
        jobs.print_cache_plan(client.jobs.plan_evict(bucket, **chosen), "evict", json=json)
        return
    _follow(client, client.jobs.evict(bucket, **chosen), detach=detach, json=json)


def _chosen(uri: str, recursive: bool) -> tuple[Bucket, jobs.Chosen]:
    bucket, key = split_prefix(uri)
    if recursive:
        return bucket, {"prefix": key}
    if not key:
        raise BadRequest(f"{uri} is a bucket; name an object, or give -r for all of them")
    return bucket, {"template": key} if "{" in key or needs_listing(key) else {"names": [key]}


def _rate(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise BadRequest(f"--rate {text!r} {error}") from None


def _follow(client: Client, job: JobInfo, *, detach: bool, json: bool) -> None:
    if not detach:
        jobs.watch(client, job.id, json=json)
    elif json:
        print_json(job)
    else:
        print(job.id)
