"""Framing fields as tar members, deterministically, straight into the memory that is sent.

Equal arguments give equal bytes in every process and Python version: no clock, no user data base, no locale.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardmill.shards.payloads import Payload

BLOCK = 512  # bytes; every header and payload is padded to it
RECORD = 10240  # bytes; archives are padded to it, as tar has done since tapes
END_OF_ARCHIVE = bytes(2 * BLOCK)
MAX_CACHED_TEMPLATES = 256  # one a combination of mode and owner

_PADDING = bytes(BLOCK)
_USTAR_NAME = 100  # bytes
_USTAR_OWNER = 32
_USTAR_NUMBER = 8**7  # ids; one digit place is the NUL
_USTAR_LARGE = 8**11  # sizes and times: 8 GiB, year 2242
_TAIL_DEVICES = 329 - 155  # where the device numbers stand in what follows the checksum
_CHECKSUM_BLANKS = 7 * 32  # the checksum counts itself as blanks; the eighth is in the tail

_templates: dict[tuple[int, int, int, str, str], tuple[bytes, bytes, int]] = {}


@dataclass(slots=True)
class FramedField:
    """A member to write. The values of its header come from the source member where there is one."""

    name: str
    """The whole member name: key, dot, field."""
    payload: Payload
    mtime: float | int = field(default=0, kw_only=True)
    """Seconds; fractions are rounded, for they would cost two blocks a member."""
    mode: int = field(default=0o444, kw_only=True)
    uid: int = field(default=0, kw_only=True)
    gid: int = field(default=0, kw_only=True)
    uname: str = field(default="", kw_only=True)
    gname: str = field(default="", kw_only=True)
    ordinal: int | None = field(default=None, kw_only=True)
    """Number of the source sample, counted from 0; see `tar_header`."""
    _header: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def header(self) -> bytes:
        """All header blocks of the member; made once."""
        header = self._header
        if header is None:
            header = self._header = tar_header(
                self.name,
                self.payload.size,
                mtime=round(self.mtime),
                mode=self.mode,
                uid=self.uid,
                gid=self.gid,
                uname=self.uname,
                gname=self.gname,
                ordinal=self.ordinal,
            )
        return header


def padding(size: int) -> int:
    """Zero bytes behind a payload."""
    return -size & (BLOCK - 1)


def end_padding(total_bytes: int) -> int:
    """Zero bytes behind the last member, both end blocks included, that make the archive whole records."""
    return len(END_OF_ARCHIVE) + -(total_bytes + len(END_OF_ARCHIVE)) % RECORD


def framed_size(fields: Iterable[FramedField]) -> int:
    """Bytes that `frame_into` will write."""
    total = 0
    for framed in fields:
        size = framed.payload.size
        total += len(framed.header()) + size + (-size & (BLOCK - 1))
    return total


def frame_into(view: memoryview, fields: Sequence[FramedField]) -> int:
    """Write headers, payloads and padding.

    A stream of samples that stops between the end of a payload and the end of the next header looks like a complete
    archive to tar readers. So a sender may hand out `[0, cut)` of a sample at once, and the rest only together with
    the next one: wherever it then stops, it stops inside a payload.

    Args:
        view: Writable, at least `framed_size(fields)` bytes.
        fields: The members, in order.

    Returns:
        The safe cut: the offset of the last byte of the last payload that is not empty; 0 when all are empty.
    """
    position = cut = 0
    for framed in fields:
        header = framed.header()
        start = position + len(header)
        view[position:start] = header
        position = start
        size = framed.payload.size
        if size:
            position = start + size
            framed.payload.write_into(view[start:position])
            cut = position - 1
            if rest := -size & (BLOCK - 1):
                view[position : position + rest] = _PADDING[:rest]
                position += rest
    return cut


def tar_header(
    name: str,
    size: int,
    *,
    mtime: int,
    mode: int,
    uid: int,
    gid: int,
    uname: str,
    gname: str,
    ordinal: int | None = None,
) -> bytes:
    """The header of a regular member: one ustar block, or pax blocks before it where ustar cannot say it.

    The device numbers, which mean nothing for a regular file and which readers pass over, hold `ordinal`, its upper
    bits in the major one: by them a reader that was cut knows where to go on (see `shards.tracking`).

    Args:
        name: Surrogates stand for bytes that are not UTF-8.
        size: Bytes of the payload.
        mtime: Seconds.
        mode: Permission bits.
        uid: Owner's number.
        gid: Group's number.
        uname: Owner's name.
        gname: Group's name.
        ordinal: Number of the source sample, or None; in the first member of each sample.

    Raises:
        ValueError: The name is empty or has a NUL, which a header cannot hold.
    """
    if not name or "\0" in name:
        raise ValueError(f"a tar member cannot be named {name!r}")
    template = _templates.get((mode, uid, gid, uname, gname)) or _template(mode, uid, gid, uname, gname)
    if (
        template is None
        or len(name) > _USTAR_NAME
        or not name.isascii()
        or not (0 <= mtime < _USTAR_LARGE and size < _USTAR_LARGE)
    ):
        return _pax_header(
            name, size, mtime=mtime, mode=mode, uid=uid, gid=gid, uname=uname, gname=gname, ordinal=ordinal
        )
    owner, tail, total = template
    if ordinal is not None:
        devices = _devices(ordinal)
        tail = tail[:_TAIL_DEVICES] + devices + tail[_TAIL_DEVICES + len(devices) :]
        total += sum(devices)
    text = name.encode("ascii")
    numbers = b"%011o\0%011o\0" % (size, mtime)
    # The sum of up to 256 bytes is below Adler-32's modulus, so its low half is that sum plus one.
    total += (zlib.adler32(text) & 0xFFFF) + (zlib.adler32(numbers) & 0xFFFF) - 2
    return b"".join((text.ljust(_USTAR_NAME, b"\0"), owner, numbers, b"%06o\0" % total, tail))


def _template(mode: int, uid: int, gid: int, uname: str, gname: str) -> tuple[bytes, bytes, int] | None:
    """The parts of a ustar block that stay the same from member to member and their checksum; None: it needs pax."""
    if not (0 <= uid < _USTAR_NUMBER and 0 <= gid < _USTAR_NUMBER):
        return None
    if any(len(text) > _USTAR_OWNER or not text.isascii() for text in (uname, gname)):
        return None
    owner = b"%07o\0%07o\0%07o\0" % (mode & 0o7777, uid, gid)
    tail = _tail(b"0", uname.encode("ascii"), gname.encode("ascii"))
    template = (owner, tail, sum(owner) + sum(tail) + _CHECKSUM_BLANKS)
    if len(_templates) >= MAX_CACHED_TEMPLATES:
        _templates.clear()
    _templates[mode, uid, gid, uname, gname] = template
    return template


def _devices(ordinal: int) -> bytes:
    return b"%07o\0%07o\0" % divmod(ordinal, _USTAR_NUMBER)


def _tail(kind: bytes, uname: bytes, gname: bytes) -> bytes:
    """What follows the checksum's digits and NUL, from byte 155."""
    owners = uname.ljust(_USTAR_OWNER, b"\0") + gname.ljust(_USTAR_OWNER, b"\0")
    return b" " + kind + bytes(100) + b"ustar\x0000" + owners + bytes(183)


