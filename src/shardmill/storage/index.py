"""Keys of all pool buckets in order, for listings; the truth of an object stays in its own file.

Commits are not synced: they survive a kill. After a power cut the index is thrown away and built again from the
objects' trailers, in the background, while GETs already work and listings say when to ask again.
"""

import asyncio
import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import lmdb
import msgspec

from shardmill.core.errors import Busy, InsufficientStorage, ServerError
from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.storage.paging import list_page

logger = logging.getLogger(__name__)

FORMAT = 1
MAP_SIZES = (1 << 38, 1 << 34, 1 << 31)  # bytes of address space, the first that the system grants
RETRY_SECONDS = 2
_MAX_KEY = 511  # bytes, LMDB's
_ID = 8  # bytes of a store's id before each key
_TIE = 16  # bytes that stand for the rest of a longer key
_CUT = _MAX_KEY - _ID - _TIE
_BATCH = 512  # changes in one commit
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One object as listings show it."""

    key: str
    size: int
    modified: float
    etag: str
    version: str
    user: dict[str, str]

    @classmethod
    def of(cls, meta: ObjectMeta) -> "Entry":
        return cls(meta.key, meta.size, meta.modified, meta.etag or "", meta.version, dict(meta.user))

    @property
    def meta(self) -> ObjectMeta:
        return ObjectMeta(self.key, self.size, self.etag, self.version, self.modified, f"xxh3:{self.etag}", self.user)


Change = tuple[bytes, bytes | None]
"""Database key and value; None: remove."""

Scan = Callable[[], Iterable[tuple[str, ObjectMeta]]]
"""Reads the trailers of all objects: `store id, meta`."""

Look = Callable[[str, str], ObjectMeta | None]
"""What an object's file says now, by store id and key."""


