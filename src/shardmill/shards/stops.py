"""Where a stream of framed samples may stop: inside a payload, and nowhere else.

Tar readers take a stop anywhere from the end of a payload to the end of the next header for the end of the archive, and
a process can be killed between any two bytes that it gives to the kernel. So those bytes have to be given all at once.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

from shardmill.shards.framing import BLOCK, padding
from shardmill.shards.tar import MAX_EXTENSION
from shardmill.shards.tracking import begins_sample

WHOLE = 8 << 10  # bytes of a whole stretch at most, where members have payloads; any socket with room takes as much
_SHORT = 2 << 10  # bytes of payload that are rather joined to what surrounds them than sent apart
_TOO_MUCH = 64 << 10  # bytes of headers in a row; no socket takes more at once for sure

_ZEROS = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0"))


class Stretch(NamedTuple):
    """Consecutive bytes of the stream."""

    data: memoryview | bytes
    """A view of what was fed is released once the next stretch is asked for."""
    is_whole: bool
    """The stream may stop before these bytes and behind them, not among them; otherwise anywhere."""
    is_urgent: bool = True
    """A reader may be able to do something with them now. False: they go on with a sample that ends in later ones."""


class Stretches:
    """Cuts a tar stream, as `shards.framing` writes it, by where it may stop; sans I/O.

    What is no such tar is passed on as bytes that may stop anywhere.
    """

    def __init__(self) -> None:
        self.limit = WHOLE
        """Bytes of a whole stretch at most, where members have payloads; at least `WHOLE`. Larger ones cost less."""
        self._whole = bytearray()
        self._header = bytearray()
        self._loose = 0
        """Bytes of the payload among which the stream may stop."""
        self._fixed = 0
        """Bytes to the next header among which it may not."""
        self._is_inside = False
        """In a payload, before its last byte: here the stream may stop."""
        self._is_open = False
        """What follows may stop anywhere: it lies behind the last member."""
        self._is_marked = False
        """Headers say where samples begin."""
        self._begins = False
        """A sample may begin among what is not given yet."""

    @property
    def free(self) -> int:
        """Bytes that come next and among which the stream may stop; they may be sent without being fed."""
        return 0 if self._whole or self._header else self._loose

    def pass_over(self, size: int) -> None:
        """So many of the free bytes were sent."""
        self._loose -= size

    def feed(self, data: memoryview | bytes) -> Generator[Stretch, None, None]:
        """Stretches of what was fed, up to the last place where the stream may stop.

        Take them all, or close the generator: it holds views of the data, each until the next is asked for.
        """
        with memoryview(data) as view:
            yield from self._cut(view)
        if self._is_inside:
            yield from self._give()

    def _cut(self, view: memoryview) -> Iterator[Stretch]:
        position = 0
        while position < len(view) and not self._is_open:
            if self._loose:
                with view[position : position + self._loose] as piece:
                    size = len(piece)
                    self._loose -= size
                    if self._whole:
                        self._whole += piece
                    else:
                        yield Stretch(piece, False)
            elif self._fixed:
                size = min(self._fixed, len(view) - position)
                self._fixed -= size
                self._whole += view[position : position + size]
                self._is_inside = False
            else:
                size = min(BLOCK - len(self._header), len(view) - position)
                self._header += view[position : position + size]
                if len(self._header) == BLOCK:
                    yield from self._step()
            position += size
        if position < len(view):
            with view[position:] as rest:
                yield Stretch(rest, False)

    def finish(self) -> Iterator[Stretch]:
        """What is left at the stream's end. A stream that failed leaves it unsent."""
        rest = bytes(self._whole + self._header)
        self._whole.clear()
        self._header.clear()
        if rest:
            yield Stretch(rest, False)

    def _step(self) -> Iterator[Stretch]:
        """A header is complete: its payload is where the stream may stop next."""
        header = bytes(self._header)
        self._header.clear()
        self._whole += header
        size = _size(header)
        is_first = begins_sample(header)
        self._is_marked = self._is_marked or is_first
        self._begins = self._begins or is_first or not self._is_marked
        is_regular = header[156:157] in _REGULAR
        if size is None or (size > MAX_EXTENSION and not is_regular):
            self._is_open = True
        elif is_regular and size:
            self._loose, self._fixed = size - 1, 1 + padding(size)
        else:
            # An extension header is a part of the member behind it, so a stop in its body is one between members.
            self._fixed = size + padding(size)
        self._is_inside = is_regular and bool(size)
        is_enough = self._loose > _SHORT or len(self._whole) > self.limit - _SHORT - 2 * BLOCK
        if (self._is_inside and is_enough) or self._is_open or len(self._whole) > self.limit + _TOO_MUCH:
            yield from self._give()

    def _give(self) -> Iterator[Stretch]:
        whole, begins = bytes(self._whole), self._begins
        self._whole.clear()
        self._begins = False
        if whole:
            yield Stretch(whole, True, begins)


def _size(header: bytes) -> int | None:
    """Bytes behind a header; None for the end of the archive and for what is no header."""
    digits = header[124:135]
    return int(digits, 8) if header != _ZEROS and digits.isdigit() and not digits.strip(b"01234567") else None
