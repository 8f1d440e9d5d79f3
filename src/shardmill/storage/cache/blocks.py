"""Which bytes of one version of an object are on disk; pure.

A block is there when all its bytes were written and hashed. Of one that is arriving, the first bytes may be read, too.
"""

from collections.abc import Collection, Sequence

from shardmill.storage.trailer import BLOCK

ABSENT, WANTED, ARRIVING, THERE = range(4)
"""States of a block: not there; not there, and its room on the disk is taken; being brought; there."""

PAGE = 4096  # bytes; what a file takes on the disk is a multiple
_RECORD = 1024  # bytes of what is kept beside the bytes and the hashes, with the last block


class Blocks:
    """The blocks of one version.

    Args:
        size: Bytes of the object.
        hashes: xxh3-64 of each block (8 bytes, little endian) if all are there; None: none is.
    """

    def __init__(self, size: int, hashes: bytes | None = None) -> None:
        self.size = size
        self.count = -(-size // BLOCK)
        self.hashes = bytearray(hashes or bytes(8 * self.count))
        self.there = self.count if hashes is not None else 0
        """Blocks that are there."""
        self._states = bytearray([THERE if hashes is not None else ABSENT]) * self.count
        self._verified = bytearray(self.count)
        self._begun: dict[int, int] = {}
        """Block that arrives → bytes of it that are there."""

    @property
    def is_complete(self) -> bool:
        return self.there == self.count

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The blocks of bytes [start, stop): first, and one past the last."""
        return start // BLOCK, -(-min(stop, self.size) // BLOCK)

    def reach(self, start: int, stop: int) -> int:
        """How far all bytes from `start` on can be read: at most to `stop` or the size; `start` where none can."""
        stop = min(stop, self.size)
        if self.there == self.count:
            return max(start, stop)
        position = start
        while position < stop:
            block = position // BLOCK
            if self._states[block] != THERE:
                return min(stop, max(position, block * BLOCK + self._begun.get(block, 0)))
            position = (block + 1) * BLOCK
        return max(start, stop)

    def room(self, first: int, last: int, state: int) -> int:
        """Bytes of disk that the blocks of that state in [first, last) take when they are there."""
        count = self._states.count(state, first, last)
        if count and last == self.count and self._states[-1] == state:
            tail = self.size - (self.count - 1) * BLOCK + _RECORD + 8 * self.count
            return (count - 1) * BLOCK + -(-tail // PAGE) * PAGE
        return count * BLOCK

    def turn(self, first: int, last: int, state: int, into: int) -> None:
        """Change the state of those blocks in [first, last) that have `state`."""
        self._states[first:last] = self._states[first:last].replace(bytes([state]), bytes([into]))

    def next_run(self, state: int, first: int, last: int, most: int) -> tuple[int, int] | None:
        """The first consecutive blocks of that state in [first, last), at most `most`."""
        begin = self._states.find(state, first, last)
        if begin < 0:
            return None
        end = begin + 1
        while end < min(last, begin + most) and self._states[end] == state:
            end += 1
        return begin, end

    def state(self, block: int) -> int:
        return self._states[block]

    def count_of(self, state: int) -> int:
        return self._states.count(state)

    def begin(self, block: int, size: int) -> None:
        """So many bytes of an arriving block are there."""
        self._begun[block] = size

    def begun(self, block: int) -> int:
        """Bytes of an arriving block that are there."""
        return self._begun.get(block, 0)

    def add(self, block: int, digest: bytes) -> None:
        """A block was written whole; read back later, it is right if it has this hash."""
        self._begun.pop(block, None)
        self.hashes[block * 8 : block * 8 + 8] = digest
        self._verified[block] = 1
        self._put(block, THERE)

    def find(self, block: int, digest: bytes) -> None:
        """A block is there from before this process began, as it was noted then."""
        self.hashes[block * 8 : block * 8 + 8] = digest
        self._put(block, THERE)

    def drop(self, block: int, into: int = ABSENT) -> None:
        """It is not there, or not any more."""
        self._begun.pop(block, None)
        self._verified[block] = 0
        self._put(block, into)

    def digest(self, block: int) -> bytes:
        return bytes(self.hashes[block * 8 : block * 8 + 8])

    def unverified(self, start: int, stop: int) -> Sequence[int]:
        """Blocks of bytes [start, stop) that are there and were not looked at since this process began."""
        first, last = self.span(start, stop)
        if self._verified.find(0, first, last) < 0:
            return ()
        return [block for block in range(first, last) if not self._verified[block] and self._states[block] == THERE]

    def verify(self, block: int) -> None:
        """It was read and is right."""
        self._verified[block] = 1

    def ranges(self) -> list[tuple[int, int]]:
        """Bytes [start, stop) that are there, in order."""
        return self.runs(THERE, 0, self.count)

    def runs(self, state: int, first: int, last: int, *, without: Collection[int] = ()) -> list[tuple[int, int]]:
        """Bytes [start, stop) of the blocks of that state in [first, last), but for some, in order."""
        found: list[tuple[int, int]] = []
        while (run := self.next_run(state, first, last, self.count)) is not None:
            begin, first = run
            for end in [*sorted(block for block in without if begin <= block < first), first]:
                if begin < end:
                    found.append((begin * BLOCK, min(self.size, end * BLOCK)))
                begin = end + 1
        return found

    def _put(self, block: int, state: int) -> None:
        self.there += (state == THERE) - (self._states[block] == THERE)
        self._states[block] = state