class Index:
    """Use `Index.open`; `close` when no change is on its way."""

    def __init__(self, directory: Path, threads: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._changes: queue.SimpleQueue[tuple[Change, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._decoder = msgspec.msgpack.Decoder(Entry)
        self.is_complete = False
        self._removed: set[bytes] | None = None
        self._stopping = threading.Event()
        self._env = _open_environment(directory)
        self._writer = threading.Thread(target=self._write_changes, name="index-writer", daemon=True)
        self._rebuilder: threading.Thread | None = None

    @classmethod
    async def open(
        cls, directory: Path, threads: ThreadPoolExecutor, *, notes: Iterable[tuple[str, str]], look: Look, scan: Scan
    ) -> "Index":
        """Open it and complete it by the notes of changes that were on their way; or begin to build it anew."""
        loop = asyncio.get_running_loop()
        usable = await loop.run_in_executor(threads, _is_usable, directory)
        if not usable:
            await loop.run_in_executor(threads, lambda: shutil.rmtree(directory, ignore_errors=True))
            directory.mkdir(parents=True)
        try:
            index = cls(directory, threads)
        except lmdb.Error as error:
            logger.warning("the index cannot be opened and is built anew: %s", error)
            await loop.run_in_executor(threads, lambda: shutil.rmtree(directory, ignore_errors=True))
            directory.mkdir(parents=True)
            index, usable = cls(directory, threads), False
        await loop.run_in_executor(threads, _mark, directory, False)
        if usable:
            await loop.run_in_executor(threads, index._replay, notes, look)
            index.is_complete = True
        else:
            index._removed = set()
            index._rebuilder = threading.Thread(target=index._rebuild, args=(scan,), name="index-rebuild", daemon=True)
            index._rebuilder.start()
        index._writer.start()
        return index

    async def put(self, store: str, meta: ObjectMeta) -> None:
        """The object is there now."""
        await self._change((_name(store, meta.key), msgspec.msgpack.encode(Entry.of(meta))))

    async def remove(self, store: str, key: str) -> None:
        """The object is gone."""
        await self._change((_name(store, key), None))

    async def forget_store(self, store: str) -> None:
        """Remove all entries of a store."""
        for name in await self._loop.run_in_executor(self._threads, self._names_of, store):
            await self._change((name, None))

    async def list(self, store: str, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page; raises Busy while the index is being built."""
        if not self.is_complete:
            raise Busy("the listing is being rebuilt after a power cut; objects can be read", retry_after=RETRY_SECONDS)

        def read() -> ListPage:
            return list_page(
                lambda bound: self._seek(store, bound), prefix=prefix, delimiter=delimiter, after=after, limit=limit
            )

        return await self._loop.run_in_executor(self._threads, read)

    async def is_empty(self, store: str) -> bool:
        """Whether the store has no object; raises Busy while that is not known."""
        return not (await self.list(store, prefix="", delimiter="", after="", limit=1)).objects

    async def close(self) -> None:
        """Commit what is queued and mark the index as good."""
        self._stopping.set()
        self._changes.put(None)
        await self._loop.run_in_executor(self._threads, self._writer.join)
        if self._rebuilder is not None:
            await self._loop.run_in_executor(self._threads, self._rebuilder.join)
        if self.is_complete:
            await self._loop.run_in_executor(self._threads, self._env.sync, True)
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
            error = self._commit([change for change, _ in work])
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, [future for _, future in work], error)
            if len(work) < len(batch):
                return

    def _commit(self, changes: Sequence[Change]) -> Exception | None:
        try:
            with self._env.begin(write=True) as transaction:
                for name, value in changes:
                    if value is not None:
                        transaction.put(name, value)
                        continue
                    transaction.delete(name)
                    if self._removed is not None:
                        self._removed.add(name)
        except lmdb.MapFullError:
            return InsufficientStorage("the index is full")
        except lmdb.Error as error:
            logger.exception("the index cannot be written")
            return ServerError(f"the index cannot be written: {error}")
        return None

    def _seek(self, store: str, bound: bytes) -> Iterator[tuple[bytes, Callable[[], ObjectMeta | None]]]:
        """Entries in order from `bound` on; keys that were cut at the same place are put in order here."""
        identity = bytes.fromhex(store)
        with self._env.begin(buffers=False) as transaction, transaction.cursor() as cursor:
            is_there = cursor.set_range(identity + bound[:_CUT])
            tied: list[tuple[bytes, Entry]] = []
            stem = b""
            while is_there and cursor.key()[:_ID] == identity:
                name, value = cursor.item()
                if len(name) == _MAX_KEY:
                    if tied and name[:-_TIE] != stem:
                        yield from _in_order(tied, bound)
                        tied = []
                    stem = name[:-_TIE]
                    entry = self._decoder.decode(value)
                    tied.append((entry.key.encode(), entry))
                else:
                    if tied:
                        yield from _in_order(tied, bound)
                        tied = []
                    key = name[_ID:]
                    if key >= bound:
                        yield key, lambda value=value: self._decoder.decode(value).meta  # type: ignore[misc]  # bound at once
                is_there = cursor.next()
            yield from _in_order(tied, bound)

    def _names_of(self, store: str) -> Sequence[bytes]:
        identity = bytes.fromhex(store)
        names = []
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            is_there = cursor.set_range(identity)
            while is_there and cursor.key()[:_ID] == identity:
                names.append(cursor.key())
                is_there = cursor.next()
        return names

    def _replay(self, notes: Iterable[tuple[str, str]], look: Look) -> None:
        changes: dict[bytes, bytes | None] = {}
        for store, key in notes:
            meta = look(store, key)
            changes[_name(store, key)] = None if meta is None else msgspec.msgpack.encode(Entry.of(meta))
        if changes:
            logger.info("completing the index by %d changes that were on their way", len(changes))
            error = self._commit(list(changes.items()))
            if error is not None:
                raise error

    def _rebuild(self, scan: Scan) -> None:
        """Add what the files say, unless the index knows better by now."""
        count = 0
        batch: list[tuple[bytes, bytes]] = []
        for store, meta in scan():
            if self._stopping.is_set():
                return
            batch.append((_name(store, meta.key), msgspec.msgpack.encode(Entry.of(meta))))
            count += 1
            if len(batch) == _BATCH:
                self._add_missing(batch)
                batch = []
        self._add_missing(batch)
        self._removed = None
        self.is_complete = True
        logger.info("the index is complete again: %d objects", count)

    def _add_missing(self, batch: Sequence[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True) as transaction:
            for name, value in batch:
                # Removed meanwhile: the file was read before it went.
                if self._removed is None or name not in self._removed:
                    transaction.put(name, value, overwrite=False)


def _in_order(tied: list[tuple[bytes, Entry]], bound: bytes) -> Iterator[tuple[bytes, Callable[[], ObjectMeta | None]]]:
    for key, entry in sorted(tied, key=lambda item: item[0]):
        if key >= bound:
            yield key, lambda entry=entry: entry.meta  # type: ignore[misc]  # bound at once


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


def _open_environment(directory: Path) -> lmdb.Environment:
    for size in MAP_SIZES[:-1]:
        try:
            return lmdb.open(str(directory / "db"), map_size=size, sync=False, metasync=False, max_readers=256)
        except lmdb.MemoryError:
            continue
    return lmdb.open(str(directory / "db"), map_size=MAP_SIZES[-1], sync=False, metasync=False, max_readers=256)


def _state(clean: bool) -> bytes:
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"
    return msgspec.json.encode({"format": FORMAT, "boot": boot, "clean": clean})


def _mark(directory: Path, clean: bool) -> None:
    (directory / "state.json").write_bytes(_state(clean))


def _is_usable(directory: Path) -> bool:
    """Whether its last commits can be trusted: closed in order, or killed since this machine started."""
    try:
        state = (directory / "state.json").read_bytes()
    except OSError:
        directory.mkdir(parents=True, exist_ok=True)
        return not any(directory.iterdir())
    if state == _state(False):
        return True
    with contextlib.suppress(msgspec.DecodeError):
        found = msgspec.json.decode(state)
        return isinstance(found, dict) and found.get("format") == FORMAT and found.get("clean") is True
    return False
