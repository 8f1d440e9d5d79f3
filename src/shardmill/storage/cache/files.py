"""Files of cached versions; all of it blocks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from shardmill.core.errors import CorruptObject
from shardmill.storage.cache.blocks import Blocks
from shardmill.storage.cache.record import CacheRecord, begin_log, pack_record, read_record
from shardmill.storage.files import disk_errors, write_all, write_all_at
from shardmill.storage.trailer import BLOCK


class Opened(NamedTuple):
    """An open file."""

    descriptor: int
    log: int | None = None
    """Descriptor of the log of a file that has holes."""
    hashes: bytes | None = None
    """Of its blocks, where they had to be read."""

    def close(self) -> None:
        os.close(self.descriptor)
        if self.log is not None:
            os.close(self.log)


def open_passing(size: int) -> Opened:
    """Memory that is read like a file."""
    descriptor = os.memfd_create("shardmill-passing", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return Opened(descriptor)


def open_finished(path: Path, size: int, *, needs_hashes: bool) -> Opened:
    """A finished file.

    Raises:
        FileNotFoundError: It is not there, or not what it was.
    """
    descriptor = _open_existing(path, size)
    if not needs_hashes:
        return Opened(descriptor)
    try:
        return Opened(descriptor, None, read_record(descriptor).blocks)
    except CorruptObject:
        os.close(descriptor)
        raise FileNotFoundError from None


def open_part(path: Path, log: Path, record: CacheRecord, *, is_new: bool) -> Opened:
    """A file with holes, and its log.

    Args:
        is_new: Make them.

    Raises:
        FileNotFoundError: The file is not there, or not what it was.
    """
    descriptor = None if is_new else _open_existing(path, record.size)
    with disk_errors("the cache"):
        if descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(descriptor)
            raise
        found = Opened(descriptor, notes)
        try:
            if os.fstat(notes).st_size == 0:
                os.ftruncate(descriptor, record.size)
                write_all(notes, begin_log(record))
        except BaseException:
            found.close()
            raise
        return found


def publish(descriptor: int, path: Path, log: Path, record: CacheRecord, hashes: bytes) -> Path:
    """Make a file that has no holes any more a finished one; returns where it is then."""
    write_all_at(descriptor, pack_record(record, hashes), record.size)
    final = path.parent.parent / path.name[:2] / path.name
    final.parent.mkdir(exist_ok=True)
    os.rename(path, final)
    log.unlink(missing_ok=True)
    return final


def find_wrong(descriptor: int, blocks: Blocks, numbers: Sequence[int]) -> set[int]:
    """Which blocks are not what their hashes say."""
    wrong = set()
    with disk_errors("the cache"):
        for number in numbers:
            size = min(BLOCK, blocks.size - number * BLOCK)
            data = os.pread(descriptor, size, number * BLOCK)
            digest = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
            if len(data) != size or digest != blocks.digest(number):
                wrong.add(number)
    return wrong


def _open_existing(path: Path, size: int) -> int:
    """Its descriptor; raises FileNotFoundError where somebody removed it or cut it short."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(descriptor).st_size < size:
        os.close(descriptor)
        raise FileNotFoundError
    return descriptor
