"""What an earlier process left of a bucket's cache; all of it blocks.

What is torn, or of another boot and not whole, is removed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardmill.core.errors import CorruptObject
from shardmill.storage.cache.blocks import ABSENT, THERE, Blocks
from shardmill.storage.cache.pieces import punch
from shardmill.storage.cache.record import CacheRecord, read_log, read_record
from shardmill.storage.trailer import BLOCK


@dataclass(frozen=True, slots=True)
class Kept:
    """One version."""

    record: CacheRecord
    path: Path
    log: Path | None
    """Beside a file that has holes."""
    blocks: Blocks | None
    """None: it is whole."""
    used: float
    """Unix time of the last use."""
    taken: int
    """Bytes of the disk."""


def find_kept(directory: Path, parts: Path) -> Iterator[Kept]:
    """All versions below a directory; `parts`, below it, is that of files with holes and is made."""
    parts.mkdir(parents=True, exist_ok=True)
    for folder in directory.iterdir():
        if folder != parts:
            for path in folder.iterdir():
                yield from _load(path, None, is_part=False)
    logs = {path for path in parts.iterdir() if path.suffix == ".log"}
    for path in set(parts.iterdir()) - logs:
        log = path.with_suffix(".log")
        yield from _load(path, log if log in logs else None, is_part=True)
    for log in logs:
        if not log.with_suffix("").exists():
            log.unlink(missing_ok=True)


def _load(path: Path, log: Path | None, *, is_part: bool) -> Iterator[Kept]:
    blocks: Blocks | None = None
    try:
        if is_part:
            record, blocks = _read_part(log)
            _punch_holes(path, blocks)
        else:
            record = _read_kept(path)
        used = path.stat().st_mtime
    except (CorruptObject, OSError):
        path.unlink(missing_ok=True)
        if log is not None:
            log.unlink(missing_ok=True)
        return
    count = -(-record.size // BLOCK)
    taken = (blocks or Blocks(record.size, bytes(8 * count))).room(0, count, THERE)
    yield Kept(record, path, log, blocks, used, taken)


def _read_kept(path: Path) -> CacheRecord:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_record(descriptor)
    finally:
        os.close(descriptor)


def _read_part(log: Path | None) -> tuple[CacheRecord, Blocks]:
    if log is None:
        raise CorruptObject("a fill without a log")
    record, notes = read_log(log)
    blocks = Blocks(record.size)
    for block, digest in notes:
        blocks.find(block, digest)
    return record, blocks


def _punch_holes(path: Path, blocks: Blocks) -> None:
    """Give back the room of blocks that were being written when the process ended."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        first = 0
        while (run := blocks.next_run(ABSENT, first, blocks.count, blocks.count)) is not None:
            first = run[1]
            punch(descriptor, run[0] * BLOCK, run[1] * BLOCK)
    finally:
        os.close(descriptor)
