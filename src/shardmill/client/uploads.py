"""Bodies that are sent: bytes, files by the kernel, and what comes piece by piece; counted and hashed as they go."""

import functools
import importlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Protocol

from shardmill.client.connection import Connection

BLOCK = 1 << 20  # bytes handled at once; smaller pieces cost up to five times the CPU
INLINE = 64 << 10  # bytes that go out with the head, in one system call
JOINED = 64 << 10  # bytes of a piece up to which it is joined with the line that announces it

Piece = bytes | bytearray | memoryview
Body = Piece | str | os.PathLike[str] | IO[bytes] | Iterable[Piece]


class Stopped(Exception):
    """The node answers already, or listens no more."""


class UploadFailed(Exception):
    """What was to be sent could not be read; nothing on the node is left of it."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class Upload(Protocol):
    """A body, sent once."""

    size: int | None
    """Bytes in all; None: unknown, sent in chunks."""
    inline: bytes
    """What goes out with the head."""

    def send(self, connection: Connection) -> None:
        """Send the rest.

        Raises:
            UploadFailed: It could not be read to its end.
            Stopped: The node does not want it.
        """
        ...


class Watched:
    """Counts and hashes what goes out."""

    def __init__(self, size: int | None, progress: Callable[[int], None] | None = None) -> None:
        self.size = size
        self.inline = b""
        self.sent = 0
        self._progress = progress
        self._hash = new_hash()

    def checksum(self) -> str | None:
        """`xxh3:HEX` of what was sent; None where the xxhash library is missing."""
        return None if self._hash is None else f"xxh3:{self._hash.hexdigest()}"

    def _watch(self, piece: Piece) -> None:
        self._count(len(piece))
        if self._hash is not None:
            self._hash.update(piece)

    def _count(self, count: int) -> None:
        self.sent += count
        if self._progress is not None:
            self._progress(count)


class BytesUpload(Watched):
    """Bytes that are here."""

    def __init__(self, data: Piece, progress: Callable[[int], None] | None = None) -> None:
        self._rest = data if type(data) is bytes else memoryview(data).cast("B")
        size = len(self._rest)
        super().__init__(size, progress)
        if size <= INLINE:
            self.inline, self._rest = bytes(self._rest), b""
            self._watch(self.inline)

    def send(self, connection: Connection) -> None:
        if not self._rest:
            return
        view = memoryview(self._rest)
        for start in range(0, len(view), BLOCK):
            piece = view[start : start + BLOCK]
            self._watch(piece)
            _send(connection, piece)


class FileUpload(Watched):
    """A regular file, from where it stands to the end that it has now."""

    def __init__(self, file: io.FileIO, start: int, progress: Callable[[int], None] | None = None) -> None:
        super().__init__(max(os.fstat(file.fileno()).st_size - start, 0), progress)
        self._file = file
        self._start = start

    def send(self, connection: Connection) -> None:
        assert self.size is not None
        buffer = memoryview(bytearray(min(BLOCK, self.size)))
        while self.sent < self.size:
            offset, count = self._start + self.sent, min(BLOCK, self.size - self.sent)
            if not connection.is_plain:
                self._read(buffer[:count], offset)
                _send(connection, buffer[:count])
            else:
                self._send_file(connection, offset, count)
                if self._hash is not None:
                    self._read(buffer[:count], offset)
            self._count(count)

    def _send_file(self, connection: Connection, offset: int, count: int) -> None:
        _check_listens(connection)
        try:
            sent = connection.send_file(self._file, offset, count)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Stopped from error
        if sent < count:
            raise UploadFailed(self._shrunk(offset + sent))

    def _read(self, view: memoryview, offset: int) -> None:
        """Fill the buffer from the file, and hash it."""
        filled = 0
        while filled < len(view):
            try:
                self._file.seek(offset + filled)
                count = self._file.readinto(view[filled:])
            except OSError as error:
                raise UploadFailed(error) from error
            if not count:
                raise UploadFailed(self._shrunk(offset + filled))
            filled += count
        if self._hash is not None:
            self._hash.update(view)

    def _shrunk(self, end: int) -> ValueError:
        return ValueError(f"the body has {end - self._start} bytes, {self.size} were announced: its file has shrunk")


class PiecesUpload(Watched):
    """What comes piece by piece, with its size or in chunks."""

    def __init__(
        self, pieces: Iterable[Piece], size: int | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(size, progress)
        self._pieces = pieces

    def send(self, connection: Connection) -> None:
        for piece in self._read():
            if self.size is None:
                _send_chunk(connection, piece)
                continue
            for start in range(0, len(piece), BLOCK):
                _send(connection, piece[start : start + BLOCK])
        if self.size is None:
            _send(connection, b"0\r\n\r\n")

    def _read(self) -> Iterator[memoryview]:
        try:
            for given in self._pieces:
                piece = memoryview(given).cast("B")
                # An empty chunk would end the body.
                if len(piece):
                    self._watch(piece)
                    if self.size is not None and self.sent > self.size:
                        break
                    yield piece
        except Exception as error:
            raise UploadFailed(error) from error
        if self.size is not None and self.sent != self.size:
            at_least = " or more" if self.sent > self.size else ""
            raise UploadFailed(ValueError(f"the body has {self.sent} bytes{at_least}, {self.size} were announced"))


Watching = BytesUpload | FileUpload | PiecesUpload


def new_hash() -> Any:
    """An xxh3-128 hasher, or None: the bare client does without the library."""
    make = _hasher()
    return None if make is None else make()


@functools.cache
def _hasher() -> Any:
    try:
        return importlib.import_module("xxhash").xxh3_128
    except ImportError:
        return None


def blocks_of(file: Any) -> Iterator[bytes]:  # anything with read(n)
    """What is left of a file, in blocks."""
    while block := file.read(BLOCK):
        if not isinstance(block, bytes):
            raise TypeError(f"the file gives {type(block).__name__}; open it in binary mode")
        yield block


def regular_file(file: object) -> tuple[io.FileIO, int] | None:
    """The file behind a binary one, and where that stands, if the kernel can send it from there."""
    # Of any other class it may unpack what it reads, or count it.
    if type(file) is not io.FileIO and type(file) is not io.BufferedReader:
        return None
    raw = file.raw if isinstance(file, io.BufferedReader) else file
    if type(raw) is not io.FileIO or not raw.readable() or not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return None
    return raw, file.tell()


def _send_chunk(connection: Connection, piece: memoryview) -> None:
    line = b"%x\r\n" % len(piece)
    if len(piece) <= JOINED:
        _send(connection, b"".join((line, piece, b"\r\n")))
        return
    _send(connection, line)
    for start in range(0, len(piece), BLOCK):
        _send(connection, piece[start : start + BLOCK])
    _send(connection, b"\r\n")


def _send(connection: Connection, data: Piece) -> None:
    _check_listens(connection)
    try:
        connection.send(data)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Stopped from error


def _check_listens(connection: Connection) -> None:
    """A node that refuses an upload answers before it has read it all: that answer is the reason.

    Raises:
        Stopped: It has answered.
    """
    if connection.is_refused():
        raise Stopped
