"""Buckets and objects: `ls stat rm mb rb`."""

import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from shardmill.cli.locations import (
    CountOption,
    EndpointOption,
    EpochOption,
    Location,
    Options,
    SeedOption,
    StartOption,
    TransformOption,
    connect,
    locate,
    split_prefix,
)
from shardmill.cli.output import JsonOption, count_text, print_json, print_table, say, size_text, time_text
from shardmill.cli.results import age_text
from shardmill.client import BucketHandle
from shardmill.core.api import CachedInfo, ObjectInfo
from shardmill.core.errors import BadRequest, ObjectNotFound
from shardmill.core.templates import expand
from shardmill.shards.grouping import Grouper, Sample
from shardmill.shards.tar import Member


def list_objects(
    uri: Annotated[
        str | None, typer.Argument(metavar="URI", help="provider://bucket[/prefix]; default: buckets.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All keys, not one level.")] = False,
    long: Annotated[bool, typer.Option("--long", "-l", help="Size, time, ETag, and how much is cached, too.")] = False,
    members: Annotated[bool, typer.Option("--members", help="The samples of the shard at URI.")] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="What is on the node's disk of a bucket with a store behind it.")
    ] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """List buckets, objects, or the samples of a shard."""
    if uri is None and cached:
        raise BadRequest("--cached of which bucket? shardmill status shows those with a store behind them")
    if uri is None:
        _list_buckets(endpoint, json=json)
    elif members:
        _list_members(locate(uri, endpoint), json=json, long=long)
    elif cached:
        bucket, prefix = split_prefix(uri)
        _list_cached(connect(endpoint).bucket(bucket), prefix, json=json)
    else:
        bucket, prefix = split_prefix(uri)
        handle = connect(endpoint).bucket(bucket)
        _list_keys(handle, prefix, "" if recursive else "/", json=json, long=long)


