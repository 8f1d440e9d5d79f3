"""Blocking steps on files that must survive: synced writes, and what errors of the disk mean."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from shardmill.core.errors import Busy, InsufficientStorage, ServerError, ShardmillError

_libc = ctypes.CDLL(None, use_errno=True)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the operating system into those of a node; a failure is never an absence.

    Raises:
        InsufficientStorage: The disk, a quota or a file size limit is full.
        Busy: No more files can be open at once.
        ServerError: Anything else; the message has no path in it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ShardmillError):
            raise
        raise disk_error(error, what) from error


def is_full(error: OSError) -> bool:
    """Whether an error tells of a disk, a quota or a file size limit that is full."""
    return error.errno in _FULL


def disk_error(error: OSError, what: str) -> ShardmillError:
    """What an error of the operating system is to a node."""
    if is_full(error):
        return InsufficientStorage(f"{what}: the disk is full; nothing was changed")
    if error.errno in _SCARCE:
        return Busy(f"{what}: {os.strerror(error.errno)}; ask again", retry_after=1)
    return ServerError(f"{what}: the disk failed: {os.strerror(error.errno) if error.errno else 'unknown'}")


def sync_directory(path: Path | int) -> None:
    """Make names in a directory durable."""
    if isinstance(path, int):
        os.fsync(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_system(descriptor: int) -> None:
    """Make everything durable that the file system of an open file holds; may take long.

    A failure is told once to each descriptor that was open before, and Linux tells none before 5.8.
    """
    if _libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of it, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_all_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """As `write_all`, from that byte of the file on."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is known before the upload is read; not everywhere possible."""
    if size <= 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            raise


def replace_durably(path: Path, data: bytes) -> None:
    """Put a small file in place of another, all or nothing."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_directory(path.parent)
