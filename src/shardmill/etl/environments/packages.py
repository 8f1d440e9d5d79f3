"""Environments that the node builds itself: one for each set of locked distributions, shared by all who ask for it.

A set is known by a hash of its lock and of its interpreter. It is built where it stays, and is there once its record
is: what has none is swept when the node starts. Nothing in it is written again, and what has changed is not used.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from shardmill.config import PACKAGES_PREFIX, PackageSettings
from shardmill.core.errors import AccessDenied, InsufficientStorage
from shardmill.core.requirements import Requirement, normal_name
from shardmill.etl.durable import sync_directory, write_durably
from shardmill.etl.environments.uv import Interpreter, Lock, Uv, inspect
from shardmill.etl.scratch import remove_tree
from shardmill.etl.steps import see_through

logger = logging.getLogger(__name__)

FORM = 1
"""Of records and keys; raised when either changes."""

BASE = ("numpy", "pillow")
"""What decoding and encoding import, in every set."""

_ALSO_PIL = ("pillow-simd",)  # distributions that bring the package PIL themselves
_BUILDS = 2  # at once
_DIGITS = 12
_RECORD = ".json"


class Built(msgspec.Struct, frozen=True):
    """One environment as recorded."""

    form: int
    key: str
    interpreter: Interpreter
    lock: str
    lists: list[list[str]]
    """Requirements that it was found for, in normal form."""
    seal: str
    """Hash of what the directory held when it was finished; see `_seal`."""
    bytes: int
    created: float

    @property
    def name(self) -> str:
        return PACKAGES_PREFIX + self.key[:_DIGITS]

    @property
    def packages(self) -> list[str]:
        """`name==version` of each distribution."""
        return Lock(self.lock).packages


class Packages:
    """The environments below one directory.

    Args:
        settings: What may be asked for, from where, how much.
        directory: Of this part alone.
        stage: The staged code of this node.
    """

    def __init__(self, settings: PackageSettings, directory: Path, *, stage: Path) -> None:
        self._settings = settings
        self._environments = directory / "environments"
        self._environments.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._uv = Uv(settings, directory, stage=stage)
        self._built: dict[str, Built] = {}
        self._used: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._slots = asyncio.Semaphore(_BUILDS)
        self.is_needed: Callable[[str], bool] = lambda _: False
        """Whether an environment, by its name, must stay: a version or a worker is of it."""
        self.close: Callable[[str], Awaitable[None]] = _nothing_runs
        """Ends what runs in an environment, which is about to be removed."""
        self._load()

    def all(self) -> Sequence[Built]:
        """All that are there, the oldest first."""
        return sorted(self._built.values(), key=lambda built: built.created)

    def get(self, name: str) -> Built | None:
        return self._built.get(name)

    def directory_of(self, built: Built) -> Path:
        return self._environments / built.name

    def used_at(self, name: str) -> float:
        """Unix time of its last use."""
        return self._used.get(name, 0.0)

    def touch(self, name: str) -> None:
        """It is being used."""
        self._used[name] = time.time()
        with contextlib.suppress(OSError):
            os.utime(self._record(name))

    async def is_intact(self, built: Built) -> bool:
        """Whether it still holds what was built. Takes about 10 ms per 1000 files."""
        try:
            return (await asyncio.to_thread(_seal, self.directory_of(built)))[0] == built.seal
        except OSError:
            return False

    async def obtain(self, requirements: Sequence[Requirement], python: Path, progress: Callable[[str], None]) -> Built:
        """The environment for requirements: the one they were found to need before, else one that is resolved now.

        Requirements that are asked for again keep what they were locked to, until that environment is removed.

        Args:
            requirements: In their normal form.
            python: Whose interpreter it is made of.
            progress: Told what takes long.

        Raises:
            AccessDenied: The node's policy does not allow it.
            EnvironmentUnfit: There are no such distributions, or they cannot be installed; in uv's words.
            InsufficientStorage: The disk, or the part of it that packages may take, is full.
        """
        self._check_policy(requirements)
        interpreter = await inspect(python)
        texts = [str(requirement) for requirement in requirements]
        known = next(
            (built for built in self._built.values() if texts in built.lists and built.interpreter == interpreter), None
        )
        # It may have been removed while it was looked at.
        if known is not None and await self.is_intact(known) and self._built.get(known.name) is known:
            self.touch(known.name)
            return known
        lock = Lock(known.lock) if known is not None else None
        try:
            if lock is None:
                lock = await self._resolve(requirements, interpreter, progress)
            async with self._locked(_key(lock, interpreter), progress) as key:
                return await self._obtain(key, lock, requirements, interpreter, progress)
        except BaseException:
            # What was fetched in vain may not stay for ever.
            if self.bytes + await see_through(self._uv.count_bytes) > self._settings.capacity:
                await self._uv.clean()
            raise

    def is_busy(self, name: str) -> bool:
        """Whether it is being built, changed or removed."""
        built = self._built.get(name)
        return built is not None and self._lock(built.key).locked()

    async def remove(self, name: str) -> None:
        """Remove one that nothing needs and that is not busy."""
        built = self._built.get(name)
        if built is not None:
            # Whoever wants it meanwhile builds it when it is gone.
            async with self._lock(built.key):
                await self._remove(name)

    async def _remove(self, name: str) -> None:
        self._built.pop(name, None)
        self._used.pop(name, None)
        try:
            await self.close(name)
        finally:
            await see_through(self._erase, name)

    async def make_room(self, keep: str | None = None) -> None:
        """Come within the capacity: what nothing needs leaves first, the least used before, then the downloads.

        Args:
            keep: An environment that stays.

        Raises:
            InsufficientStorage: What is needed is more than may be there.
        """
        capacity = self._settings.capacity
        downloads = await asyncio.to_thread(self._uv.count_bytes)
        for built in sorted(self._built.values(), key=lambda built: self.used_at(built.name)):
            if downloads + self.bytes <= capacity:
                return
            is_free = built.name != keep and not self.is_needed(built.name) and not self._lock(built.key).locked()
            if is_free and self._built.get(built.name) is built:
                logger.info("environment %s is removed to make room", built.name)
                await self.remove(built.name)
        if downloads + self.bytes > capacity and await self._uv.clean():
            downloads = 0
        if self.bytes + downloads > capacity:
            raise InsufficientStorage(
                f"packages take {self.bytes + downloads >> 20} MiB, {capacity >> 20} MiB are allowed "
                "([packages] capacity); remove versions that use them: shardmill transform env ls"
            )

    @property
    def bytes(self) -> int:
        """Of all environments; downloads not counted."""
        return sum(built.bytes for built in self._built.values())

    def _check_policy(self, requirements: Sequence[Requirement]) -> None:
        policy = self._settings.policy
        if policy == "off":
            raise AccessDenied("this node builds no environments ([packages] policy); name one of its own with env=")
        if policy == "allow-list":
            allowed = {normal_name(name) for name in self._settings.allow}
            refused = [requirement.name for requirement in requirements if requirement.name not in allowed]
            if refused:
                raise AccessDenied(
                    f"packages {', '.join(refused)} are not allowed at this node ([packages] allow); "
                    f"allowed: {', '.join(sorted(allowed))}"
                )

    async def _resolve(
        self, requirements: Sequence[Requirement], interpreter: Interpreter, progress: Callable[[str], None]
    ) -> Lock:
        progress(f"resolving {', '.join(map(str, requirements))}")
        names = {requirement.name for requirement in requirements}
        base = [name for name in BASE if name != "pillow" or names.isdisjoint(_ALSO_PIL)]
        lock = await self._uv.resolve(requirements, base, interpreter)
        progress(f"resolved to {', '.join(lock.packages)}")
        return lock

    @asynccontextmanager
    async def _locked(self, key: str, progress: Callable[[str], None]) -> AsyncIterator[str]:
        """One at a time for each set."""
        lock = self._lock(key)
        if lock.locked():
            progress("waiting for another registration, which builds the same environment")
        async with lock:
            yield key

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _obtain(
        self,
        key: str,
        lock: Lock,
        requirements: Sequence[Requirement],
        interpreter: Interpreter,
        progress: Callable[[str], None],
    ) -> Built:
        texts = [str(requirement) for requirement in requirements]
        known = self._built.get(PACKAGES_PREFIX + key[:_DIGITS])
        if known is not None and await self.is_intact(known):
            if texts not in known.lists:
                known = msgspec.structs.replace(known, lists=[*known.lists, texts])
                await asyncio.to_thread(self._write, known)
                self._built[known.name] = known
            self.touch(known.name)
            return known
        if known is not None:
            progress(f"environment {known.name} was changed since it was built; building it again")
            await self._remove(known.name)
        lists = [*(known.lists if known is not None else []), texts]
        built = await self._build(key, lock, lists, requirements, interpreter, progress)
        try:
            await self.make_room(keep=built.name)
        except InsufficientStorage:
            await self._remove(built.name)
            raise
        return built

    async def _build(
        self,
        key: str,
        lock: Lock,
        lists: list[list[str]],
        requirements: Sequence[Requirement],
        interpreter: Interpreter,
        progress: Callable[[str], None],
    ) -> Built:
        name = PACKAGES_PREFIX + key[:_DIGITS]
        directory = self._environments / name
        started = time.monotonic()
        try:
            async with self._slots:
                await see_through(self._erase, name)
                directory.mkdir(mode=0o755)
                await self._uv.install(lock, requirements, interpreter, directory, progress)
                seal, size = await see_through(_make_read_only, directory)
            built = Built(FORM, key, interpreter, lock.text, lists, seal, size, time.time())
            await see_through(self._write, built)
        except BaseException:
            await see_through(self._erase, name)
            raise
        self._built[name] = built
        self._used[name] = time.time()
        progress(f"built environment {name} ({size >> 20} MiB) in {time.monotonic() - started:.1f} s")
        return built

    def _record(self, name: str) -> Path:
        return self._environments / (name + _RECORD)

    def _write(self, built: Built) -> None:
        write_durably(self._record(built.name), msgspec.json.encode(built))
        sync_directory(self._environments)

    def _erase(self, name: str) -> None:
        self._record(name).unlink(missing_ok=True)
        sync_directory(self._environments)
        if not remove_tree(self._environments / name):
            logger.warning("environment %s cannot be removed altogether", name)

    def _load(self) -> None:
        """Find what is there, and sweep what was not finished."""
        self._uv.sweep()
        for path in self._environments.glob(f"*{_RECORD}"):
            try:
                built = msgspec.json.decode(path.read_bytes(), type=Built)
            except (OSError, msgspec.MsgspecError):
                continue
            if built.form == FORM and path == self._record(built.name) and self.directory_of(built).is_dir():
                self._built[built.name] = built
                self._used[built.name] = path.stat().st_mtime
        for path in self._environments.iterdir():
            if path.name.removesuffix(_RECORD) not in self._built:
                logger.info("sweeping %s, which was not finished", path.name)
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink(missing_ok=True)


async def _nothing_runs(_name: str) -> None: ...


def _key(lock: Lock, interpreter: Interpreter) -> str:
    lines = "\n".join(sorted(line.strip(" \\") for line in lock.text.splitlines()))
    parts = [str(FORM), interpreter.version, interpreter.abi, interpreter.base, lines]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _make_read_only(directory: Path) -> tuple[str, int]:
    """Let nobody write there by accident; returns its seal."""
    for path, status in _walk(directory):
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(directory / path, stat.S_IMODE(status.st_mode) & ~0o222)
    os.chmod(directory, 0o555)
    return _seal(directory)


def _seal(directory: Path) -> tuple[str, int]:
    """Hash of the names, sizes and times of all files, and the bytes that they take.

    Not of their contents: reading a gigabyte whenever an environment is started would cost more than the start.
    """
    digest, total = hashlib.sha256(), 0
    for path, status in _walk(directory):
        if stat.S_ISLNK(status.st_mode):
            digest.update(repr((path, os.readlink(directory / path))).encode("utf-8", "surrogatepass"))
            continue
        total += status.st_blocks * 512
        if stat.S_ISREG(status.st_mode):
            digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest(), total


def _walk(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a directory, with its status, in an order that depends on names only; no link is followed."""
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted([*files, *folders]):
            path = os.path.join(folder, name)
            yield os.path.relpath(path, directory), os.lstat(path)
