"""Bytes between here and a node, or between two buckets: `get put cp`.

A file appears under its name only when it is whole; a plain object that was cut is continued by the next try.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

import typer

from shardmill.cli import jobs
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
    is_remote,
    locate,
    split_prefix,
)
from shardmill.cli.output import Advance, JsonOption, print_json, progress, say, size_text, summary
from shardmill.client import BucketHandle, Client, ObjectHandle, ObjectReader
from shardmill.client.downloading import CONNECTIONS, Download, is_special
from shardmill.core.errors import BadRequest, ObjectNotFound
from shardmill.core.jobs import JobPlan
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.renaming import literal
from shardmill.core.templates import expand, listing_prefix, match_listing, needs_listing

_Result = TypeVar("_Result")

BY_THE_NODE = 1 << 30  # bytes; a node is silent while it copies, and counts as gone after five minutes
PARALLEL = 8  # transfers at once; beyond, one client gains nothing on a loopback or a 10 Gbit/s link


@dataclass(frozen=True, slots=True)
class _Download:
    source: Location
    target: Path
    size: int | None
    """Bytes as listed; None: not listed."""


@dataclass(frozen=True, slots=True)
class _Copy:
    source: Location
    target: ObjectHandle
    size: int | None
    """Bytes as listed; None: not listed."""


def get(
    uri: Annotated[str, typer.Argument(metavar="URI", help="provider://bucket/key, with braces, or a node's URL.")],
    target: Annotated[
        str | None, typer.Argument(metavar="FILE|DIR|-", help="Default: ./NAME; - is standard output.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All objects below the prefix.")] = False,
    transform: TransformOption = None,
    seed: SeedOption = None,
    epoch: EpochOption = None,
    start: StartOption = None,
    count: CountOption = None,
    byte_range: Annotated[
        str | None, typer.Option("--range", metavar="A-B", help="Bytes A to B, both included, as in HTTP.")
    ] = None,
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="Of a shard: this member only.")
    ] = None,
    members: Annotated[
        str | None,
        typer.Option("--members", metavar="FILE", help="Of a shard: the members that FILE (or -) names, as a tar."),
    ] = None,
    endpoint: EndpointOption = None,
) -> None:
    """Get objects, transformed or as they are.

    A file appears under its name when it is whole. A plain object that was cut is continued by the same command.
    """
    options = Options(transform, seed, epoch, start, count)
    template = _template_of(uri)
    if not recursive and not template and not uri.endswith("/"):
        location = locate(uri, endpoint, options)
        if member is not None:
            location = replace(location, member=member)
        if location.member is not None and location.transform is not None:
            raise BadRequest("a member is read as it is stored; leave out --transform, or take --start and --count")
        if members is not None:
            if transform is not None or member is not None or location.member is not None or byte_range is not None:
                raise BadRequest("--members stands alone: no --transform, --member or --range goes with it")
            _get_members(location, target, members)
        elif byte_range is not None:
            _get_range(location, target, byte_range)
        elif target == "-":
            _copy_to_stdout(location.open())
        else:
            _get_one(location, _file_for(location, target))
        return
    if target == "-" or byte_range is not None or member is not None or members is not None:
        raise BadRequest("several objects can only go to a directory; name one object for -, --range, --member(s)")
    directory = Path(target or ".")
    client = connect(endpoint)
    spec = options.resolve(client)
    downloads = list(_plan(client, uri, template, spec, directory))
    _get_many(downloads)


def put(
    source: Annotated[str, typer.Argument(metavar="FILE|DIR|-", help="- is standard input.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="provider://bucket[/prefix/] or provider://bucket/key")],
    meta: Annotated[list[str] | None, typer.Option("--meta", metavar="K=V", help="User metadata.")] = None,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Fail if the object exists.")] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Put a file, a directory or standard input.

    Of a directory the relative paths are kept. What the node says it stored is compared with what was sent.
    """
    client = connect(endpoint)
    bucket, key = split_prefix(uri)
    handle = client.bucket(bucket)
    pairs = _meta_pairs(meta or [])
    began = time.monotonic()
    if source == "-":
        if not key or key.endswith("/"):
            raise BadRequest(f"standard input has no name; write {uri.rstrip('/')}/KEY")
        stored = handle.object(key).put(sys.stdin.buffer, meta=pairs, if_absent=if_absent)
        say(summary("put", 1, stored.size, began))
        return
    path = Path(source)
    if path.is_dir():
        base = key if not key or key.endswith("/") else key + "/"
        files = sorted(file for file in path.rglob("*") if file.is_file())
        uploads = [(file, base + PurePosixPath(file.relative_to(path)).as_posix()) for file in files]
        if not uploads:
            raise BadRequest(f"{source} holds no files")
    elif path.exists():
        uploads = [(path, key + path.name if not key or key.endswith("/") else key)]
    else:
        raise BadRequest(f"{source}: no such file or directory")
    total = sum(file.stat().st_size for file, _ in uploads)
    with progress(f"put {source}", total) as advance:
        _in_parallel(
            [
                partial(handle.object(name).put, file, meta=pairs, if_absent=if_absent, progress=advance)
                for file, name in uploads
            ]
        )
    say(summary("put", len(uploads), total, began))


