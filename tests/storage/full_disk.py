"""Disks that are really full: a small file system where one may be mounted, else a limit on the size of files."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_HAS_EXT2 = shutil.which("mkfs.ext2") is not None


@contextlib.contextmanager
def write_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes; the kernel answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[bool]:
    """A file system of `size` (as `8m`) on `path`; False: none may be mounted, and `path` is a plain directory."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)


@contextlib.contextmanager
def plain_disk(path: Path, size: str) -> Iterator[bool]:
    """As `small_disk`, of a kind that takes no space before it is written."""
    path.mkdir()
    image = path.with_suffix(".img")
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    made = subprocess.run(["mkfs.ext2", "-q", "-F", "-m", "0", str(image)], capture_output=True) if _HAS_EXT2 else None
    is_mounted = made is not None and made.returncode == 0
    if is_mounted:
        is_mounted = not subprocess.run(["mount", "-o", "loop", str(image), str(path)], capture_output=True).returncode
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)
        image.unlink()


def fill(path: Path, *, leave: int = 0) -> None:
    """Take all space of the file system into one file, and give `leave` bytes back."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
        os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - leave))
    finally:
        os.close(descriptor)
