"""Directories that functions write into: removed whatever was done to them.

Names, modes and depth are the function's choice. Links are never followed, and no path is walked twice by name.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


def remove_tree(path: Path) -> bool:
    """Remove a directory with all that is in it; False: something is left, because somebody still writes there."""
    try:
        with _opened(str(path), None) as top:
            _empty(top)
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _empty(top: int) -> None:
    """Directories below the first level are moved there, so that no depth needs a stack or more descriptors."""
    while True:
        directories = _clear(top, None)
        if not directories:
            return
        for name in directories:
            with _opened(name, top) as directory:
                _clear(directory, top)
            os.rmdir(name, dir_fd=top)


def _clear(directory: int, top: int | None) -> list[str]:
    """Remove what is no directory; move directories to `top` if given. Returns the names of those still here."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=directory)
    if top is None:
        return found
    for name in found:
        # A directory that may not be written cannot be moved either.
        with _opened(name, directory):
            os.rename(name, f"removed-{secrets.token_hex(8)}", src_dir_fd=directory, dst_dir_fd=top)
    return []


@contextlib.contextmanager
def _opened(name: str, parent: int | None) -> Iterator[int]:
    """A directory's descriptor, with all rights of its owner on it."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
    try:
        yield directory
    finally:
        os.close(directory)
