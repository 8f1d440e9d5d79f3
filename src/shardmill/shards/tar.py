"""Reading tar headers strictly: ustar, pax, GNU long names and base-256 numbers.

What Python's tarfile takes silently (a corrupt header after the first member ends its archive) is an error here that
names the byte. Only headers are read; a payload is promised to lie within the file before its member is handed out.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512  # bytes; headers and payloads start at its multiples
MAX_EXTENSION = 1 << 20  # bytes of one pax or long-name header; names and times need a few hundred
MAX_CHAIN = 16  # extension headers before one member; writers emit one or two
TRAILER_SCAN = 1 << 20  # bytes looked at behind the end of the archive, to tell padding from junk
STREAM_CHUNK = 1 << 20  # bytes; a declared size is never allocated before it has arrived

_ZEROS = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_PAYLOAD = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_PAX_LOCAL = frozenset((b"x", b"X"))
_LONG_NAMES = {b"L": "path", b"K": "linkpath"}
_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


class TarError(ValueError):
    """The bytes are not a tar shard, or stop being one at `offset`."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason, offset)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.reason} (at byte {self.offset})"


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of the archive."""

    name: str
    """Decoded as UTF-8; other bytes become surrogates, as `os.fsdecode` makes them."""
    offset: int
    """First byte of the payload."""
    size: int
    """Bytes of the payload."""
    header_offset: int
    """First byte of the member, extension headers included."""
    mtime: float | int
    mode: int
    uid: int
    gid: int
    uname: str
    gname: str


class TarHeaders:
    """The regular members of an archive, one at a time, in order.

    An exception from `read` leaves everything as it was, so a reader over bytes that are still arriving may call
    `next_member` again.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int | None) -> None:
        """Args:
        read: Takes offset and length; returns up to that many bytes, fewer only at the end (like `os.pread`).
        size: Bytes of the whole archive; None when only reading tells, offsets then only grow.
        """
        self._read = read
        self._size = size
        self._position = 0
        self._ended = False
        self._globals: dict[str, str] = {}
        self._owner_bytes = b""
        self._owner = (0, 0, 0)
        self._names_bytes = b""
        self._names = ("", "")
        self.skipped = 0
        """Members passed over because they are no regular files."""
        self.warnings: list[str] = []
        """What is odd about the archive, though none of its members is lost."""

    @property
    def position(self) -> int:
        """Where the next header will be read."""
        return self._position

    @property
    def ended(self) -> bool:
        """Whether the end of the archive has been read."""
        return self._ended

    def next_member(self) -> Member | None:
        """Read up to the next regular member; None at the end of the archive.

        Raises:
            TarError: The archive is damaged, cut, compressed or something else altogether.
        """
        while not self._ended:
            start = self._position
            block = self._block(start)
            if block is None:
                return None
            fields: dict[str, str] = {}
            position = start
            chain = 0
            while (kind := self._check(block, position)) in b"xXgLK":
                chain += 1
                if chain > MAX_CHAIN:
                    raise TarError(f"more than {MAX_CHAIN} extension headers before one member", start)
                position, block = self._extension(kind, block, position, fields)
            member = self._member(kind, block, start, position, fields)
            if member is not None:
                return member
            self.skipped += 1
        return None

    def _block(self, position: int) -> bytes | None:
        """The header block at a member's start; None when the archive ends here."""
        expected = BLOCK if self._size is None else min(BLOCK, self._size - position)
        block = self._fetch(position, expected)
        if len(block) == BLOCK and block != _ZEROS:
            return block
        if not position and len(block) < BLOCK:
            raise _not_a_shard(block)
        if self._size is not None and len(block) < expected:
            raise TarError(f"the bytes end here, though the shard has {self._size}; it changed", position)
        if block.strip(b"\0"):
            raise TarError(f"truncated in a header: {len(block)} of {BLOCK} bytes", position)
        if len(block) < BLOCK:
            self.warnings.append(f"the archive has no end marker (at byte {position})")
        else:
            self._inspect_trailer(position)
        self._ended = True
        return None

    def _inspect_trailer(self, position: int) -> None:
        """Warn about what follows the first zero block. Readers stop there; so do GNU tar, tarfile and WebDataset."""
        if self._size is None:
            return
        rest = self._fetch(position + BLOCK, min(self._size - position - BLOCK, TRAILER_SCAN))
        if len(rest) < BLOCK:
            self.warnings.append(f"the archive has only one zero block at its end (at byte {position})")
        elif rest.strip(b"\0"):
            self.warnings.append(
                f"{self._size - position} bytes behind the end of the archive are not all zero; ignored"
            )

    def _check(self, block: bytes, position: int) -> bytes:
        """Verify a header's checksum; returns its type flag."""
        text = block[148:156]
        stored = _number(text, "checksum", position + 148) if position else _first_checksum(text, block)
        # The sum of 256 bytes is below Adler-32's modulus, so its low half is that sum plus one.
        total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
        total += 256 - (zlib.adler32(text) & 0xFFFF) + 1
        # Early Sun tars summed signed bytes.
        if stored != total and stored != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
            if not position:
                raise _not_a_shard(block)
            raise TarError(f"bad checksum in a header: {stored} stored, {total} computed", position)
        return block[156:157]

    def _extension(self, kind: bytes, block: bytes, position: int, fields: dict[str, str]) -> tuple[int, bytes]:
        """Read one extension header and the block behind it; the first header to set a field wins, as in tarfile."""
        size = _number(block[124:136], "size", position + 124)
        if not 0 <= size <= MAX_EXTENSION:
            raise TarError(f"an extension header of {size} bytes, more than {MAX_EXTENSION}", position)
        following = position + BLOCK + size + (-size & (BLOCK - 1))
        if self._size is not None and following + BLOCK > self._size:
            raise TarError("truncated in an extension header", position)
        data = self._fetch(position + BLOCK, following - position)
        if len(data) < following - position:
            raise TarError("truncated in an extension header", position)
        body = data[:size]
        if kind == b"g":
            self._globals.update(_pax_fields(body, position, is_global=True))
        elif kind in _PAX_LOCAL:
            for name, value in _pax_fields(body, position, is_global=False).items():
                fields.setdefault(name, value)
        else:
            fields.setdefault(_LONG_NAMES[kind], _text(body))
        block = data[-BLOCK:]
        if block == _ZEROS:
            raise TarError("an extension header without a member behind it", position)
        return following, block

    def _member(self, kind: bytes, block: bytes, start: int, position: int, fields: dict[str, str]) -> Member | None:
        """Turn a verified header into a member and step behind its payload; None for what is no regular file."""
        if self._globals:
            fields = {**self._globals, **fields}
        if kind == b"S" or any(name.startswith("GNU.sparse.") for name in fields):
            raise TarError("a sparse member; store it whole", position)
        size = (
            _decimal(fields["size"], "size", position)
            if "size" in fields
            else _number(block[124:136], "size", position + 124)
        )
        name = fields["path"].rstrip("/") if "path" in fields else _name(block)
        if kind in _WITHOUT_PAYLOAD or (kind == b"\0" and name.endswith("/")):
            size = 0
        offset = position + BLOCK
        stop = offset + size
        behind = stop + (-size & (BLOCK - 1))
        if size < 0:
            raise TarError(f"member {name!r} has the size {size}", position)
        if self._size is not None and behind > self._size:
            if stop <= self._size:
                raise TarError(f"truncated in the padding behind member {name!r}", self._size)
            raise TarError(f"truncated: member {name!r} has {size} bytes, {self._size - offset} are there", position)
        if kind not in _REGULAR or (kind == b"\0" and name.endswith("/")):
            self._position = behind
            return None
        member = self._describe(block, start, position, name, offset, size, fields)
        self._position = behind
        return member

    def _describe(
        self, block: bytes, start: int, position: int, name: str, offset: int, size: int, fields: dict[str, str]
    ) -> Member:
        owner = block[100:124]
        if owner != self._owner_bytes:
            self._owner = (
                _number(owner[:8], "mode", position + 100),
                _number(owner[8:16], "uid", position + 108),
                _number(owner[16:], "gid", position + 116),
            )
            self._owner_bytes = owner
        # Format v7 has no owner names.
        names = block[265:329] if block[257:262] == b"ustar" else b""
        if names != self._names_bytes:
            self._names = (_text(names[:32]), _text(names[32:]))
            self._names_bytes = names
        mode, uid, gid = self._owner
        uname, gname = self._names
        mtime: float | int = _number(block[136:148], "mtime", position + 136)
        if fields:
            mtime = _pax_time(fields["mtime"], position) if "mtime" in fields else mtime
            uid = _decimal(fields["uid"], "uid", position) if "uid" in fields else uid
            gid = _decimal(fields["gid"], "gid", position) if "gid" in fields else gid
            uname, gname = fields.get("uname", uname), fields.get("gname", gname)
        return Member(name, offset, size, start, mtime, mode, uid, gid, uname, gname)

    def _fetch(self, offset: int, length: int) -> bytes:
        """Read until `length` bytes are there or nothing more comes."""
        if length <= 0:
            return b""
        data = self._read(offset, length)
        while len(data) < length:
            more = self._read(offset + len(data), length - len(data))
            if not more:
                break
            data += more
        return data