def _pax_header(
    name: str,
    size: int,
    *,
    mtime: int,
    mode: int,
    uid: int,
    gid: int,
    uname: str,
    gname: str,
    ordinal: int | None,
) -> bytes:
    """Extended header and ustar header as Python's tarfile makes them, which WebDataset writes with."""
    records: dict[str, str] = {}
    for keyword, text, limit in (
        ("path", name, _USTAR_NAME),
        ("uname", uname, _USTAR_OWNER),
        ("gname", gname, _USTAR_OWNER),
    ):
        if len(text) > limit or not text.isascii():
            records[keyword] = text
    numbers = {"uid": uid, "gid": gid, "size": size, "mtime": mtime}
    for keyword, limit in (
        ("uid", _USTAR_NUMBER),
        ("gid", _USTAR_NUMBER),
        ("size", _USTAR_LARGE),
        ("mtime", _USTAR_LARGE),
    ):
        if not 0 <= numbers[keyword] < limit:
            records[keyword] = str(numbers[keyword])
            numbers[keyword] = 0
    body = _pax_records(records)
    extended = _ustar_block(b"././@PaxHeader", len(body), kind=b"x")
    member = _ustar_block(
        name.encode("ascii", "replace")[:_USTAR_NAME],
        numbers["size"],
        mtime=numbers["mtime"],
        mode=mode,
        uid=numbers["uid"],
        gid=numbers["gid"],
        uname=uname.encode("ascii", "replace")[:_USTAR_OWNER],
        gname=gname.encode("ascii", "replace")[:_USTAR_OWNER],
        ordinal=ordinal,
    )
    return extended + body + bytes(padding(len(body))) + member


def _pax_records(records: dict[str, str]) -> bytes:
    parts = []
    try:
        encoded = {keyword: value.encode("utf-8") for keyword, value in records.items()}
    except UnicodeEncodeError:
        parts.append(b"21 hdrcharset=BINARY\n")
        encoded = {keyword: value.encode("utf-8", "surrogateescape") for keyword, value in records.items()}
    for keyword, data in encoded.items():
        rest = len(keyword) + len(data) + 3
        # The length counts its own digits, which may add one more.
        length = rest + len(str(rest))
        length = rest + len(str(length))
        parts.append(b"%d %s=%s\n" % (length, keyword.encode("ascii"), data))
    return b"".join(parts)


def _ustar_block(
    name: bytes,
    size: int,
    *,
    mtime: int = 0,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    uname: bytes = b"",
    gname: bytes = b"",
    kind: bytes = b"0",
    ordinal: int | None = None,
) -> bytes:
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode & 0o7777, uid, gid, size, mtime)
    head, tail = name.ljust(_USTAR_NAME, b"\0") + numbers, _tail(kind, uname, gname)
    if ordinal is not None:
        devices = _devices(ordinal)
        tail = tail[:_TAIL_DEVICES] + devices + tail[_TAIL_DEVICES + len(devices) :]
    return b"%b%06o\0%b" % (head, sum(head) + sum(tail) + _CHECKSUM_BLANKS, tail)
