"""The buckets of a node, and the data directory that they live in.

DATA/lock           held while a node runs, with its pid
DATA/buckets.json   pool buckets: URI → identity; the commit point of creating and removing one
DATA/pool/ID/       one pool bucket: tmp/ for uploads, XX/… for objects
DATA/index/         keys in order (LMDB); may be deleted while no node runs
DATA/index-kill/    the same of buckets that promise less
DATA/journal/       notes of changes on their way to the index
DATA/log/           small objects that the disk may not have the files of yet
DATA/members/       where the members of shards lie (`storage/members.py`); may be deleted while no node runs
DATA/cache/ID/      of one remote bucket: XX/… for what is there whole, part/ for what has holes
DATA/transforms/, DATA/packages/, DATA/scratch/   belong to the transform engine
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec

from shardmill.core.api import BucketInfo
from shardmill.core.errors import BadRequest, BucketNotFound, BucketReadOnly, Conflict, ServerError
from shardmill.core.meta import ObjectMeta
from shardmill.core.origins import ReadOrigin, WriteOrigin
from shardmill.core.refs import Bucket
from shardmill.core.sources import ReadStore, WriteStore
from shardmill.storage.cache.disk import CacheDisk
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.cache.store import CachedBucket
from shardmill.storage.directory import DirectoryStore, Links
from shardmill.storage.files import disk_errors, replace_durably, sync_directory, sync_file_system
from shardmill.storage.groups import Groups
from shardmill.storage.index import Index, forget_complete
from shardmill.storage.journal import Journal
from shardmill.storage.kept import Shelf, most_kept
from shardmill.storage.log import LogFile, size_on, survivors
from shardmill.storage.pool import Durability, PoolStore
from shardmill.storage.steps import finish

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_INDEXES: Mapping[Durability, str] = {"power": "index", "kill": "index-kill"}
_PROMISE = "promise"  # file in a bucket's directory: what its objects survive
_MOUNTS = Path("/proc/self/mounts")
_ESCAPE = re.compile(r"\\([0-7]{3})")
_IDENTITY = re.compile(r"[0-9a-f]{16}")
_REMOTE_TYPES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "ceph", "lustre")


@dataclass(frozen=True, slots=True)
class RemoteBacking:
    """A store behind a bucket that is somebody else's."""

    url: str
    """Of the store."""
    place: str
    """Which of those that have this URL, and what of it; what is cached of another one is never taken for it."""
    open: Callable[[], AbstractAsyncContextManager[ReadOrigin]]
    policy: CachePolicy


