"""Keys of all pool buckets in order, for listings; the truth of an object stays in its own file.

A durable index is as durable as its buckets: each commit is flushed, and after a power cut it is completed from the log
and the notes. Commits of another one are not: they survive a kill, and after a power cut it is thrown away. An index
that is lost or damaged is built again from the objects' trailers, in the background, while GETs already work and
listings say when to ask again. It is marked as complete only once it is.
"""

import asyncio
import builtins
import contextlib
import heapq
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import lmdb
import msgspec

from shardmill.core.errors import Busy, InsufficientStorage, ServerError, ShardmillError
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.storage.files import replace_durably, reserve
from shardmill.storage.paging import list_page

logger = logging.getLogger(__name__)

FORMAT = 3
MAP_SIZES = (1 << 38, 1 << 34, 1 << 31)  # bytes of address space, the first that the system grants
MAX_READERS = 1024  # pages being read at once
RETRY_SECONDS = 2
_MAX_KEY = 511  # bytes, LMDB's
_ID = 8  # bytes of a store's id before each key
_TIE = 16  # bytes that stand for the rest of a longer key
_CUT = _MAX_KEY - _ID - _TIE
_BATCH = 512  # changes in one commit
_SCANNED = 8192  # objects found by a scan that are added in one commit
_TIED = 1000  # keys cut at the same place that are put in order at once
_SCARCE = 1 << 20  # bytes; with less, a failing write is taken for a full disk
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STATE = "state.json"


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One object as listings show it, as small as can be: a million of them are to stay in memory."""

    size: int
    modified: float
    checksum: bytes
    """xxh3-128 over the bytes."""
    version: str
    """Of the write; with the checksum behind it, it is the source version."""
    user: dict[str, str] | None
    key: str | None
    """Where the name in the database does not tell it."""

    @classmethod
    def of(cls, meta: ObjectMeta) -> "Entry":
        etag = meta.etag or ""
        key = meta.key if len(meta.key.encode()) > _CUT else None
        version = meta.version.removesuffix(f"-{etag}")
        return cls(meta.size, meta.modified, bytes.fromhex(etag), version, dict(meta.user) or None, key)

    def meta(self, key: str) -> ObjectMeta:
        etag = self.checksum.hex()
        version, checksum = f"{self.version}-{etag}", f"xxh3:{etag}"
        return ObjectMeta(key, self.size, etag, version, self.modified, checksum, self.user or {})


Change = tuple[bytes, bytes | None]
"""Database key and value; None: remove."""

Scan = Callable[[], Iterable[tuple[str, ObjectMeta]]]
"""Reads the trailers of all objects: `store id, meta`."""

Look = Callable[[str, str], ObjectMeta | None]
"""What an object's file says now, by store id and key."""