def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="provider://bucket/key, or a node's URL.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="provider://bucket[/prefix/] or provider://bucket/key")
    ],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All objects below the prefix.")] = False,
    transform: TransformOption = None,
    seed: SeedOption = None,
    epoch: EpochOption = None,
    start: StartOption = None,
    count: CountOption = None,
    rename: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="With --transform: new names, e.g. {stem}-256{ext}, s-{index:06d}.tar."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --transform: say what would be done.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --transform: begin, print the job's id, leave.")
    ] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Have the node copy objects from bucket to bucket; with --transform, store their transformed form.

    That is a job of the node: it goes on where it stopped when the same command is given again. Copies of what is
    larger than 1 GiB, or at another node, pass through here.
    """
    for text, instead in ((source, "put"), (target, "get")):
        if not is_remote(text):
            raise BadRequest(f"{text} is a local path; use: shardmill {instead} {source} {target}")
    options = Options(transform, seed, epoch, start, count)
    bucket, base = split_prefix(target)
    own = connect(endpoint)
    into = own.bucket(bucket)
    job = _job_of(source, target, recursive, options, rename, endpoint)
    if job is not None:
        _run_job(own, job, dry_run=dry_run, detach=detach, json=json)
        return
    given = [
        name for name, value in (("rename", rename), ("dry-run", dry_run), ("detach", detach), ("json", json)) if value
    ]
    if given:
        raise BadRequest(f"--{given[0]} is of jobs, which need --transform and a source at the node itself")
    began = time.monotonic()
    if recursive or _template_of(source):
        spec = options.resolve(own)
        from_bucket, prefix = split_prefix(source)
        base = base if not base or base.endswith("/") else base + "/"
        copies = [
            _Copy(Location(own, ObjectRef.of(from_bucket, key), spec), into.object(base + name), size)
            for key, name, size in _named(own.bucket(from_bucket), prefix, is_template=not recursive)
        ]
    else:
        location = locate(source, endpoint, options)
        copies = [_Copy(location, into.object(base + location.name if not base or base.endswith("/") else base), None)]
    total = sum(_copy(each, own.endpoint) for each in copies)
    say(summary("copied", len(copies), total, began))


def _named(handle: BucketHandle, key: str, *, is_template: bool) -> Iterator[tuple[str, str, int | None]]:
    """Keys of a template, or below a prefix; with their names from the last folder that is the same for all, and sizes.

    Raises:
        ObjectNotFound: A listing has nothing that fits.
    """
    if is_template and not needs_listing(key):
        skipped = key.partition("{")[0].rfind("/") + 1
        for name in expand(key):
            yield name, name[skipped:], None
        return
    prefix = listing_prefix(key) if is_template else key
    sizes = {item.key: item.size for item in handle.list(prefix)}
    chosen = list(match_listing(key, sizes) if is_template else sizes)
    if not chosen:
        what = f"fits {key!r}" if is_template else f"starts with {key!r}"
        raise ObjectNotFound(f"no object of {handle.uri} {what}")
    skipped = prefix.rfind("/") + 1
    for name in chosen:
        yield name, name[skipped:], sizes[name]


def _copy(copy: _Copy, endpoint: str) -> int:
    """Copy one object, by the node at `endpoint` if it has both ends; returns its size."""
    source = copy.source
    if source.transform is None and source.member is None and source.client.endpoint == endpoint:
        size = source.head().size if copy.size is None else copy.size
        if 0 <= size <= BY_THE_NODE:
            return source.handle.copy_to(copy.target).size
    with source.open() as reader:
        return copy.target.put(reader, meta=reader.meta.user).size


@dataclass(frozen=True, slots=True)
class _Job:
    """What `cp --transform` asks the node for; one of template, prefix and name is given."""

    source: Bucket
    destination: Bucket
    spec: str
    rename: str
    template: str | None = None
    prefix: str | None = None
    name: str | None = None


def _job_of(
    source: str, target: str, recursive: bool, options: Options, rename: str | None, endpoint: str | None
) -> _Job | None:
    """The job that a call of `cp` is; None: it is none, since nothing is transformed, or by another node."""
    client = connect(endpoint)
    bucket, base = split_prefix(target)
    if source.startswith(("http://", "https://")):
        location = locate(source, endpoint, options)
        if location.transform is None or location.client.endpoint != client.endpoint:
            return None
        own, key, spec = location.ref.bucket, location.ref.key, location.transform
    elif options.transform is None:
        return None
    else:
        own, key = split_prefix(source)
        found = options.resolve(client)
        assert found is not None
        spec = found
    is_template = not source.startswith("http") and _template_of(source)
    is_one = not recursive and not is_template
    if is_one and not key:
        raise BadRequest(f"{source} is a bucket; name an object, or give -r for all of them")
    is_folder = not base or base.endswith("/")
    if rename is not None and not is_folder:
        raise BadRequest(f"with --rename the target is a bucket or ends in '/'; {target} names an object")
    folder = base if is_folder else f"{base}/"
    if rename is not None:
        new_name = literal(folder) + rename
    elif is_one:
        new_name = literal(folder) + "{name}" if is_folder else literal(base)
    else:
        new_name = literal(folder) + "{path}"
    if is_one:
        return _Job(own, bucket, spec, new_name, name=key)
    return _Job(own, bucket, spec, new_name, prefix=key if recursive else None, template=None if recursive else key)


def _run_job(client: Client, job: _Job, *, dry_run: bool, detach: bool, json: bool) -> None:
    ask = client.jobs.plan if dry_run else client.jobs.transform
    answer = ask(
        job.source,
        job.destination,
        job.spec,
        template=job.template,
        prefix=job.prefix,
        names=None if job.name is None else [job.name],
        rename=job.rename,
    )
    if isinstance(answer, JobPlan):
        jobs.print_plan(answer, json=json)
    elif not detach:
        jobs.watch(client, answer.id, json=json)
    elif json:
        print_json(answer)
    else:
        print(answer.id)


def _template_of(uri: str) -> bool:
    """Whether a URI stands for several objects; in a node's URL braces would be percent-encoded."""
    if uri.startswith(("http://", "https://")):
        return False
    key = split_prefix(uri)[1]
    return "{" in key or needs_listing(key)