@dataclass(frozen=True, slots=True)
class BucketDefinition:
    """A bucket of the configuration. Neither `path` nor `remote`: a pool bucket."""

    bucket: Bucket
    path: Path | None
    writable: bool
    links: Links = "refuse"
    durability: Durability = "power"
    remote: RemoteBacking | None = None


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What remote buckets may take of the disk together; see `cache.disk.CacheDisk`."""

    capacity: int = 0
    high: int = 90
    low: int = 80


class Buckets:
    """Use `Buckets.open`."""

    def __init__(
        self,
        data: Path,
        definitions: Sequence[BucketDefinition],
        journal: Journal,
        threads: ThreadPoolExecutor,
        durability: Durability,
        cache: CacheSize,
    ) -> None:
        self._data = data
        self._cache = cache
        self._journal = journal
        self._threads = threads
        self._durability: Durability = durability
        self._shelf = Shelf(most_kept())
        self._definitions = {definition.bucket: definition for definition in definitions}
        self._directories = {
            definition.bucket: DirectoryStore(
                definition.bucket,
                definition.path,
                links=definition.links,
                threads=threads,
                is_durable=definition.durability == "power",
                shelf=self._shelf,
                is_far=is_far(definition.path, _MOUNTS),
                is_made_up=is_made_up(definition.path, _MOUNTS),
            )
            for definition in definitions
            if definition.path is not None
        }
        self._pools: dict[Bucket, PoolStore] = {}
        self._cached: dict[Bucket, CachedBucket] = {}
        self.cache_disk: CacheDisk | None = None
        """None: there are no remote buckets."""
        self._indexes: dict[Durability, Index] = {}
        self._groups: Groups | None = None
        self._changing = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        data: Path,
        definitions: Sequence[BucketDefinition],
        *,
        threads: int,
        durability: Durability,
        cache: CacheSize = CacheSize(),
    ) -> AsyncIterator["Buckets"]:
        """Open a data directory, alone.

        Args:
            data: Made if it is not there.
            definitions: Of the configuration.
            threads: For disk calls.
            durability: Of pool buckets that are created later.
            cache: Of remote buckets.

        Raises:
            Conflict: Another node has it open; the message has its pid.
            ServerError: It lies on a file system that cannot lock and map files as is needed.
        """
        with _locked(data), ThreadPoolExecutor(threads, thread_name_prefix="disk") as executor:
            journal = Journal(data / "journal")
            try:
                buckets = cls(data, definitions, journal, executor, durability, cache)
                async with buckets._opened():
                    yield buckets
            finally:
                journal.close()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        is_new = await self._in_thread(self._load)
        async with self._opened_pools(is_new):
            await self._sweep()
            async with AsyncExitStack() as remotes:
                await self._open_remotes(remotes)
                try:
                    yield
                finally:
                    self._shelf.clear()

    @asynccontextmanager
    async def _opened_pools(self, is_new: bool) -> AsyncIterator[None]:
        """First the files of what was logged, then the indexes by what they say, then a log without it."""
        files = await self._in_thread(self._open_log)
        unused = ExitStack()
        for file in files:
            unused.callback(file.close)
        try:
            logged = await self._in_thread(self._restore_logged, files)
            notes = [*await self._in_thread(lambda: list(self._journal.read_notes())), *logged]
            for durability in self._durabilities():
                self._indexes[durability] = await Index.open(
                    self._data / _INDEXES[durability],
                    self._threads,
                    is_new=is_new,
                    notes=[note for note in notes if self._has(durability, note[0])],
                    look=self._look,
                    scan=partial(self._scan, durability),
                    is_durable=durability == "power",
                )
            self._journal.forget_old()
            await self._in_thread(_clear_log, files)
            groups = self._groups = Groups(self._data / "pool", files)
            unused.pop_all()
            try:
                yield
            finally:
                await groups.close()
        finally:
            unused.close()
            for index in self._indexes.values():
                await index.close()

    async def _open_remotes(self, stack: AsyncExitStack) -> None:
        """Open origins and their caches; what is cached of buckets that are not configured now goes first."""
        directory = self._data / "cache"
        remotes = [definition for definition in self._definitions.values() if definition.remote is not None]
        if not remotes:
            return
        size = self._cache
        disk = self.cache_disk = await self._in_thread(
            lambda: CacheDisk(directory, capacity=size.capacity, high=size.high, low=size.low, threads=self._threads)
        )
        names = set()
        for definition in remotes:
            remote = definition.remote
            assert remote is not None
            name = blake2b(f"{definition.bucket}\0{remote.url}\0{remote.place}".encode(), digest_size=8).hexdigest()
            names.add(name)
            origin = await stack.enter_async_context(remote.open())
            self._cached[definition.bucket] = await stack.enter_async_context(
                CachedBucket.open_directory(
                    definition.bucket,
                    origin,
                    directory / name,
                    disk=disk,
                    policy=remote.policy,
                    threads=self._threads,
                    shelf=self._shelf,
                )
            )
        await self._in_thread(disk.load_leftovers, names)
        await disk.shrink()

    def cached(self, bucket: Bucket) -> CachedBucket | None:
        """The cache of a bucket; None: it has none. Raises BucketNotFound."""
        self.store(bucket)
        return self._cached.get(bucket)

    def caches(self) -> Sequence[CachedBucket]:
        return list(self._cached.values())

    def store(self, bucket: Bucket) -> ReadStore:
        """A bucket to read from.

        Raises:
            BucketNotFound: Names the way out.
        """
        found = self._directories.get(bucket) or self._pools.get(bucket) or self._cached.get(bucket)
        if found is None:
            way_out = (
                f"make it with: shardmill mb {bucket}"
                if bucket.provider == "ais"
                else f"start the node with --bucket {bucket}, or --bucket {bucket}=dir:PATH"
            )
            raise BucketNotFound(f"no bucket {bucket}; {way_out}")
        return found

    def writable(self, bucket: Bucket) -> WriteStore:
        """A bucket to write to; raises BucketReadOnly too."""
        self.store(bucket)
        definition = self._definitions.get(bucket)
        cached = self._cached.get(bucket)
        if definition is not None and not definition.writable:
            how = "writable = true in its table" if cached is not None else f"--bucket {bucket}=dir-rw:PATH"
            raise BucketReadOnly(f"bucket {bucket} is read-only; to write, start the node with {how}")
        if cached is not None and not isinstance(cached.origin, WriteOrigin):
            raise BucketReadOnly(f"bucket {bucket} is read-only: what is behind it cannot be written to")
        return self._directories.get(bucket) or cached or self._pools[bucket]

    def close_unused(self) -> None:
        """Close what is kept open and was not asked for since the last call."""
        self._shelf.sweep()

    def list(self) -> Sequence[BucketInfo]:
        """All buckets, by URI."""
        found = []
        for bucket in sorted({*self._directories, *self._pools, *self._cached}, key=str):
            definition = self._definitions.get(bucket)
            backing = "dir" if bucket in self._directories else "pool"
            if definition is not None and definition.remote is not None:
                backing = definition.remote.url
            found.append(BucketInfo(str(bucket), backing, definition is None or definition.writable))
        return found

    async def create(self, bucket: Bucket) -> None:
        """Create a pool bucket, durably.

        Raises:
            BadRequest: The provider is not `ais`.
            Conflict: It exists.
        """
        if bucket.provider != "ais":
            raise BadRequest(
                f"only ais:// buckets can be created here; name {bucket} when the node starts: "
                f"--bucket {bucket}=dir:PATH"
            )
        await finish(self._create(bucket))

    async def remove(self, bucket: Bucket, *, force: bool) -> None:
        """Remove a pool bucket that was created, with its objects if `force`.

        Raises:
            BucketNotFound: There is none.
            Conflict: It is configured, or not empty.
        """
        await finish(self._remove(bucket, force))

    async def _create(self, bucket: Bucket) -> None:
        async with self._changing:
            if bucket in self._pools or bucket in self._definitions:
                raise Conflict(f"bucket {bucket} exists already")
            store = self._build(bucket, secrets.token_hex(8))
            await self._in_thread(self._add, store)
            self._pools[bucket] = store

    async def _remove(self, bucket: Bucket, force: bool) -> None:
        async with self._changing:
            self.store(bucket)
            if bucket in self._definitions:
                raise Conflict(f"bucket {bucket} is configured; it goes when the node is started without it")
            store = self._pools[bucket]
            index = self._opened_index(self._durability_of(bucket))
            # An object that is being stored meanwhile is either in the index or told that there is no bucket.
            async with store.quiet():
                unlisted = await self._opened_groups().tell_index(store.identity)
                if not force and (unlisted or not await index.is_empty(store.identity)):
                    raise Conflict(
                        f"bucket {bucket} is not empty; remove its objects, or force it (shardmill rb --force)"
                    )
                others = [other for other in self._pools.values() if other is not store]
                await self._in_thread(self._save, others)
                store.is_removed = True
                # What is being made of the log right now would be left over.
                await self._in_thread(self._opened_groups().wait_made)
                store.forget_kept()
                del self._pools[bucket]
            await self._forget(store.identity)

    async def _forget(self, identity: str) -> None:
        """Objects first, for their space; the directory last, since one that is left tells the next start to go on."""
        directory = self._data / "pool" / identity

        def clear() -> None:
            for path in directory.iterdir():
                shutil.rmtree(path, ignore_errors=True)

        await self._in_thread(clear)
        for index in self._indexes.values():
            await index.forget_store(identity)
        await self._in_thread(lambda: shutil.rmtree(directory, ignore_errors=True))

    async def _sweep(self) -> None:
        """End removals of buckets that were half-way."""
        identities = {store.identity for store in self._pools.values()}
        for path in await self._in_thread(lambda: list((self._data / "pool").iterdir())):
            if path.name not in identities and _IDENTITY.fullmatch(path.name):
                logger.info("removing what is left of a removed bucket")
                await self._forget(path.name)

    def _load(self) -> bool:
        """Read what buckets there are and make those of the configuration; True: there were none."""
        (self._data / "pool").mkdir(exist_ok=True)
        (self._data / "buckets.json.new").unlink(missing_ok=True)
        known: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                known = msgspec.json.decode((self._data / "buckets.json").read_bytes(), type=dict[str, str])
            except msgspec.MsgspecError as error:
                raise ServerError(f"the data directory's buckets.json cannot be read: {error}") from None
        for uri, identity in known.items():
            store = self._build(Bucket.parse(uri), identity)
            store.prepare()
            self._pools[store.bucket] = store
        wanted = [
            bucket
            for bucket, definition in self._definitions.items()
            if definition.path is None and definition.remote is None
        ]
        for bucket in wanted:
            if bucket not in self._pools:
                store = self._build(bucket, secrets.token_hex(8))
                self._add(store)
                self._pools[bucket] = store
        self._keep_promises()
        for bucket, directory in self._directories.items():
            if self._definitions[bucket].writable:
                directory.sweep()
        return not known

    def _keep_promises(self) -> None:
        """Note what each bucket promises; where that is another than before, its objects are not in the right index."""
        with disk_errors("the list of buckets"):
            changed = False
            for store in self._pools.values():
                promise = self._durability_of(store.bucket)
                path = store.directory / _PROMISE
                told = path.read_text() if path.exists() else None
                if told == promise:
                    continue
                if not changed:
                    changed = True
                    _sync_around(self._data / "pool")
                    for name in _INDEXES.values():
                        forget_complete(self._data / name)
                replace_durably(path, promise.encode())

    def _build(self, bucket: Bucket, identity: str) -> PoolStore:
        durability = self._durability_of(bucket)
        return PoolStore(
            bucket,
            self._data / "pool" / identity,
            identity,
            index=partial(self._opened_index, durability),
            groups=self._opened_groups,
            journal=self._journal,
            threads=self._threads,
            durability=durability,
            shelf=self._shelf,
        )

    def _opened_index(self, durability: Durability) -> Index:
        return self._indexes[durability]

    def _opened_groups(self) -> Groups:
        assert self._groups is not None
        return self._groups

    def _durability_of(self, bucket: Bucket) -> Durability:
        definition = self._definitions.get(bucket)
        return definition.durability if definition else self._durability

    def _durabilities(self) -> Sequence[Durability]:
        """Of the buckets that there are and that may be created."""
        return sorted({self._durability, *(self._durability_of(bucket) for bucket in self._pools)})

    def _has(self, durability: Durability, identity: str) -> bool:
        store = self._store_of(identity)
        return store is not None and self._durability_of(store.bucket) == durability

    def _store_of(self, identity: str) -> PoolStore | None:
        return next((store for store in self._pools.values() if store.identity == identity), None)

    def _open_log(self) -> Sequence[LogFile]:
        directory = self._data / "log"
        with disk_errors("the log"):
            directory.mkdir(exist_ok=True)
            size = size_on(directory)
            files = [LogFile(directory / name, size) for name in ("a", "b")]
            sync_directory(directory)
            sync_directory(self._data)
        return files

    def _restore_logged(self, files: Sequence[LogFile]) -> Sequence[tuple[str, str]]:
        """Give objects of the log the files that a power cut may have taken; their store ids and keys."""
        keys = []
        for (identity, key), content in survivors(files):
            store = self._store_of(identity)
            if store is not None:
                store.restore(key, content)
                keys.append((identity, key))
        if keys:
            with disk_errors("the log"):
                _sync_around(self._data / "pool")
        return keys

    def _add(self, store: PoolStore) -> None:
        with disk_errors(f"bucket {store.bucket}"):
            store.prepare()
            replace_durably(store.directory / _PROMISE, self._durability_of(store.bucket).encode())
            sync_directory(store.directory.parent)
        self._save([*self._pools.values(), store])

    def _save(self, stores: Sequence[PoolStore]) -> None:
        table = {str(store.bucket): store.identity for store in stores}
        with disk_errors("the list of buckets"):
            replace_durably(self._data / "buckets.json", msgspec.json.encode(table))

    def _look(self, identity: str, key: str) -> ObjectMeta | None:
        store = self._store_of(identity)
        return store.look(key) if store is not None else None

    def _scan(self, durability: Durability) -> Iterator[tuple[str, ObjectMeta]]:
        for store in list(self._pools.values()):
            if self._durability_of(store.bucket) == durability:
                for meta in store.scan():
                    yield store.identity, meta

    async def _in_thread(self, call: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def _clear_log(files: Sequence[LogFile]) -> None:
    """The older one first: an end in between must not leave what the newer one says otherwise."""
    turn = max(file.turn for file in files)
    for file in sorted(files, key=lambda file: file.turn):
        turn += 1
        file.clear(turn)


def _sync_around(path: Path) -> None:
    """Everything on the file system of a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_file_system(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Hold the data directory's lock.

    Raises:
        Conflict, ServerError: It cannot be had.
    """
    try:
        _make_durably(data)
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServerError(
            f"the data directory {data} cannot be used: {error.strerror}; give another with --data"
        ) from None
    try:
        check_file_system(data, _MOUNTS)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise Conflict(
                f"the data directory {data} is used by the node with pid {pid}; stop that one, or give another --data"
            ) from None
        except OSError as error:
            raise ServerError(f"{data} lies on a file system that cannot lock: {error.strerror}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_file_system(path: Path, mounts: Path) -> None:
    """Refuse a path on a network's file system.

    Args:
        path: Of a directory.
        mounts: File in the form of `/proc/self/mounts`; where it cannot be read nothing is refused.

    Raises:
        ServerError: Names the file system.
    """
    kind = file_system_of(path, mounts)
    if kind in _REMOTE_TYPES:
        raise ServerError(f"{path} lies on {kind}, whose locks and maps are not to be trusted; give a local --data")


def is_far(path: Path, mounts: Path) -> bool:
    """Whether a look at what is there may have to wait for a network or for a program."""
    return file_system_of(path, mounts) in _REMOTE_TYPES or is_made_up(path, mounts)


def is_made_up(path: Path, mounts: Path) -> bool:
    """Whether a program says what is there, whose folders may have any times."""
    kind = file_system_of(path, mounts)
    return kind == "fuse" or kind.startswith("fuse.")


def file_system_of(path: Path, mounts: Path) -> str:
    """The type of what a path lies on; `unknown` where that cannot be read."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    with contextlib.suppress(OSError):
        for line in mounts.read_text(errors="surrogateescape").splitlines():
            _, mounted, found = line.split(" ")[:3]
            point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), mounted).rstrip("/") + "/"
            # Of two on the same point the later one is on top.
            if (resolved + "/").startswith(point) and len(point) >= len(best):
                best, kind = point, found
    return kind


def _make_durably(path: Path) -> None:
    """Make a directory and those above it, so that a power cut does not take what will be in it."""
    if path.is_dir():
        return
    _make_durably(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)
