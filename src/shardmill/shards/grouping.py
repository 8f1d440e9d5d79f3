"""WebDataset's rules for which members are one sample: consecutive ones that share a key.

The key is the name up to the first dot behind the last slash; what follows that dot, in lower case, is the field.
"""

import re
from dataclasses import dataclass

from shardmill.shards.tar import Member, TarError

MAX_FIELDS = 1 << 16  # of one sample; one key over a whole shard would otherwise be held in memory at once

# WebDataset keeps these in the sample itself, so a member of that name is a duplicate there.
_RESERVED = frozenset(("__key__", "__url__"))
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


class Grouper:
    """Makes samples of members that come in order. A sample is whole when the next key has come, or the end."""

    def __init__(self) -> None:
        self.whole: list[Sample] = []
        """Those that were not taken yet."""
        self._ordinal = 0
        self._key: str | None = None
        self._fields: dict[str, Member] = {}

    def add(self, member: Member) -> None:
        """The next member; those of no sample are passed over.

        Raises:
            TarError: It is one too many of its sample.
        """
        split = None if is_meta(member.name) else split_name(member.name)
        if split is None:
            return
        key, field = split
        if key != self._key:
            self.finish()
            self._key = key
        if field in self._fields or field in _RESERVED:
            raise TarError(f"sample {key!r} has two fields {field!r}", member.header_offset)
        if len(self._fields) == MAX_FIELDS:
            raise TarError(f"sample {key!r} has more than {MAX_FIELDS} fields", member.header_offset)
        self._fields[field] = member

    def finish(self) -> None:
        """What was begun is whole."""
        if self._key is None:
            return
        key, fields, self._key, self._fields = self._key, self._fields, None, {}
        # WebDataset drops a sample whose field `__bad__` is not empty.
        if (bad := fields.get("__bad__")) is not None and bad.size:
            return
        self.whole.append(Sample(key, self._ordinal, tuple(Field(name, member) for name, member in fields.items())))
        self._ordinal += 1

    def take(self, limit: int) -> list[Sample]:
        """The first whole samples, at most `limit`."""
        taken, self.whole = self.whole[:limit], self.whole[limit:]
        return taken


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