def _plan(client: Client, uri: str, template: bool, spec: str | None, directory: Path) -> Iterator[_Download]:
    """What to get into which file: names of a template flat, keys below a prefix with their relative paths."""
    bucket, key = split_prefix(uri)
    handle = client.bucket(bucket)
    if template and not needs_listing(key):
        for name in expand(key):
            yield _Download(
                Location(client, ObjectRef.of(bucket, name), spec), directory / name.rpartition("/")[2], None
            )
        return
    if template:
        sizes = {item.key: item.size for item in handle.list(listing_prefix(key))}
        chosen = list(match_listing(key, sizes))
        skipped = len(listing_prefix(key).rpartition("/")[0])
    else:
        sizes = {item.key: item.size for item in handle.list(key)}
        chosen = [name for name in sizes if not name.endswith("/")]
        skipped = len(key.rpartition("/")[0])
    if not chosen:
        raise ObjectNotFound(f"no object of {bucket} fits {key!r}")
    for name in chosen:
        relative = name[skipped:].lstrip("/")
        yield _Download(
            Location(client, ObjectRef.of(bucket, name), spec),
            _below(directory, relative),
            sizes[name] if spec is None else None,
        )


def _below(directory: Path, relative: str) -> Path:
    """A file below the directory; a key that leads out of it is refused."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise BadRequest(f"the key {relative!r} leads out of {directory}; get it by its own name")
    return directory / path


def _file_for(location: Location, target: str | None) -> Path:
    path = Path(target or ".")
    if target is not None and not path.is_dir() and not target.endswith("/"):
        return path
    if location.name in ("", ".", ".."):
        raise BadRequest(f"{location} has no name for a file; say which: shardmill get URI FILE")
    return path / location.name


def _get_many(downloads: Sequence[_Download]) -> None:
    began = time.monotonic()
    sizes = [item.size for item in downloads]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with progress(f"get {len(downloads)} objects", total) as advance:
        received = _in_parallel([partial(_download, item.source, item.target, advance) for item in downloads])
    say(summary("got", len(downloads), sum(received), began))


def _get_one(location: Location, target: Path) -> None:
    began = time.monotonic()
    with progress(f"get {location.name}", None) as advance:
        size = _download(location, target, advance, CONNECTIONS)
    say(f"{summary('got', 1, size, began)}: {target}")


def _download(location: Location, target: Path, advance: Advance, connections: int = 1) -> int:
    """Stream one object into a file; returns its size.

    *Recovery:* what an earlier try left of the same version is kept and continued.
    """
    with location.open() as reader:
        download = Download(reader, target, connections=connections, progress=advance)
        try:
            return download.run()
        finally:
            if download.kept:
                say(f"kept {size_text(download.kept)} of {target}; the same command continues there")


def _copy_to_stdout(reader: ObjectReader) -> None:
    with reader:
        for chunk in reader:
            sys.stdout.buffer.write(chunk)
            # A reader of a pipe waits for what is there, not for a full buffer.
            sys.stdout.buffer.flush()


def _get_range(location: Location, target: str | None, text: str) -> None:
    if location.transform is not None:
        raise BadRequest("--range is for plain objects; of a transform take --start and --count")
    wanted = ByteRange.parse(f"bytes={text}")
    if wanted is None:
        raise BadRequest(f"--range {text!r} is not A-B, A- or -N")
    resolved = wanted.resolve(location.head().size)
    if resolved is None:
        raise BadRequest(f"--range {text}: {location} has only {location.head().size} bytes")
    data = location.get_range(*resolved)
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = _file_for(location, target)
    if is_special(path):
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _get_members(location: Location, target: str | None, listed: str) -> None:
    """Members as one tar; their names one a line."""
    if target is None:
        raise BadRequest(f"say where the members go: shardmill get {location} FILE|- --members {listed}")
    text = sys.stdin.read() if listed == "-" else Path(listed).read_text("utf-8")
    names = [name for line in text.splitlines() if (name := line.strip())]
    began, path = time.monotonic(), None if target == "-" else _file_for(location, target)
    with location.handle.open_members(names) as archive:
        if path is None:
            shutil.copyfileobj(archive, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        if is_special(path):
            with path.open("wb") as file:
                shutil.copyfileobj(archive, file)
            return
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                shutil.copyfileobj(archive, file)
                size = file.tell()
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    say(f"{summary('got', len(names), size, began)}: {path}")


def _meta_pairs(pairs: Sequence[str]) -> dict[str, str]:
    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadRequest(f"--meta {pair!r} is not K=V")
        parsed[name.lower()] = value
    return parsed


def _in_parallel(works: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Do them all, a few at a time, and give their results in order; the first failure stops what has not begun."""
    if len(works) == 1:
        return [works[0]()]
    threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="transfer")
    futures = [threads.submit(work) for work in works]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    except BaseException:
        # Who is interrupted does not wait for what is being transferred; the end of the process ends it.
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown(wait=True, cancel_futures=True)
    failed = next((future for future in futures if not future.cancelled() and future.exception()), None)
    return [failed.result()] if failed is not None else [future.result() for future in futures]
