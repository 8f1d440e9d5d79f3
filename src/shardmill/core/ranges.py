"""Byte ranges of RFC 9110 §14; the only place that knows HTTP's inclusive end."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*", re.ASCII | re.IGNORECASE)
_DIGITS = 30  # more than any size has; int() refuses numbers of thousands of digits
_LARGE: int = 10**_DIGITS


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range as asked for, over no size yet. `start` None: the last `stop` bytes. `stop` None: to the end."""

    start: int | None
    stop: int | None

    @classmethod
    def parse(cls, header: str | None) -> "ByteRange | None":
        """Parse a Range header; None when it is to be ignored (RFC 9110 §14.2), as malformed and multiple ones are."""
        match = _RANGE.fullmatch(header) if header else None
        if match is None:
            return None
        first, last = (_number(digits) for digits in match.groups())
        if first is None:
            return cls(None, last) if last is not None else None
        if last is not None and last < first:
            return None
        return cls(first, None if last is None else last + 1)

    def resolve(self, size: int) -> tuple[int, int] | None:
        """`start, stop` within an object of `size` bytes, or None if it cannot be satisfied (416)."""
        if self.start is None:
            suffix = self.stop or 0
            return (max(0, size - suffix), size) if suffix and size else None
        if self.start >= size:
            return None
        return self.start, size if self.stop is None else min(self.stop, size)

    def __str__(self) -> str:
        if self.start is None:
            return f"bytes=-{self.stop}"
        return f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"


def content_range(start: int, stop: int, size: int) -> str:
    """The Content-Range of a 206."""
    return f"bytes {start}-{stop - 1}/{size}"


def _number(digits: str) -> int | None:
    """The number, or one that is larger than any size; None for no digits."""
    significant = digits.lstrip("0")
    if len(significant) > _DIGITS:
        return _LARGE + len(significant)
    return int(digits[-_DIGITS:]) if digits else None
