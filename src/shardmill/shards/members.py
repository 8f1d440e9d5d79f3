"""Where each member of a shard lies, found by name: built from the headers once, kept as bytes.

An index says for which bytes it was made (`identity`) and is never taken for others. It stands in memory as it stands
in its file, so a million members are tens of megabytes and nothing has to be parsed.
"""

import hashlib
import heapq
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardmill.shards.tar import TarError, TarHeaders

FORMAT = 1
READABLE = (1,)
MAX_BYTES = 256 << 20  # of one index; some five million members

# Numbers stand as this machine has them, so that they can be used in place: another machine's file is rebuilt.
_MAGIC = b"shrdmbr<" if sys.byteorder == "little" else b"shrdmbr>"
_HEAD = struct.Struct("<8sIIQQ16s")  # magic, format, bytes of the identity, members, bytes of names, digest of the rest
_DIGEST = 16
_RUN = 1 << 14  # names sorted in one call, which takes some milliseconds
_PER_MEMBER = 24  # bytes: offset and size of 8 each, end of the name and place in the order of 4 each


class BadIndex(ValueError):
    """The bytes are no index, or not the one that was expected."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One member: its name and where its payload lies."""

    ordinal: int
    """Its place among the shard's members, counted from 0."""
    name: bytes
    offset: int
    """First byte of the payload."""
    size: int
    """Bytes of the payload."""


class MemberIndex:
    """The members of one version of a shard, in its order and by name. Use `IndexBuilder` or `load`."""

    def __init__(self, identity: bytes, count: int, body: bytes) -> None:
        """Args:
        identity: For which bytes it was made.
        count: Members.
        body: Offsets, sizes, ends of names, order by name, names; as in the file.
        """
        self.identity = identity
        self._body = body
        view = memoryview(body)
        self._offsets = view[: 8 * count].cast("Q")
        self._sizes = view[8 * count : 16 * count].cast("Q")
        self._ends = view[16 * count : 20 * count].cast("I")
        self._order = view[20 * count : 24 * count].cast("I")
        self._names = 24 * count

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, and on disk."""
        return _HEAD.size + len(self.identity) + len(self._body)

    def find(self, name: bytes) -> Extent | None:
        """The member of that name, the last one where there are several, as `tar -x` leaves it; None: there is none."""
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            if self._name(self._order[middle]) <= name:
                low = middle + 1
            else:
                high = middle
        if not low or self._name(self._order[low - 1]) != name:
            return None
        return self.at(self._order[low - 1])

    def at(self, ordinal: int) -> Extent:
        """The member at a place in the shard's order."""
        return Extent(ordinal, self._name(ordinal), self._offsets[ordinal], self._sizes[ordinal])

    def page(self, start: int, stop: int) -> list[Extent]:
        """Members in the shard's order; clamped to their number."""
        return [self.at(ordinal) for ordinal in range(start, min(stop, len(self)))]

    def dump(self) -> list[bytes]:
        """The file, in pieces."""
        digest = _digest(self.identity, self._body)
        names = len(self._body) - self._names
        return [
            _HEAD.pack(_MAGIC, FORMAT, len(self.identity), len(self), names, digest),
            self.identity,
            self._body,
        ]

    @classmethod
    def load(cls, data: bytes, identity: bytes) -> "MemberIndex":
        """The index of a file.

        Raises:
            BadIndex: It is damaged, of another format, or made for other bytes.
        """
        if len(data) < _HEAD.size:
            raise BadIndex("it is cut")
        magic, form, length, count, names, digest = _HEAD.unpack_from(data)
        if magic != _MAGIC or form not in READABLE:
            raise BadIndex("it has another format")
        if len(data) != _HEAD.size + length + _PER_MEMBER * count + names:
            raise BadIndex("it has another length than it says")
        body = data[_HEAD.size + length :]
        found = data[_HEAD.size : _HEAD.size + length]
        if _digest(found, body) != digest:
            raise BadIndex("it fails its checksum")
        if found != identity:
            raise BadIndex("it is of another version")
        return cls(found, count, body)

    def _name(self, ordinal: int) -> bytes:
        start = self._ends[ordinal - 1] if ordinal else 0
        return self._body[self._names + start : self._names + self._ends[ordinal]]


class IndexBuilder:
    """Makes an index from a shard's headers, some members at a time.

    An exception from `read` loses nothing: `advance` may be called again.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Args:
        read: Takes offset and length; returns up to that many bytes, fewer only at the end (like `os.pread`).
        size: Bytes of the whole shard.
        """
        self._headers = TarHeaders(read, size)
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._ends = array("I")
        self._names = bytearray()

    def advance(self, limit: int) -> bool:
        """Read at most `limit` further members; False: there are no more.

        Raises:
            TarError: The shard is damaged, or has more members than an index may hold.
        """
        for _ in range(limit):
            member = self._headers.next_member()
            if member is None:
                return False
            self._names += member.name.encode("utf-8", "surrogateescape")
            self._offsets.append(member.offset)
            self._sizes.append(member.size)
            if len(self._names) + _PER_MEMBER * len(self._offsets) > MAX_BYTES:
                reason = f"more than {len(self._ends)} members are more than an index holds; read it whole or by range"
                raise TarError(reason, member.header_offset)
            self._ends.append(len(self._names))
        return True

    def finish(self, identity: bytes) -> MemberIndex:
        """The index, when `advance` has said that there are no more members."""
        names, ends = bytes(self._names), self._ends
        order = _order_by_name(names, ends)
        parts = (self._offsets.tobytes(), self._sizes.tobytes(), ends.tobytes(), order.tobytes(), names)
        return MemberIndex(identity, len(ends), b"".join(parts))


def _order_by_name(names: bytes, ends: Sequence[int]) -> "array[int]":
    """Members by name, those of one name in the shard's order.

    One sort of a million names would keep the interpreter from all other threads for a second, so runs are sorted and
    merged.
    """

    def name(ordinal: int) -> bytes:
        return names[ends[ordinal - 1] if ordinal else 0 : ends[ordinal]]

    starts = range(0, len(ends), _RUN)
    runs = [sorted(range(start, min(start + _RUN, len(ends))), key=name) for start in starts]
    return array("I", heapq.merge(*runs, key=name))


def _digest(identity: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(identity, digest_size=_DIGEST)
    digest.update(body)
    return digest.digest()