def iter_stream(file: BinaryIO, *, require_end: bool = True) -> Iterator[tuple[Member, bytes]]:
    """Read a tar that arrives in order, member by member, until the stream ends.

    Args:
        file: Only `read` is called; the caller closes it.
        require_end: Without the archive's end marker raise, because a stream that was cut between two members must
            never look complete. False accepts that, as for archives whose writer left the marker out.

    Yields:
        Each regular member with its payload.

    Raises:
        TarError: As `TarHeaders.next_member`, and for a payload that is cut.
    """
    stream = _Forward(file)
    headers = TarHeaders(stream.read_at, None)
    while (member := headers.next_member()) is not None:
        payload = stream.read_at(member.offset, member.size)
        if len(payload) < member.size:
            raise TarError(
                f"truncated: member {member.name!r} has {member.size} bytes, {len(payload)} arrived",
                member.header_offset,
            )
        yield member, payload
    if headers.warnings and require_end:
        raise TarError("the stream ends without end-of-archive; it may have been cut", headers.position)
    stream.drain()


class _Forward:
    """Reads at growing offsets of a stream; what lies between is dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0

    def read_at(self, offset: int, length: int) -> bytes:
        while self._position < offset:
            if not self._take(min(offset - self._position, STREAM_CHUNK)):
                # Everything behind is missing too; the caller knows what it expected here.
                raise TarError(f"truncated: {offset - self._position} bytes are missing", self._position)
        data = self._take(min(length, STREAM_CHUNK))
        if len(data) == length or not data:
            return data
        parts = bytearray(data)
        while len(parts) < length and (data := self._take(min(length - len(parts), STREAM_CHUNK))):
            parts += data
        return bytes(parts)

    def drain(self) -> None:
        """Read what is left, so that whoever cuts the stream later than here is heard as well."""
        while self._take(STREAM_CHUNK):
            pass

    def _take(self, length: int) -> bytes:
        data = self._file.read(length) if length else b""
        self._position += len(data)
        return data


def _not_a_shard(block: bytes) -> TarError:
    if not block:
        return TarError("not a tar shard: it is empty", 0)
    for magic, name in _MAGICS:
        if block.startswith(magic):
            return TarError(f"not a tar shard: it is {name}-compressed; store it decompressed", 0)
    if block[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return TarError("not a tar shard: it is an HTML or XML page, perhaps an error message that was saved", 0)
    if len(block) < BLOCK:
        return TarError(f"not a tar shard: it has only {len(block)} bytes", 0)
    return TarError("not a tar shard: its first block is no tar header", 0)


def _first_checksum(text: bytes, block: bytes) -> int:
    try:
        return _number(text, "checksum", 148)
    except TarError:
        raise _not_a_shard(block) from None


def _number(text: bytes, what: str, offset: int) -> int:
    """A numeric header field: octal digits, or GNU's base-256 behind a byte 0x80 (positive) or 0xFF (negative)."""
    lead = text[0]
    if lead == 0x80:
        return int.from_bytes(text[1:], "big")
    if lead == 0xFF:
        return int.from_bytes(text[1:], "big") - (1 << 8 * (len(text) - 1))
    digits = text.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    try:
        # isdigit first: int() takes signs, underscores and white space.
        return int(digits, 8) if digits.isdigit() else _refuse(text, what, offset)
    except ValueError:
        return _refuse(text, what, offset)


