"""How much of an output of unknown form may be given out before it is known to be whole.

Only the end of the HTTP body says for certain that an answer is complete, and some readers do not listen: tar readers
take a stop between two members for the end, others know no end but that of the stream. So bytes are held back.

- Of a tar everything from the last byte of the last payload that is not empty, as of shards made of samples.
- Of anything else the newest `HOLD` bytes, and what is given out ends at an odd position, so inside any record of even
  size.

Sans I/O; `docs/design/2026-11-25-kinds-of-transform.md` has the reasons.
"""

from shardmill.shards.tar import TarError, TarHeaders

HOLD = 256 << 10  # bytes; what fails within its first ones is 422, and these are not worth a reader's patience
MAX_HELD = 8 << 20  # bytes of headers in a row; beyond, a tar is held back like anything else


class _NotYet(Exception):
    """The bytes have not been fed."""


class Holding:
    """Fed with an output piece by piece; nothing is kept but headers."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes fed."""
        self.safe = 0
        """Bytes that may be given out; never falls."""
        self._headers = TarHeaders(self._read, None)
        self._is_tar = True
        """As far as it has been read."""
        self._kept = bytearray()
        self._kept_from = 0
        self._payload_stop = 0
        """Behind the last byte of the last regular member that is not empty."""

    def feed(self, data: memoryview | bytes) -> int:
        """The next bytes; returns how many bytes, from the first on, may be given out now."""
        start, self.size = self.size, self.size + len(data)
        if self._is_tar:
            self._keep(data, start)
            self._read_headers()
            self._keep(b"", self.size)
            self.safe = max(self.safe, min(self.size, self._payload_stop - 1))
            self._is_tar = self._is_tar and self.size - self.safe <= MAX_HELD
        if not self._is_tar:
            self._kept.clear()
            # The greatest odd number that leaves HOLD bytes.
            self.safe = max(self.safe, (self.size - HOLD - 1) | 1)
        return self.safe

    def _keep(self, data: memoryview | bytes, start: int) -> None:
        """Have the bytes from the next header on, as far as they were fed; `start` is where `data` begins."""
        wanted = max(self._kept_from, self._headers.position)
        del self._kept[: wanted - self._kept_from]
        self._kept_from = wanted
        self._kept += data[max(0, wanted + len(self._kept) - start) :]

    def _read_headers(self) -> None:
        try:
            while (member := self._headers.next_member()) is not None:
                if member.size:
                    self._payload_stop = member.offset + member.size
        except _NotYet:
            return
        except TarError:
            self._is_tar = False

    def _read(self, offset: int, length: int) -> bytes:
        position = offset - self._kept_from
        if position + length > len(self._kept):
            raise _NotYet
        return bytes(self._kept[position : position + length])
