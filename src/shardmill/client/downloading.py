"""Objects on their way into a file or a buffer: large ones by several connections, always bytes of one version.

Parts are claimed in order, so what is there of an object that broke off is whole up to a point.
"""

import contextlib
import fcntl
import glob
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol

from shardmill.client.answers import TruncatedBody
from shardmill.client.leash import Leash
from shardmill.client.reading import ObjectReader, PlainBody
from shardmill.client.uploads import BLOCK, new_hash
from shardmill.core.errors import BadRequest, Conflict, CorruptObject

PART = 16 << 20  # bytes that a connection takes at a time; asking for them costs what 100 KiB do
CONNECTIONS = 4  # more gain nothing where the link is near, and little where it is far

Progress = Callable[[int], None]
Read = Callable[[memoryview], int]
"""Puts bytes at the front of a buffer; 0 at their end."""


class Sink(Protocol):
    """Where bytes of an object go, several parts of it at once."""

    def receive(self, read: Read, start: int, stop: int | None, watch: Progress) -> int:
        """Take the bytes from `start` on, up to `stop` or their end; tell of each piece, and return where they end."""
        ...


class FileSink:
    """A file that is open for writing; whoever opened it closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def receive(self, read: Read, start: int, stop: int | None, watch: Progress) -> int:
        buffer = memoryview(bytearray(BLOCK))
        position = start
        while stop is None or position < stop:
            wanted, filled = BLOCK if stop is None else min(BLOCK, stop - position), 0
            try:
                while filled < wanted and (count := read(buffer[filled:wanted])):
                    filled += count
            finally:
                # Also what came before the end that it had.
                written = 0
                while written < filled:
                    written += os.pwrite(self._descriptor, buffer[written:filled], position + written)
                position += filled
                watch(filled)
            if filled < wanted:
                break
        return position


class StreamSink:
    """What takes bytes in their order only: a pipe, a device; whoever opened it closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def receive(self, read: Read, start: int, stop: int | None, watch: Progress) -> int:
        buffer = memoryview(bytearray(BLOCK))
        position = start
        while (stop is None or position < stop) and (count := read(buffer)):
            self._file.write(buffer[:count])
            self._file.flush()
            position += count
            watch(count)
        return position


