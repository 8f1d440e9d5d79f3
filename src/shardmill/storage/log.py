"""Small objects as they are before the disk has their files: one flush makes a group of them durable.

Two files take turns, their space taken at the start and overwritten in place. A file begins with a number of its own
that goes into the checksum of each record, so nothing of an earlier turn is ever taken for a record; it is given a new
one, durably, once the disk has the files of all its objects (`clear`). A record is an object's whole file, or says that
what was logged of a key before no longer counts.
"""

import contextlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shardmill.core.errors import InsufficientStorage, ServerError, ShardmillError
from shardmill.storage.files import disk_errors, reserve, write_all

FORMAT = 1
LARGEST = 16 << 20  # bytes of one file
LEAST = 1 << 20  # bytes; the same on a small disk
_SHARE = 256  # of the disk for each file
_MAGIC = b"shrdlog1"
_HEADER = struct.Struct("<8sI4x16sQ")  # magic, format, number, turn
_START = 4096  # bytes before the first record
_HEAD = struct.Struct("<8s8sIHxx")  # checksum, store, length of the file, length of the key
_END = bytes(_HEAD.size)  # stands behind the last record
_CHECKSUM = 8  # bytes of the head that are the checksum of the rest
_SETTLED = 0xFFFFFFFF  # as a length: earlier records of the key do not count
_RECORDS_AT_ONCE = 256  # buffers of one system call; the kernel takes 1024

Key = tuple[str, str]
"""Store id and key."""


@dataclass(frozen=True, slots=True)
class Record:
    """One object; `content` None: what was logged of it before does not count."""

    store: str
    key: str
    content: bytes | bytearray | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record's content lies, if it has any."""

    store: str
    key: str
    start: int
    length: int | None


class LogFile:
    """One of the files."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.turn = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._number = b""
        self._size = 0
        self._position = 0
        with contextlib.suppress(ShardmillError), disk_errors("the log"):
            reserve(self._descriptor, size)
            self._size = size

    def load(self) -> Iterator[Place]:
        """Records of an earlier process in order, up to the first that is not whole; blocking."""
        header = os.pread(self._descriptor, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            return
        magic, form, number, self.turn = _HEADER.unpack(header)
        if magic != _MAGIC:
            return
        if form != FORMAT:
            raise ServerError(
                f"the log of small objects has format {form}, and this program reads {FORMAT}; start the version that "
                "wrote it once more and stop it in order, which stores what is in it"
            )
        position, end = _START, os.fstat(self._descriptor).st_size
        while len(head := os.pread(self._descriptor, _HEAD.size, position)) == _HEAD.size:
            checksum, store, length, key_length = _HEAD.unpack(head)
            size = None if length == _SETTLED else length
            if position + _HEAD.size + key_length + (size or 0) > end:
                # Not a record, and its length may be more than there is memory.
                return
            rest = os.pread(self._descriptor, key_length + (size or 0), position + _HEAD.size)
            key, content = rest[:key_length], rest[key_length:]
            if not key_length or checksum != _checksum(number, head[_CHECKSUM:] + key, content):
                return
            start = position + _HEAD.size + key_length
            yield Place(store.hex(), key.decode(), start, size)
            position = start + (size or 0)

    def read(self, start: int, length: int) -> bytes:
        """What `load` found or `append` has written; blocking."""
        return os.pread(self._descriptor, length, start)

    def room(self, *, keep: int) -> int:
        """Bytes for records, with so many kept free."""
        return self._size - keep - self._position

    @property
    def reserve(self) -> int:
        """Bytes kept for what must be logged even when it is full."""
        return self._size // 16

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._position

    @property
    def is_used(self) -> bool:
        return self._position > _START

    def append(self, records: Sequence[Record], *, flush: bool = True) -> Sequence[int]:
        """Write records, and flush all that there are; a failure leaves what was there.

        Returns:
            Where the content of each begins.
        """
        pieces: list[bytes | bytearray] = []
        starts, after = [], self._position
        for record in records:
            head, content = self._pieces(record)
            pieces += head, content
            starts.append(after + len(head))
            after += len(head) + len(content)
        position = self._position
        if after + len(_END) <= self._size:
            # Records of this very turn may lie behind, of a longer group that failed here.
            pieces.append(_END)
        with disk_errors("the log"):
            try:
                for start in range(0, len(pieces), _RECORDS_AT_ONCE):
                    some = pieces[start : start + _RECORDS_AT_ONCE]
                    if os.pwritev(self._descriptor, some, position) != sum(map(len, some)):
                        raise InsufficientStorage("the log: the disk is full; nothing was changed")
                    position += sum(map(len, some))
                if flush:
                    os.fdatasync(self._descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    # What of it may be on the disk is cut off there, too.
                    os.pwrite(self._descriptor, _END, self._position)
                    os.fdatasync(self._descriptor)
                raise
        self._position = after
        return starts

    def clear(self, turn: int) -> None:
        """Forget its records, durably; blocking."""
        number = secrets.token_bytes(16)
        with disk_errors("the log"):
            os.pwrite(self._descriptor, _HEADER.pack(_MAGIC, FORMAT, number, turn), 0)
            os.fdatasync(self._descriptor)
        self._number, self.turn, self._position = number, turn, _START

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Give its space back; nothing in it counts."""
        self.path.unlink(missing_ok=True)

    def _pieces(self, record: Record) -> tuple[bytes, bytes | bytearray]:
        key, content = record.key.encode(), record.content
        length = _SETTLED if content is None else len(content)
        rest = _HEAD.pack(b"", bytes.fromhex(record.store), length, len(key))[_CHECKSUM:] + key
        return _checksum(self._number, rest, content or b"") + rest, content or b""


def size_on(path: Path) -> int:
    """Bytes of each file on the disk that holds `path`."""
    disk = os.statvfs(path)
    return min(LARGEST, max(LEAST, disk.f_blocks * disk.f_frsize // _SHARE))


def logged_size(key: str, content: int) -> int:
    """Bytes that a record takes."""
    return _HEAD.size + len(key.encode()) + content


def survivors(files: Sequence[LogFile]) -> Iterator[tuple[Key, bytes]]:
    """The last record of each key that counts, from files of an earlier process; blocking."""
    last: dict[Key, tuple[LogFile, Place]] = {}
    found = [(file, list(file.load())) for file in files]
    for file, places in sorted(found, key=lambda each: each[0].turn):
        for place in places:
            key = place.store, place.key
            if place.length is None:
                last.pop(key, None)
            else:
                last[key] = file, place
    for key, (file, place) in last.items():
        yield key, file.read(place.start, place.length or 0)


def make(path: str, temporary: Callable[[], Path], content: bytes) -> None:
    """Make a file what was logged of it; not durable by itself, and while it goes on the file may be half there."""
    try:
        descriptor = _create(path)
    except FileExistsError:
        _replace(Path(path), temporary(), content)
        return
    except FileNotFoundError:
        Path(path).parent.mkdir(exist_ok=True)
        descriptor = _create(path)
    try:
        write_all(descriptor, content)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def rewrite(path: Path, temporary: Path, content: bytes) -> None:
    """Make a file what was logged of it, unless it is; not durable by itself."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.read(descriptor, len(content) + 1) == content:
                return
        finally:
            os.close(descriptor)
    path.parent.mkdir(exist_ok=True)
    _replace(path, temporary, content)


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _replace(path: Path, temporary: Path, content: bytes) -> None:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)


def _checksum(number: bytes, head: bytes, content: bytes | bytearray) -> bytes:
    hasher = xxhash.xxh3_64(number)
    hasher.update(head)
    hasher.update(content)
    return hasher.digest()
