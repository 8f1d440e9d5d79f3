"""WebDataset's rules for which members are one sample: consecutive ones that share a key.

The key is the name up to the first dot behind the last slash; what follows that dot, in lower case, is the field.
"""

import re
from dataclasses import dataclass

from shardmill.shards.tar import Member

_META = re.compile(r"__[^/]*__(?:$|/)")


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a sample."""

    name: str
    """What follows the key's dot, in lower case: `jpg`, `seg.png`."""
    member: Member


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive members with one key."""

    key: str
    ordinal: int
    """Its place among the shard's samples, counted from 0."""
    fields: tuple[Field, ...]
    """In the shard's order."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member's name; None for a name that belongs to no sample.

    `train/n01.v2/0001.seg.PNG` is `("train/n01.v2/0001", "seg.png")`.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0:
        return None
    key = name[:dot]
    # Dots may stand in directories, but a file name's own part of the key must have none and not be empty. This is
    # WebDataset's regular expression spelled out: its backtracking is quadratic in what a shard's author writes.
    behind_dot = key.rfind(".") + 1
    if behind_dot:
        slash = key.find("/", behind_dot)
        if slash < 0 or slash + 1 == len(key) or "\n" in key[:slash]:
            return None
    return key, name[dot + 1 :].lower()


def is_meta(name: str) -> bool:
    """Whether WebDataset passes over the member before grouping: `__NAME__`, at the top or as first directory."""
    return name.startswith("__") and (_META.match(name) is not None or ("/" not in name and name.endswith("__")))