class Index:
    """Use `Index.open`; `close` when no change is on its way."""

    def __init__(
        self, directory: Path, threads: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop, is_durable: bool
    ) -> None:
        self._directory = directory
        self._is_durable = is_durable
        self._threads = threads
        self._loop = loop
        self._changes: queue.SimpleQueue[tuple[Change, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._decoder = msgspec.msgpack.Decoder(Entry)
        self.is_complete = False
        self._removed: set[bytes] = set()
        """Names and stores removed while it is being built, which the scan must not bring back."""
        self._owed: list[Change] = []
        """Removals that a full disk kept out of the index."""
        self._committing = threading.Lock()
        self._is_damaged = False
        self._stopping = threading.Event()
        self._env = _open_environment(directory, is_durable)
        self._writer = threading.Thread(target=self._write_changes, name="index-writer", daemon=True)
        self._rebuilder: threading.Thread | None = None

    @classmethod
    async def open(
        cls,
        directory: Path,
        threads: ThreadPoolExecutor,
        *,
        is_new: bool,
        notes: Iterable[tuple[str, str]],
        look: Look,
        scan: Scan,
        is_durable: bool = True,
    ) -> "Index":
        """Open it and complete it by the notes of changes that were on their way; or begin to build it anew.

        Args:
            directory: Its own; made if it is not there.
            threads: For reads.
            is_new: There are no objects yet, so an empty index is complete.
            notes: Changes that an earlier process began.
            look: Tells how they ended.
            scan: Tells all objects.
            is_durable: Its commits survive a power cut.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            threads, cls._open, directory, threads, loop, is_new, notes, look, scan, is_durable
        )

    @classmethod
    def _open(
        cls,
        directory: Path,
        threads: ThreadPoolExecutor,
        loop: asyncio.AbstractEventLoop,
        is_new: bool,
        notes: Iterable[tuple[str, str]],
        look: Look,
        scan: Scan,
        is_durable: bool,
    ) -> "Index":
        usable = _is_usable(directory)
        if not usable:
            _clear(directory)
        try:
            index = cls(directory, threads, loop, is_durable)
        except lmdb.Error as error:
            logger.warning("the index cannot be opened and is built anew: %s", error)
            _clear(directory)
            try:
                index, usable = cls(directory, threads, loop, is_durable), False
            except lmdb.Error as reason:
                raise ServerError(f"the index cannot be opened: {reason}") from None
        if usable or is_new:
            index._mark_complete()
            index._replay(notes, look)
            index.is_complete = True
        else:
            index._rebuilder = threading.Thread(target=index._rebuild, args=(scan,), name="index-rebuild", daemon=True)
            index._rebuilder.start()
        index._writer.start()
        return index

    async def wait_complete(self) -> None:
        """Return when it has all objects, or when it is closed before."""
        if self._rebuilder is not None:
            await self._loop.run_in_executor(None, self._rebuilder.join)

    async def put(self, store: str, meta: ObjectMeta) -> None:
        """The object is there now.

        Raises:
            InsufficientStorage, ServerError: It is not in the index.
        """
        await self._change((_name(store, meta.key), msgspec.msgpack.encode(Entry.of(meta))))

    def put_now(self, objects: Sequence[tuple[str, ObjectMeta]]) -> ShardmillError | None:
        """As `put`, of many and in this thread; what went wrong."""
        return self._commit_with_owed(
            [(_name(store, meta.key), msgspec.msgpack.encode(Entry.of(meta))) for store, meta in objects]
        )

    def may_have(self, store: str, key: str) -> bool:
        """False: there is no such object; blocking, but for what is in memory."""
        if not self.is_complete:
            return True
        try:
            with self._env.begin() as transaction:
                return transaction.get(_name(store, key)) is not None
        except lmdb.Error:
            return True

    async def remove(self, store: str, key: str) -> None:
        """The object is gone.

        Raises:
            InsufficientStorage, ServerError: It is still in the index; the next change takes it out too.
        """
        await self._change((_name(store, key), None))

    async def forget_store(self, store: str) -> None:
        """Remove all entries of a store."""
        if not self.is_complete:
            self._removed.add(bytes.fromhex(store))
        while names := await self._loop.run_in_executor(self._threads, self._some_names, store):
            await asyncio.gather(*[self._change((name, None)) for name in names])

    async def list(
        self,
        store: str,
        *,
        prefix: str,
        delimiter: str,
        after: str,
        limit: int,
        unlisted: Sequence[ObjectMeta] = (),
    ) -> ListPage:
        """One page; raises Busy while the index is being built.

        Args:
            store: Its id.
            prefix, delimiter, after, limit: See `core.sources.ListObjects`.
            unlisted: Objects that the index has had no room for.
        """
        if not self.is_complete:
            raise Busy("the listing is being rebuilt; objects can be read", retry_after=RETRY_SECONDS)

        decode = self._decoder.decode
        news = sorted((meta.key.encode(), msgspec.msgpack.encode(Entry.of(meta))) for meta in unlisted)

        def read() -> ListPage:
            try:
                return list_page(
                    lambda bound: _with_news(self._seek(store, bound), news, bound),
                    lambda key, value: decode(value).meta(key.decode()),
                    prefix=prefix,
                    delimiter=delimiter,
                    after=after,
                    limit=limit,
                )
            except lmdb.ReadersFullError:
                raise Busy("too many listings at once", retry_after=RETRY_SECONDS) from None
            except _DAMAGE as error:
                raise self._damaged(error) from error

        return await self._loop.run_in_executor(self._threads, read)

    async def is_empty(self, store: str) -> bool:
        """Whether the store has no object; raises Busy while that is not known."""
        return not (await self.list(store, prefix="", delimiter="", after="", limit=1)).objects

    async def close(self) -> None:
        """Commit what is queued and mark the index as good, if it is."""
        self._stopping.set()
        self._changes.put(None)
        await self._loop.run_in_executor(self._threads, self._writer.join)
        if self._rebuilder is not None:
            await self._loop.run_in_executor(self._threads, self._rebuilder.join)
        if self.is_complete and not self._is_damaged:
            await self._loop.run_in_executor(self._threads, self._env.sync, True)
            with contextlib.suppress(OSError):  # a full disk: the next start takes it for one after a kill
                await self._loop.run_in_executor(self._threads, _mark, self._directory, True)
        self._env.close()

    async def _change(self, change: Change) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._changes.put((change, future))
        await future

    def _write_changes(self) -> None:
        """The one writer: commits together what has gathered while it committed before."""
        while True:
            first = self._changes.get()
            batch = [first]
            while len(batch) < _BATCH and batch[-1] is not None:
                try:
                    batch.append(self._changes.get_nowait())
                except queue.Empty:
                    break
            work = [item for item in batch if item is not None]
            error = self._commit_with_owed([change for change, _ in work])
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, [future for _, future in work], error)
            if len(work) < len(batch):
                return

    def _commit_with_owed(self, changes: Sequence[Change]) -> ShardmillError | None:
        with self._committing:
            error = self._commit([*self._owed, *changes])
            if error is None:
                self._owed.clear()
            else:
                self._owed += [change for change in changes if change[1] is None]
        return error

    def _commit(self, changes: Sequence[Change]) -> ShardmillError | None:
        try:
            with self._env.begin(write=True) as transaction:
                for name, value in changes:
                    if value is not None:
                        transaction.put(name, value)
                        continue
                    transaction.delete(name)
                    if not self.is_complete:
                        self._removed.add(name)
        except _DAMAGE as error:
            return self._damaged(error)
        except lmdb.Error as error:
            # LMDB calls a write that a full disk cut short an input/output error.
            is_full = isinstance(error, lmdb.MapFullError | lmdb.DiskError)
            if is_full or shutil.disk_usage(self._directory).free < _SCARCE:
                return InsufficientStorage("the disk has no room for the index; nothing was changed")
            logger.exception("the index cannot be written")
            return ServerError(f"the index cannot be written: {error}")
        return None

    def _damaged(self, error: lmdb.Error) -> ServerError:
        logger.error("the index is damaged; the next start builds it anew: %s", error)
        forget_complete(self._directory)
        self._is_damaged = True
        return ServerError("the index is damaged; it is built anew when the node is started again")

    def _seek(self, store: str, bound: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries in order from `bound` on; keys that were cut at the same place are put in order here."""
        identity = bytes.fromhex(store)
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            start: bytes | None = identity + bound[:_CUT]
            while start is not None and cursor.set_range(start):
                start = None
                for name, value in cursor:
                    if name[:_ID] != identity:
                        return
                    if len(name) == _MAX_KEY:
                        stem = name[:-_TIE]
                        yield from self._seek_tied(transaction, stem, bound)
                        start = stem + b"\xff" * (_TIE + 1)
                        break
                    key = name[_ID:]
                    if key >= bound:
                        yield key, value

    def _seek_tied(self, transaction: lmdb.Transaction, stem: bytes, bound: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose names were cut behind `stem`, in order, some at a time, so that memory is bounded."""

        def read() -> Iterator[tuple[bytes, bytes]]:
            with transaction.cursor() as cursor:
                is_there = cursor.set_range(stem)
                while is_there and cursor.key()[: len(stem)] == stem:
                    if len(cursor.key()) == _MAX_KEY:
                        value = bytes(cursor.value())
                        key = (self._decoder.decode(value).key or "").encode()
                        if key >= bound:
                            yield key, value
                    is_there = cursor.next()

        while True:
            some = heapq.nsmallest(_TIED, read(), key=lambda item: item[0])
            yield from some
            if len(some) < _TIED:
                return
            bound = some[-1][0] + b"\0"

    def _some_names(self, store: str) -> Sequence[bytes]:
        identity = bytes.fromhex(store)
        names: list[bytes] = []
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            is_there = cursor.set_range(identity)
            while is_there and len(names) < _BATCH and cursor.key()[:_ID] == identity:
                names.append(cursor.key())
                is_there = cursor.next()
        return names

    def _replay(self, notes: Iterable[tuple[str, str]], look: Look) -> None:
        changes: dict[bytes, bytes | None] = {}
        for store, key in notes:
            try:
                meta = look(store, key)
            except ShardmillError as error:
                # A file that cannot be read is not a file that is gone: the index keeps what it has of it.
                logger.warning("a change that was on its way cannot be looked up: %s", error)
                continue
            changes[_name(store, key)] = None if meta is None else msgspec.msgpack.encode(Entry.of(meta))
        if changes:
            logger.info("completing the index by %d changes that were on their way", len(changes))
            failure = self._commit(list(changes.items()))
            if failure is not None:
                raise failure

    def _mark_complete(self) -> None:
        """It is complete: as long as this boot lasts, or for good."""
        try:
            _mark(self._directory, self._is_durable)
        except OSError as error:
            # A full disk must not keep a node from reading and removing; after a kill the index is built anew.
            logger.warning("the index cannot be marked: %s", error.strerror)
            forget_complete(self._directory)

    def _rebuild(self, scan: Scan) -> None:
        """Add what the files say, unless the index knows better by now."""
        count = 0
        batch: builtins.list[tuple[bytes, bytes]] = []
        for store, meta in scan():
            if self._stopping.is_set():
                return
            batch.append((_name(store, meta.key), msgspec.msgpack.encode(Entry.of(meta))))
            count += 1
            if len(batch) == _SCANNED:
                # Not sorted: the database would split its pages at places that leave them half empty.
                self._add_missing(batch)
                batch = []
        self._add_missing(batch)
        self._mark_complete()
        self.is_complete = True
        self._removed = set()
        logger.info("the index is complete again: %d objects", count)

    def _add_missing(self, batch: Sequence[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True) as transaction:
            for name, value in batch:
                # Removed meanwhile: the file was read before it went.
                if name not in self._removed and name[:_ID] not in self._removed:
                    transaction.put(name, value, overwrite=False)


def _with_news(
    entries: Iterator[tuple[bytes, bytes]], news: Sequence[tuple[bytes, bytes]], bound: bytes
) -> Iterator[tuple[bytes, bytes]]:
    """Both in order from `bound` on; of a key that is in both, what is new."""
    if not news:
        yield from entries
        return
    replaced = {key for key, _ in news}
    yield from heapq.merge(
        (entry for entry in entries if entry[0] not in replaced), (entry for entry in news if entry[0] >= bound)
    )


def _name(store: str, key: str) -> bytes:
    """A database key: the store's id, then the key, cut and tied by a hash where LMDB ends."""
    raw = key.encode()
    if len(raw) > _CUT:
        raw = raw[:_CUT] + blake2b(raw, digest_size=_TIE).digest()
    return bytes.fromhex(store) + raw


def _settle(futures: list["asyncio.Future[None]"], error: Exception | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _open_environment(directory: Path, is_durable: bool) -> lmdb.Environment:
    path = str(directory / "db")
    _reserve_readers(directory / "db")
    for size in MAP_SIZES:
        with contextlib.suppress(lmdb.MemoryError):
            environment = lmdb.open(path, map_size=size, sync=is_durable, metasync=is_durable, max_readers=MAX_READERS)
            break
    else:
        raise lmdb.MemoryError("the system grants too little address space")
    if (directory / "db" / "data.mdb").stat().st_size < (environment.info()["last_pgno"] + 1) * environment.stat()[
        "psize"
    ]:
        # Reading behind its end would end the process.
        environment.close()
        raise lmdb.CorruptedError("its file is shorter than it should be")
    return environment


def _reserve_readers(directory: Path) -> None:
    """Take the space of the readers' table: it is mapped, and a page that a full disk has not ends the process."""
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        reserve(descriptor, (MAX_READERS + 8) * 64)
    except OSError as error:
        raise lmdb.DiskError(os.strerror(error.errno or 0)) from error
    finally:
        os.close(descriptor)


def _state(clean: bool) -> bytes:
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"
    return msgspec.json.encode({"format": FORMAT, "boot": boot, "clean": clean})


def _mark(directory: Path, clean: bool) -> None:
    replace_durably(directory / _STATE, _state(clean))


def forget_complete(directory: Path) -> None:
    """The next opening builds it anew; blocking."""
    (directory / _STATE).unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)


def _is_usable(directory: Path) -> bool:
    """Whether it is complete and its last commits can be trusted: durable, closed in order, or of this boot."""
    try:
        state = (directory / _STATE).read_bytes()
    except OSError:
        return False
    if not (directory / "db" / "data.mdb").exists():
        return False
    if state == _state(False):
        return True
    with contextlib.suppress(msgspec.DecodeError):
        found = msgspec.json.decode(state)
        return isinstance(found, dict) and found.get("format") == FORMAT and found.get("clean") is True
    return False
