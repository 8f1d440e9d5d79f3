"""Byte ranges of RFC 9110 §14; the only place that knows HTTP's inclusive end."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*", re.ASCII)
_DIGITS = 30  # more than any size has; longer numbers are cut off from int()


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
        first, last = match.groups()
        if len(first) > _DIGITS or len(last) > _DIGITS:
            return cls(2**63, None) if first else cls(None, 2**63)
        if first:
            if last and int(last) < int(first):
                return None
            return cls(int(first), int(last) + 1 if last else None)
        return cls(None, int(last)) if last else None

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
