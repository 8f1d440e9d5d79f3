"""Metadata of every object of a pool bucket, from the files: what a lost index is made of again.

Files that are not in memory are waited for by several threads, each reading its part in the order of inodes, which is
mostly that of the disk. Only some parts are read ahead, so memory is bounded whatever the bucket holds.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from shardmill.core.errors import CorruptObject
from shardmill.core.meta import ObjectMeta
from shardmill.storage.trailer import read_trailer

logger = logging.getLogger(__name__)

READERS = 4
PART = 2000  # files read by one thread at once


def scan(directory: Path, *, hidden: str) -> Iterator[ObjectMeta]:
    """Metadata of all objects; those whose file is torn are left out.

    Args:
        directory: Of the bucket; its folders hold the files.
        hidden: The folder that holds no objects.
    """
    waiting: deque[Future[list[ObjectMeta]]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="scan") as readers:
        try:
            for folder, names in _parts(directory, hidden):
                waiting.append(readers.submit(_read, folder, names))
                if len(waiting) > 2 * READERS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _parts(directory: Path, hidden: str) -> Iterator[tuple[Path, Sequence[str]]]:
    for _, first in sorted(_entries(directory), key=lambda entry: entry[1]):
        if first == hidden:
            continue
        folder = directory / first
        names = [name for _, name in sorted(_entries(folder))]
        for start in range(0, len(names), PART):
            yield folder, names[start : start + PART]


def _entries(folder: Path) -> list[tuple[int, str]]:
    """Inodes and names in a folder; none if it is no folder, or its bucket is being removed."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.inode(), entry.name) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(folder: Path, names: Sequence[str]) -> list[ObjectMeta]:
    found = []
    try:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        for name in names:
            meta = _meta(name, inside)
            if meta is not None:
                found.append(meta)
    finally:
        os.close(inside)
    return found


def _meta(name: str, folder: int) -> ObjectMeta | None:
    """Of the object in a file; None if it has gone or cannot be read."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            return read_trailer(descriptor).meta
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except (CorruptObject, OSError) as error:
        logger.warning("a file of the pool is left out of the listing: %s", error)
        return None