class BufferSink:
    """Memory that bytes are received straight into, as far as it goes."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def receive(self, read: Read, start: int, stop: int | None, watch: Progress) -> int:
        position, end = start, len(self._view) if stop is None else stop
        while position < end and (count := read(self._view[position : min(position + BLOCK, end)])):
            position += count
            watch(count)
        return position


class Fetch:
    """The bytes of an open object, from where it stands, by one connection or several.

    *Recovery:* each of them as `ObjectReader`. Where one fails, the others are ended.

    Args:
        reader: Closed by the caller. Its connection brings the first part.
        sink: Takes the bytes.
        connections: At most.
        progress: Told of every piece.
        on_frontier: Told up to where nothing is missing, whenever another part is there.
    """

    def __init__(
        self,
        reader: ObjectReader,
        sink: Sink,
        *,
        connections: int,
        progress: Progress | None,
        on_frontier: Progress | None = None,
    ) -> None:
        self._reader = reader
        self._sink = sink
        self._progress = progress
        self._on_frontier = on_frontier
        self._lock = threading.Lock()
        self._leashes: list[Leash] = []
        self._open: set[PlainBody] = set()
        self._unfinished: dict[int, int] = {}
        """Start of each part that was claimed → how far it has come."""
        self._is_stopped = False
        self._next = reader.position
        self._part = PART
        left = reader.meta.size - self._next
        is_divisible = isinstance(reader.body, PlainBody) and reader.meta.etag is not None
        self.connections = min(connections, -(-left // PART)) if is_divisible and left >= 2 * PART else 1
        """As many as are used."""

    def run(self) -> int:
        """Bring everything; returns the object's size.

        Raises:
            Conflict: The object has another version since it was opened.
            TruncatedBody: It was cut, and could not be gone on with.
        """
        size = self._reader.meta.size
        if self.connections == 1:
            start = self._next
            stop = self._sink.receive(self._reader.readinto, start, None if size < 0 else size, self._watch_of(start))
            if size >= 0 and stop != size:
                raise TruncatedBody(f"{self._reader.meta.key} ended after {stop} of {size} bytes")
            self._next, self._unfinished = stop, {}
            return stop
        with ThreadPoolExecutor(self.connections, thread_name_prefix="download") as threads:
            try:
                first = self._claim()
                futures = [threads.submit(self._work, first)]
                futures += [threads.submit(self._work, None) for _ in range(self.connections - 1)]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop()
                raise
        return size

    @property
    def frontier(self) -> int:
        """Up to where nothing is missing."""
        return min(self._unfinished.values(), default=self._next)

    def _work(self, first: tuple[int, int] | None) -> None:
        """Bring parts until all are claimed; the one that was claimed for it comes from the reader."""
        if first is not None:
            self._bring(self._reader.readinto, first)
            # The rest that is on its way goes unread; others are at it.
            self._reader.close()
        leash = Leash()
        with self._lock:
            self._leashes.append(leash)
        while (part := self._claim()) is not None:
            body = self._reader.ranged(*part, leash)
            try:
                with self._lock:
                    self._open.add(body)
                    if self._is_stopped:
                        return
                self._bring(body.read_into, part)
            finally:
                with self._lock:
                    self._open.discard(body)
                body.close()

    def _bring(self, read: Read, part: tuple[int, int]) -> None:
        start, stop = part
        end = self._sink.receive(read, start, stop, self._watch_of(start))
        if end != stop:
            raise TruncatedBody(f"{self._reader.meta.key} ended after {end} of {self._reader.meta.size} bytes")
        with self._lock:
            del self._unfinished[start]
            if self._on_frontier is not None:
                self._on_frontier(self.frontier)

    def _claim(self) -> tuple[int, int] | None:
        with self._lock:
            start, size = self._next, self._reader.meta.size
            if self._is_stopped or start >= size:
                return None
            self._next = min(start + self._part, size)
            self._unfinished[start] = start
            return start, self._next

    def _watch_of(self, start: int) -> Progress:
        self._unfinished[start] = start

        def watch(count: int) -> None:
            with self._lock:
                self._unfinished[start] += count
                if self._progress is not None:
                    self._progress(count)

        return watch

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            for leash in self._leashes:
                leash.pull()
            for body in self._open:
                body.interrupt()
        self._reader.interrupt()


class Download:
    """An open object on its way into a file, which appears under its name when it is whole.

    A device or a pipe is written to as bytes come, and stays what it is.

    *Recovery:* what an earlier try left of the same version lies beside the file and is gone on with.

    Args:
        reader: Closed by the caller.
        target: The file; what it was before is replaced.
        connections: At most, for a large object.
        progress: Told of every piece that comes.
    """

    def __init__(
        self, reader: ObjectReader, target: Path, *, connections: int = CONNECTIONS, progress: Progress | None = None
    ) -> None:
        self._reader = reader
        self._target = target
        self._connections = connections
        self._progress = progress
        self._etag = reader.meta.etag if reader.meta.size >= 0 else None
        self.part = self._partial_path()
        self._working = self.part
        self._own = f"{os.getpid()}-{threading.get_ident()}"
        """In names that no other download may have."""
        self.kept = 0
        """Bytes that a run which failed has left for the next one."""

    def run(self) -> int:
        """Bring it; returns its size.

        Raises:
            Conflict, TruncatedBody: As `Fetch.run`.
            CorruptObject: What arrived has another checksum than the node's; nothing of it is kept.
        """
        if is_special(self._target):
            with self._target.open("wb") as file:
                return Fetch(self._reader, StreamSink(file), connections=1, progress=self._progress).run()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, start = self._take_up()
        try:
            fetch = Fetch(
                self._reader,
                FileSink(descriptor),
                connections=self._connections,
                progress=self._progress,
                on_frontier=self._note,
            )
            if fetch.connections > 1:
                # It will have holes, which must never be taken for bytes: its name says up to where it has none.
                self._note(start)
            try:
                size = fetch.run()
            except BaseException:
                self._keep(descriptor, max(fetch.frontier, start))
                raise
            self._check(self._working, size)
            os.replace(self._working, self._target)
            for path in self._left():
                _remove_unlocked(path)
        finally:
            os.close(descriptor)
        return size

    def _partial_path(self) -> Path:
        """Named by what is in it, so that only the same version is ever continued; other reads have their own name."""
        name = f"{os.getpid()}"
        if self._etag is not None:
            name = blake2b(f"{self._reader.url} {self._etag}".encode(), digest_size=6).hexdigest()
        return self._target.with_name(f".{self._target.name}.{name}.part")

    def _take_up(self) -> tuple[int, int]:
        """The working file, open and locked, and where to go on in it."""
        for path, kept in sorted(self._left().items(), key=lambda item: -item[1]):
            descriptor = _open_locked(path)
            if descriptor is None:
                # Another process brings the same bytes.
                continue
            if not 0 < kept < self._reader.meta.size:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                continue
            self._working = path
            try:
                self._reader.skip_to(kept)
                os.ftruncate(descriptor, kept)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor, kept
        for path in (self.part, self.part.with_suffix(f".{self._own}.part")):
            if (descriptor := _open_locked(path, create=True)) is not None:
                os.ftruncate(descriptor, 0)
                self._working = path
                return descriptor, 0
        raise Conflict(f"{self._target} is already being written by this process")

    def _left(self) -> dict[Path, int]:
        """What earlier tries left of this version, and how many bytes of each are surely there."""
        if self._etag is None:
            return {}
        found: dict[Path, int] = {}
        for path in (self.part, *self._target.parent.glob(f"{glob.escape(self.part.stem)}.*.parts")):
            # Whoever works on one gives it another name, or its last one, at any time.
            with contextlib.suppress(FileNotFoundError):
                size, count = path.stat().st_size, path.name.split(".")[-2]
                if path == self.part:
                    found[path] = size
                elif count.isdecimal():
                    found[path] = min(int(count), size)
        return found

    def _note(self, frontier: int) -> None:
        if self._etag is not None:
            noted = self.part.with_suffix(f".{self._own}.{frontier}.parts")
            os.replace(self._working, noted)
            self._working = noted

    def _keep(self, descriptor: int, size: int) -> None:
        if self._etag is None or not size:
            self._working.unlink()
            return
        os.ftruncate(descriptor, size)
        if self._working.suffix == ".parts":
            self._note(size)
        self.kept = size

    def _check(self, path: Path, size: int) -> None:
        """Compare with the node's checksum, where both sides have one."""
        hasher, expected = new_hash(), self._reader.meta.checksum
        if hasher is None or expected is None or self._reader.meta.size != size:
            return
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                hasher.update(block)
        if f"xxh3:{hasher.hexdigest()}" != expected:
            path.unlink()
            raise CorruptObject(f"{self._reader.meta.key} arrived with other bytes than the node has; get it again")


