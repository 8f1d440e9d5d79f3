"""What is kept on disk of a cached version beside its bytes.

A finished file has its record behind its bytes, framed like the trailer of a stored object. A file that still has holes
has a log beside it: the record, then a note for each block, written after the block was. A kill leaves both as they
were, since the kernel keeps what was written; a power cut or a reboot may not, so a log is good for one boot only.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from shardmill.core.errors import CorruptObject
from shardmill.core.meta import ObjectMeta
from shardmill.core.origins import OriginFacts
from shardmill.storage.trailer import BLOCK, frame, read_frame

FORMAT = 1

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HEAD = struct.Struct("<8sI")
_MAGIC = b"shrdfill"
_NOTE = struct.Struct("<I8sI")  # block, xxh3-64 of its bytes, xxh32 of what is before


class CacheRecord(msgspec.Struct, frozen=True, array_like=True):
    """One version of one object."""

    format: int
    bucket: str
    key: str
    size: int
    version: str
    """Source version."""
    etag: str | None
    modified: float | None
    """As the origin told it."""
    fetched: float
    """Unix time; stands for `modified` where the origin told none."""
    content_type: str | None
    user: dict[str, str]
    blocks: bytes
    """8 bytes (xxh3-64, little endian) for each block; of a log empty."""

    @classmethod
    def of(cls, bucket: str, facts: OriginFacts, size: int, version: str, fetched: float) -> "CacheRecord":
        return cls(
            FORMAT,
            bucket,
            facts.key,
            size,
            version,
            facts.etag,
            facts.modified,
            fetched,
            facts.content_type,
            dict(facts.user),
            b"",
        )

    @property
    def meta(self) -> ObjectMeta:
        modified = self.fetched if self.modified is None else self.modified
        return ObjectMeta(self.key, self.size, self.etag, self.version, modified, None, self.user)


def pack_record(record: CacheRecord, blocks: bytes) -> bytes:
    """What stands behind the bytes of a finished file."""
    return frame(msgspec.msgpack.encode(msgspec.structs.replace(record, blocks=blocks)))


def read_record(descriptor: int) -> CacheRecord:
    """The record of a finished file.

    Raises:
        CorruptObject: It is no finished file of this format.
    """
    body, start = read_frame(descriptor)
    record = _decode(body)
    if record.size != start or len(record.blocks) != -(-start // BLOCK) * 8:
        raise CorruptObject("a cached file has another length than its record says")
    return record


def begin_log(record: CacheRecord) -> bytes:
    """The first bytes of a log."""
    body = msgspec.msgpack.encode((boot_id(), msgspec.msgpack.encode(record)))
    head = _HEAD.pack(_MAGIC, len(body)) + body
    return head + xxhash.xxh3_64_digest(head)


def note(block: int, digest: bytes) -> bytes:
    """That a block is there."""
    data = _NOTE.pack(block, digest, 0)[:-4]
    return data + xxhash.xxh32_intdigest(data).to_bytes(4, "little")


def read_log(path: Path) -> tuple[CacheRecord, list[tuple[int, bytes]]]:
    """The record of a log of this boot, and which blocks it notes, with their hashes.

    Raises:
        CorruptObject: It is torn, of another boot, or none.
    """
    data = path.read_bytes()
    if len(data) < _HEAD.size:
        raise CorruptObject("a log of a fill is torn")
    magic, length = _HEAD.unpack_from(data)
    end = _HEAD.size + length
    if magic != _MAGIC or data[end : end + 8] != xxhash.xxh3_64_digest(data[:end]):
        raise CorruptObject("a log of a fill is torn")
    try:
        boot, body = msgspec.msgpack.decode(data[_HEAD.size : end], type=tuple[str, bytes])
    except msgspec.MsgspecError as error:
        raise CorruptObject("a log of a fill cannot be read") from error
    if boot != boot_id():
        raise CorruptObject("a log of a fill is of another boot")
    record = _decode(body)
    return record, [(block, digest) for block, digest in _notes(data[end + 8 :]) if block < -(-record.size // BLOCK)]


def boot_id() -> str:
    """Names the time since the machine was started; another one each time where the kernel does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return os.urandom(8).hex()


def _notes(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start + _NOTE.size <= len(data):
        piece = data[start : start + _NOTE.size]
        block, digest, check = _NOTE.unpack(piece)
        if check == xxhash.xxh32_intdigest(piece[:-4]):
            start += _NOTE.size
            yield block, digest
        else:
            # The disk was full for a moment, and a note was cut: the next one begins somewhere behind it.
            start += 1


def _decode(body: bytes) -> CacheRecord:
    try:
        record = msgspec.msgpack.decode(body, type=CacheRecord)
    except msgspec.MsgspecError as error:
        raise CorruptObject("a record of a cached object cannot be read") from error
    if record.format != FORMAT:
        raise CorruptObject(f"a cached object has format {record.format}; this program reads {FORMAT}")
    return record
