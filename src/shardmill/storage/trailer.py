"""What stands behind an object's bytes in its file: who it is, and how to know that the bytes are right.

payload | body (MessagePack) | footer (fixed): body length, format, xxh3-64 of the body, magic. The truth of an object
is in its own file, so length, ETag and bytes of an answer are always of one version.
"""

import os
import struct

import msgspec
import xxhash

from shardmill.core.errors import CorruptObject
from shardmill.core.meta import ObjectMeta

BLOCK = 1 << 20  # bytes; each has its own hash, so that a range is verified by reading little more than itself
FORMAT = 1
READABLE = (1,)

_MAGIC = b"shrdmill"
_FOOTER = struct.Struct("<QII8s8s")
_FIRST_READ = 4096  # bytes from the end; holds the trailer of objects up to some 400 MB


class Trailer(msgspec.Struct, frozen=True, array_like=True):
    """The body. `blocks` holds 8 bytes (xxh3-64, little endian) for each block."""

    bucket: str
    key: str
    size: int
    checksum: str
    """32 hex digits of xxh3-128 over the bytes."""
    blocks: bytes
    version: str
    """Of this write; unique."""
    modified: float
    user: dict[str, str]

    @property
    def meta(self) -> ObjectMeta:
        return ObjectMeta(
            key=self.key,
            size=self.size,
            etag=self.checksum,
            version=f"{self.version}-{self.checksum}",
            modified=self.modified,
            checksum=f"xxh3:{self.checksum}",
            user=self.user,
        )

    def is_block_right(self, number: int, data: bytes) -> bool:
        """Whether `data` are the bytes of that block."""
        return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") == self.blocks[number * 8 : number * 8 + 8]


class Hasher:
    """Hashes a body as it passes, whole and by block."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._blocks = bytearray()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._whole.update(view)
        while view:
            room = BLOCK - self.size % BLOCK
            piece = view[:room]
            self._block.update(piece)
            self.size += len(piece)
            if self.size % BLOCK == 0:
                self._end_block()
            view = view[room:]

    @property
    def checksum(self) -> str:
        return self._whole.hexdigest()

    def blocks(self) -> bytes:
        """Hashes of all blocks of what has passed."""
        return bytes(self._blocks) + (self._digest() if self.size % BLOCK else b"")

    def _end_block(self) -> None:
        self._blocks += self._digest()
        self._block.reset()

    def _digest(self) -> bytes:
        return self._block.intdigest().to_bytes(8, "little")


def pack(trailer: Trailer) -> bytes:
    """The trailer as it stands behind the payload."""
    return frame(msgspec.msgpack.encode(trailer))


def frame(body: bytes) -> bytes:
    """A body with the footer that tells where it begins, and that it is right."""
    digest = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    return body + _FOOTER.pack(len(body), FORMAT, 0, digest, _MAGIC)


def read_trailer(descriptor: int) -> Trailer:
    """Read and check the trailer of an open file.

    Raises:
        CorruptObject: There is no whole, right trailer there.
    """
    body, start = read_frame(descriptor)
    try:
        trailer = msgspec.msgpack.decode(body, type=Trailer)
    except msgspec.MsgspecError as error:
        raise CorruptObject("an object's trailer cannot be read") from error
    if trailer.size != start or len(trailer.blocks) != -(-trailer.size // BLOCK) * 8:
        raise CorruptObject("an object's file has another length than its trailer says")
    return trailer


def read_frame(descriptor: int) -> tuple[bytes, int]:
    """The body at the end of an open file, and where it begins there.

    Raises:
        CorruptObject: There is none that is whole and right.
    """
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, min(size, _FIRST_READ), max(0, size - _FIRST_READ))
    if len(tail) < _FOOTER.size:
        raise CorruptObject("an object's file is torn")
    length, form, _, digest, magic = _FOOTER.unpack(tail[-_FOOTER.size :])
    if magic != _MAGIC or length > size - _FOOTER.size:
        raise CorruptObject("an object's file is torn")
    if form not in READABLE:
        raise CorruptObject(f"an object's file has format {form}; this program reads {READABLE}")
    start = size - _FOOTER.size - length
    body = (
        os.pread(descriptor, length, start)
        if length + _FOOTER.size > len(tail)
        else tail[-_FOOTER.size - length : -_FOOTER.size]
    )
    if xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") != digest:
        raise CorruptObject("an object's trailer fails its checksum")
    return body, start