def is_special(path: Path) -> bool:
    """Whether a path is of a device, a pipe or an open descriptor, which no file may take the place of."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    # A link like /dev/stdout must stay even where a regular file is behind it.
    is_descriptor = path.is_symlink() and path.parent.resolve().parts[1:2] in (("dev",), ("proc",))
    return is_descriptor or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_into(reader: ObjectReader, view: memoryview, *, connections: int) -> int:
    """Bring an open object into memory; returns its size.

    Raises:
        BadRequest: (A ValueError.) It does not fit.
    """
    size = reader.meta.size
    if size > len(view):
        raise BadRequest(f"{reader.meta.key} has {size} bytes, the buffer only {len(view)}")
    count = Fetch(reader, BufferSink(view), connections=connections, progress=None).run()
    if size < 0 and reader.read1(1):
        raise BadRequest(f"{reader.meta.key} has more bytes than the buffer's {len(view)}")
    return count


def _open_locked(path: Path, *, create: bool = False) -> int | None:
    """A descriptor that no other one may have like this; None: one has, or there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    except OSError:
        # A file system without locks.
        is_ours = True
    if not is_ours:
        os.close(descriptor)
        return None
    return descriptor


def _remove_unlocked(path: Path) -> None:
    """Remove what nobody works on any more."""
    if (descriptor := _open_locked(path)) is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)