def stat(
    uri: Annotated[str, typer.Argument(metavar="URI", help="provider://bucket/key, or a node's URL.")],
    transform: TransformOption = None,
    seed: SeedOption = None,
    epoch: EpochOption = None,
    start: StartOption = None,
    count: CountOption = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Show what is known of an object, without reading it."""
    location = locate(uri, endpoint, Options(transform, seed, epoch, start, count))
    meta = location.head()
    facts: dict[str, object] = {
        "uri": str(location),
        "url": location.url,
        "size": meta.size if meta.size >= 0 else None,
        "modified": meta.modified or None,
        "etag": meta.etag,
        "checksum": meta.checksum,
        "meta": dict(meta.user),
    }
    details = location.handle.cached() if location.transform is None and location.member is None else None
    cached = details.object if details is not None else None
    if details is not None and cached is not None:
        facts |= {"cached": cached, "ranges": details.ranges}
    if json:
        print_json(facts)
        return
    if details is not None and cached is not None:
        facts |= {"cached": cached_text(cached), "ranges": ", ".join(f"{a}-{b - 1}" for a, b in details.ranges)}
        facts |= {"version": cached.version, "asked": f"{age_text(cached.age)} ago" if cached.age is not None else ""}
    facts |= {"modified": time_text(meta.modified), "meta": ", ".join(f"{k}={v}" for k, v in meta.user.items())}
    if meta.size >= 1024:
        facts["size"] = f"{meta.size} ({size_text(meta.size)})"
    for name, value in facts.items():
        if value not in (None, ""):
            print(f"{name + ':':10} {value}")


def rm(
    uris: Annotated[list[str], typer.Argument(metavar="URI...", help="Objects; braces are expanded.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All objects below the prefix.")] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Remove objects."""
    client = connect(endpoint)
    removed = 0
    for uri in uris:
        bucket, key = split_prefix(uri)
        handle = client.bucket(bucket)
        if recursive:
            keys = [item.key for item in handle.list(key)]
            if not keys:
                raise ObjectNotFound(f"no object of {bucket} starts with {key!r}")
        elif not key:
            raise BadRequest(f"{uri} is a bucket; remove it with rb, or its objects with rm -r")
        else:
            keys = expand(key) if "{" in key else [key]
        for name in keys:
            handle.object(name).delete()
            removed += 1
    say(f"removed {count_text(removed, 'object')}")


def mb(
    bucket: Annotated[str, typer.Argument(metavar="BUCKET", help="ais://NAME")], endpoint: EndpointOption = None
) -> None:
    """Make a bucket in the node's own store."""
    handle = connect(endpoint).bucket(bucket)
    handle.create()
    say(f"made {handle.uri}")


def rb(
    bucket: Annotated[str, typer.Argument(metavar="BUCKET", help="ais://NAME")],
    force: Annotated[bool, typer.Option("--force", help="Even if it holds objects: they are removed.")] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Remove a bucket."""
    handle = connect(endpoint).bucket(bucket)
    handle.remove(force)
    say(f"removed {handle.uri}")


def read_samples(location: Location) -> Iterator[Sample]:
    """The samples of a shard in order, from the node's index of its members."""
    grouper = Grouper()
    for info in location.handle.members():
        grouper.add(Member(info.name, info.offset, info.size, info.offset, 0, 0, 0, 0, "", ""))
        yield from grouper.take(1)
    grouper.finish()
    yield from grouper.take(1)


def _list_buckets(endpoint: str | None, *, json: bool) -> None:
    buckets = connect(endpoint).buckets()
    if json:
        for bucket in buckets:
            print_json(bucket)
        return
    rows = [(bucket.uri, bucket.backing, "read-write" if bucket.writable else "read-only") for bucket in buckets]
    print_table(("bucket", "backing", "access"), rows)
    if not buckets:
        say("no buckets; make one with: shardmill mb ais://NAME")


def _list_keys(handle: BucketHandle, prefix: str, delimiter: str, *, json: bool, long: bool) -> None:
    # Printed page by page: a bucket may hold millions.
    stale = incomplete = 0
    for page in handle.pages(prefix, delimiter, stale=True):
        if page.stale and not stale:
            say(f"{handle.uri} is out of reach: {page.reason}")
        stale += page.stale
        incomplete += not page.complete
        entries: list[tuple[str, ObjectInfo | None]] = [(name, None) for name in page.prefixes]
        entries += [(item.key, item) for item in page.objects]
        for name, item in sorted(entries, key=lambda entry: entry[0].encode()):
            if json:
                print_json(item if item is not None else {"prefix": name})
            elif long and item is not None:
                share = "" if item.cached is None else f"{share_text(item.cached, item.size):>6}  "
                print(f"{item.size:>14}  {time_text(item.modified):19}  {item.etag or '-':32}  {share}{name}")
            elif long:
                share = f"{'':6}  " if any(other.cached is not None for other in page.objects) else ""
                print(f"{'':14}  {'':19}  {'':32}  {share}{name}")
            else:
                print(name)
        sys.stdout.flush()
    if incomplete:
        say("this is NOT the whole bucket: only what is on the node's disk of it was listed")
    elif stale:
        say("this is what the bucket held when it was listed last; it may have changed")
    if stale:
        raise typer.Exit(1)


def share_text(cached: int, size: int) -> str:
    """How much of an object is on the disk, in a column."""
    if cached == size:
        return "cached"
    return f"{min(99, 100 * cached // size)}%" if cached else "-"


def cached_text(cached: CachedInfo) -> str:
    """How much of an object is on the disk."""
    if cached.cached == cached.size:
        return "all of it" + (", pinned" if cached.pinned else "")
    return f"{size_text(cached.cached)} of {size_text(cached.size)}" + (", pinned" if cached.pinned else "")


def _list_cached(handle: BucketHandle, prefix: str, *, json: bool) -> None:
    # Printed as it comes: there may be millions.
    count = size = 0
    now = time.time()
    for found in handle.cached(prefix):
        count += 1
        size += found.cached
        if json:
            print_json(found)
            continue
        age = age_text(found.age) if found.age is not None else "-"
        share = found.cached / found.size if found.size else 1.0
        print(
            f"{size_text(found.cached):>10}  {share:>4.0%}  used {age_text(now - found.used):>4} ago  asked {age:>4}"
            f"  {found.etag or '-':32}  {found.key}{'  pinned' if found.pinned else ''}"
        )
    if not json:
        say(f"{count_text(count, 'object')}, {size_text(size)} on the node's disk")


def _list_members(location: Location, *, json: bool, long: bool) -> None:
    for sample in read_samples(location):
        sizes = {field.name: field.member.size for field in sample.fields}
        if json:
            print_json({"key": sample.key, "ordinal": sample.ordinal, "fields": sizes})
        elif long:
            print(f"{sample.ordinal:>8}  {sample.key}  {' '.join(f'{name}:{size}' for name, size in sizes.items())}")
        else:
            print(f"{sample.key}  {' '.join(sizes)}")
