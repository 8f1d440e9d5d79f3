"""A temporary file that becomes an object of a pool, or nothing; what it replaces keeps a name until it has."""

import os
from pathlib import Path
from typing import Literal

from shardmill.storage.files import disk_errors, reserve, write_all
from shardmill.storage.trailer import BLOCK, Hasher


class PoolUpload:
    """A temporary file that becomes an object, or nothing."""

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.hasher = Hasher()
        self._is_there = False
        self._old = path.with_suffix(".old")
        """Where the object that is replaced keeps a name until the commit is through."""
        self._state: Literal["new", "over_nothing", "over_kept", "over_lost"] = "new"
        self._label = label
        self.held: bytes | bytearray = b""
        """All of a small one, while `is_held`."""
        self.is_held = False
        self._is_reserved = False
        self._descriptor: int | None = None

    @property
    def has_replaced(self) -> bool:
        """It stands in the place of the object, or of nothing."""
        return self._state != "new"

    @property
    def is_clean(self) -> bool:
        """There is nothing to discard."""
        return self._descriptor is None and not self._is_there and self._state != "over_kept"

    def begin(self, size: int | None) -> None:
        with disk_errors(self._label):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._is_there = True
            # Small ones fit or fail at once; the call would cost them more than it saves.
            if size is not None and size > BLOCK:
                self._is_reserved = True
                reserve(self._descriptor, size)

    def append(self, data: bytes | bytearray | memoryview) -> None:
        assert self._descriptor is not None
        with disk_errors(self._label):
            self.hasher.update(data)
            write_all(self._descriptor, data)

    def hold(self, data: bytes | bytearray) -> None:
        self.held = data
        self.is_held = True

    def end(self, trailer: bytes) -> None:
        """Write the trailer, and before it what is held."""
        if self._descriptor is None:
            self.begin(None)
        assert self._descriptor is not None
        write_all(self._descriptor, self.held + trailer)
        if self._is_reserved:
            # What was reserved beyond the end would stand behind the trailer.
            os.ftruncate(self._descriptor, self.hasher.size + len(trailer))

    def sync(self) -> None:
        """Make the bytes durable."""
        assert self._descriptor is not None
        os.fdatasync(self._descriptor)

    def replace(self, path: Path) -> None:
        """Become the object at `path`."""
        state: Literal["over_nothing", "over_kept", "over_lost"] = "over_kept"
        try:
            os.link(path, self._old)
        except FileNotFoundError:
            state = "over_nothing"
        except OSError:
            # A file system without second names: what is replaced cannot be put back.
            state = "over_lost"
        os.rename(self.path, path)
        self._is_there = False
        self._state = state

    def restore(self, path: Path) -> None:
        """Undo `replace`."""
        if self._state == "over_kept":
            os.rename(self._old, path)
        elif self._state == "over_nothing":
            path.unlink(missing_ok=True)
        self._state = "new"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        """Close it, and leave nothing but the object that it may have become."""
        self.close()
        if self._is_there:
            self.path.unlink(missing_ok=True)
            self._is_there = False
        self._old.unlink(missing_ok=True)