def _refuse(text: bytes, what: str, offset: int) -> int:
    raise TarError(f"a header's {what} is {text!r}, not an octal number", offset)


def _decimal(text: str, what: str, offset: int) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise TarError(f"a pax header's {what} is {text[:40]!r}, not a decimal number", offset)
    return int(text)


def _pax_time(text: str, offset: int) -> float | int:
    try:
        seconds = int(text) if text.isdecimal() else float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise TarError(f"a pax header's mtime is {text[:40]!r}, not a number of seconds", offset)
    return seconds


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    # Only POSIX headers have a prefix; GNU ones keep other things there.
    if block[257:263] == b"ustar\0" and block[345]:
        return f"{_text(block[345:500])}/{name}"
    return name


def _pax_fields(data: bytes, position: int, *, is_global: bool) -> dict[str, str]:
    """Records `LENGTH KEYWORD=VALUE\\n`, POSIX.1-2008 pax; the length counts the whole record."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(data):
        if data[start] == 0 and not data[start:].strip(b"\0"):
            break
        digits, space, _ = data[start : start + 21].partition(b" ")
        if not (space and digits.isdigit()):
            raise TarError("a pax record without its length", position + BLOCK + start)
        stop = start + int(digits)
        keyword, equals, value = data[start + len(digits) + 1 : stop - 1].partition(b"=")
        if stop > len(data) or not equals or not keyword or data[stop - 1 : stop] != b"\n":
            raise TarError("a pax record whose length is wrong", position + BLOCK + start)
        if is_global and keyword == b"size":
            raise TarError("a global pax header that sets every member's size", position + BLOCK + start)
        # An empty value means: as the member's own header says.
        if value:
            fields[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return fields
