"""Following a transformed shard as it arrives: which source sample its last bytes belong to.

Each output sample's first header has the number of the source sample it came from (see `shards.framing`). A reader that
is cut asks for the shard from that sample on, drops what it has of it, and goes on with the same bytes.
"""

BLOCK = 512

_ZEROS = bytes(BLOCK)
_EXTENSIONS = b"xXgLK"
_DEVICES = slice(329, 345)


class SampleTracker:
    """Fed with the stream in pieces of any size; looks at headers only."""

    def __init__(self) -> None:
        self.position = 0
        """Bytes seen."""
        self.ordinal: int | None = None
        """Source sample of the last header seen; None before the first."""
        self.offset = 0
        """Where that source sample's output begins."""
        self.end: int | None = None
        """Where the archive's end marker begins, once it was seen."""
        self._header_at = 0
        self._header = bytearray()
        self._extended_at: int | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes of the stream."""
        stop = self.position + len(data)
        while self.end is None and self._header_at + len(self._header) < stop:
            start = self._header_at + len(self._header) - self.position
            self._header += data[start : start + BLOCK - len(self._header)]
            if len(self._header) == BLOCK:
                self._take(bytes(self._header))
                self._header.clear()
        self.position = stop

    def rewind(self) -> int:
        """Go back to where the current source sample begins; returns the position there."""
        self.position = self._header_at = self.offset
        self._header.clear()
        self._extended_at = None
        self.end = None
        return self.offset

    def _take(self, block: bytes) -> None:
        if block == _ZEROS:
            self.end = self._header_at
            return
        kind = block[156]
        if kind in _EXTENSIONS:
            if self._extended_at is None:
                self._extended_at = self._header_at
        else:
            ordinal = ordinal_of(block)
            if ordinal is not None and ordinal != self.ordinal:
                self.ordinal = ordinal
                self.offset = self._header_at if self._extended_at is None else self._extended_at
            self._extended_at = None
        size = int(block[124:135].strip(b" \0") or b"0", 8)
        self._header_at += BLOCK + size + -size % BLOCK


def begins_sample(block: bytes) -> bool:
    """Whether a member's ustar header is the first of a sample, as far as it says so."""
    return bool(block[_DEVICES.start])


def ordinal_of(block: bytes) -> int | None:
    """The number of the source sample in a member's ustar header; None: it is not the first of a sample."""
    devices = block[_DEVICES]
    return (int(devices[:7], 8) << 21) + int(devices[8:15], 8) if devices[0] else None
