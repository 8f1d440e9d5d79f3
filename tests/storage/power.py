"""A disk that forgets: what a power cut leaves of a data directory, by the flushes that went before.

Two kinds of loss: everything that was not flushed is gone, or all names are there and the bytes that were not flushed are
not, as ext4 leaves a file that was renamed unflushed. The database's own file is taken as it is: it flushes each commit
by calls that cannot be seen here, and none goes on at a cut.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from shardmill.storage import files, groups

Loss = Literal["unflushed", "unflushed bytes"]
LOSSES: tuple[Loss, ...] = ("unflushed", "unflushed bytes")

CALLS = ("write", "pwrite", "pwritev", "fdatasync", "fsync", "rename", "link", "unlink")
DATABASES = ("index", "index-kill")


class Disk:
    """What is durable below a directory; `cut` is called before each call that changes or flushes something."""

    def __init__(self, root: Path, cut: Callable[["Disk"], None]) -> None:
        self.root = root
        self._cut = cut
        self._lock = threading.RLock()
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        """Of each folder: names, what they lead to, and whether that is a folder."""
        self._held: list[int] = []
        """Files that were made stay open, so that no number of an inode is used twice."""

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Begin with all of it durable."""
        self._flush_all()
        for name in CALLS:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))
        real_open, real_sync = os.open, files.sync_file_system

        def watched_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            descriptor = real_open(path, flags, *rest, **options)
            if flags & os.O_CREAT and self._is_inside(descriptor):
                self._held.append(os.dup(descriptor))
            return descriptor

        def watched_sync(descriptor: int) -> None:
            with self._lock:
                self._cut(self)
                real_sync(descriptor)
                self._flush_all()

        patch.setattr(os, "open", watched_open)
        patch.setattr(groups, "sync_file_system", watched_sync)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def write_to(self, target: Path, loss: Loss) -> None:
        """What the next start finds."""
        with self._lock:
            self._write_to(target, loss)

    def _write_to(self, target: Path, loss: Loss) -> None:
        target.mkdir()
        if loss == "unflushed":
            self._restore(self.root.stat().st_ino, target)
        else:
            for path in self._below():
                there = target / path.relative_to(self.root)
                # Folders and empty files may still be made, so that one is seen before what it lies in.
                if path.is_dir():
                    there.mkdir(parents=True, exist_ok=True)
                else:
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(self._contents.get(path.stat().st_ino, b""))
        for name in DATABASES:
            if (self.root / name).exists():
                shutil.copytree(self.root / name, target / name)

    def _restore(self, folder: int, target: Path) -> None:
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if name in DATABASES:
                continue
            if is_folder:
                (target / name).mkdir()
                self._restore(inode, target / name)
            else:
                (target / name).write_bytes(self._contents.get(inode, b""))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            first = arguments[0]
            if isinstance(first, int):
                is_inside = self._is_inside(first)
            else:
                is_inside = Path(os.fsdecode(first)).is_relative_to(self.root)
            if not is_inside:
                return real(*arguments, **options)
            with self._lock:
                self._cut(self)
                result = real(*arguments, **options)
                if name in ("fdatasync", "fsync"):
                    self._flush(first)
            return result

        return call

    def _is_inside(self, descriptor: int) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{self.root}/")

    def _flush(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)"))
        self._keep(path, os.fstat(descriptor).st_ino, descriptor)

    def _flush_all(self) -> None:
        self._keep(self.root, self.root.stat().st_ino, None)
        for path in self._below():
            self._keep(path, path.stat().st_ino, None)

    def _keep(self, path: Path, inode: int, descriptor: int | None) -> None:
        if path.is_dir():
            self._names[inode] = {name.name: (name.stat().st_ino, name.is_dir()) for name in path.iterdir()}
        elif descriptor is None:
            self._contents[inode] = path.read_bytes()
        else:
            # Through the file itself: its name may have gone, and it may be open for writing only.
            self._contents[inode] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _below(self) -> list[Path]:
        return [path for path in sorted(self.root.rglob("*")) if path.relative_to(self.root).parts[0] not in DATABASES]
