"""Which objects a job is about: by a template, a prefix or a list of names, with their sizes."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from shardmill.core.errors import BadRequest, ObjectNotFound
from shardmill.core.jobs import JobRequest, is_manifest
from shardmill.core.refs import Bucket, ObjectRef, check_key
from shardmill.core.templates import expand, listing_prefix, match_listing, needs_listing
from shardmill.node.access import Principal
from shardmill.node.objects import MAX_PAGE, Objects

MAX_OBJECTS = 200_000  # of one job; each takes about a kilobyte of memory while the job goes on
HEADS_AT_ONCE = 16  # objects looked at together
_SHOWN = 5  # missing objects that an error names


@dataclass(frozen=True, slots=True)
class Selected:
    """Keys with their sizes in bytes, in order."""

    sizes: dict[str, int]
    base: str
    """Start that all keys have in common, up to a `/`, as far as the request says it."""


def check_selection(request: JobRequest) -> None:
    """Raise BadRequest unless exactly one of template, prefix and names is given, and in form."""
    given = [name for name in ("template", "prefix", "names") if getattr(request, name) is not None]
    if len(given) != 1:
        raise BadRequest(f"give exactly one of template, prefix and names, not {' and '.join(given) or 'none'}")
    if request.names is not None:
        if not request.names:
            raise BadRequest("names is an empty list")
        _check_count(len(request.names))
        for name in request.names:
            check_key(name)
        twice = next((name for name, count in Counter(request.names).items() if count > 1), None)
        if twice is not None:
            raise BadRequest(f"names has {twice!r} twice")


def is_listed(request: JobRequest, key: str) -> bool:
    """Whether the request takes whatever the bucket has of some form, and the key is of it."""
    if request.prefix is not None:
        return key.startswith(request.prefix)
    template = request.template
    return template is not None and needs_listing(template) and bool([*match_listing(template, [key])])


async def select(objects: Objects, principal: Principal, bucket: Bucket, request: JobRequest) -> Selected:
    """Find them.

    Raises:
        ObjectNotFound: One that is named does not exist, or nothing fits.
        BucketNotFound: There is no such bucket.
    """
    template, prefix = request.template, request.prefix
    if template is not None and needs_listing(template):
        start = listing_prefix(template)
        listed = {key: size async for key, size in _list(objects, principal, bucket, start)}
        sizes = {key: listed[key] for key in match_listing(template, listed)}
        what = f"matches {template!r}"
    elif prefix is not None:
        start = prefix
        sizes = {key: size async for key, size in _list(objects, principal, bucket, prefix)}
        what = f"starts with {prefix!r}"
    else:
        names = request.names if request.names is not None else expand(template or "")
        _check_count(len(names))
        start = "" if template is None else re.split(r"[{@]", template, maxsplit=1)[0]
        return Selected(await _sizes(objects, principal, bucket, names), _folder(start))
    if not sizes:
        raise ObjectNotFound(f"no object of {bucket} {what}")
    return Selected(sizes, _folder(start))


async def _list(objects: Objects, principal: Principal, bucket: Bucket, prefix: str) -> AsyncIterator[tuple[str, int]]:
    after, count = "", 0
    while True:
        page = await objects.list(principal, bucket, prefix=prefix, delimiter="", after=after, limit=MAX_PAGE)
        for meta in page.objects:
            # Folders that other tools keep as empty objects are no data either.
            if not is_manifest(meta.key) and not meta.key.endswith("/"):
                count += 1
                _check_count(count)
                yield meta.key, meta.size
        if page.next is None:
            return
        after = page.next


async def _sizes(objects: Objects, principal: Principal, bucket: Bucket, names: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    missing: list[str] = []
    for start in range(0, len(names), HEADS_AT_ONCE):
        some = names[start : start + HEADS_AT_ONCE]
        found = await asyncio.gather(*(_size(objects, principal, ObjectRef.of(bucket, name)) for name in some))
        for name, size in zip(some, found, strict=True):
            if size is None:
                missing.append(name)
            else:
                sizes[name] = size
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        verb = "does" if len(missing) == 1 else "do"
        raise ObjectNotFound(f"{', '.join(missing[:_SHOWN])}{more} {verb} not exist in {bucket}; nothing was begun")
    return sizes


async def _size(objects: Objects, principal: Principal, ref: ObjectRef) -> int | None:
    try:
        return (await objects.head(principal, ref)).size
    except ObjectNotFound:
        return None


def _check_count(count: int) -> None:
    if count > MAX_OBJECTS:
        raise BadRequest(f"a job is about at most {MAX_OBJECTS} objects; make several of it, by narrower prefixes")


def _folder(start: str) -> str:
    return start[: start.rfind("/") + 1]
