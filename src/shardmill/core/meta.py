"""What is known of an object beside its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

MAX_USER = 2048  # bytes of user metadata, names included


class ObjectMeta(msgspec.Struct, frozen=True, gc=False):
    """One version of an object, as a HEAD tells it. Length, ETag and bytes of an answer are always of one version."""

    # No dataclass: a page of a listing makes a thousand, and a frozen one takes more than half of its time for that.

    key: str
    size: int
    """Bytes."""
    etag: str | None
    """Strong, without quotes."""
    version: str
    """Source version: what identifies the bytes behind the ref; part of a result's key."""
    modified: float
    """Unix time, seconds."""
    checksum: str | None = None
    """`xxh3:` + 32 hex digits of xxh3-128 over the bytes, where the store knows it."""
    user: Mapping[str, str] = msgspec.field(default_factory=dict)
    """User metadata, names in lower case."""


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a listing, keys ordered by their UTF-8 bytes; `prefixes` are the rolled-up common prefixes."""

    objects: tuple[ObjectMeta, ...]
    prefixes: tuple[str, ...]
    next: str | None
    """Pass as `after` for the next page; None at the end."""
    stale: str | None = None
    """Why the bucket's store could not be asked, so that this is only what was known of it; None: it was."""
    is_complete: bool = True
    """False: of a stale page, that there may be objects which it leaves out."""
