"""Files below one directory, reached name by name from its descriptor, so that nothing outside it is ever touched.

With `follows` symbolic links count as what they lead to, wherever that is; without it they are not there.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

Names = Sequence[bytes]
"""Names below the root; none is empty, `.` or `..` or has a slash."""


class RootGone(OSError):
    """The directory itself cannot be opened."""


class Tree:
    """One directory and what is below it; calls block and raise OSError."""

    def __init__(self, root: bytes, *, follows: bool) -> None:
        self.root = root
        self.follows = follows
        self._nofollow = 0 if follows else os.O_NOFOLLOW

    @contextlib.contextmanager
    def folder(self, names: Names, *, make: bool = False) -> Iterator[int]:
        """Descriptor of a folder.

        Raises:
            RootGone: The tree's own directory.
            FileNotFoundError: There is none, and none is to be made.
            NotADirectoryError: A file or a link that is not followed stands in the way.
        """
        try:
            current = os.open(self.root, _FOLDER)
        except OSError as error:
            raise RootGone(error.errno, error.strerror) from error
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=current)
                inner = self.enter(name, current)
                os.close(current)
                current = inner
            yield current
        finally:
            os.close(current)

    def enter(self, name: bytes, folder: int) -> int:
        """Open a folder in a folder; the caller closes it."""
        try:
            return os.open(name, _FOLDER | self._nofollow, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            raise

    def open(self, names: Names) -> int:
        """Open a file for reading; the caller closes it.

        Raises:
            FileNotFoundError: There is no such file, or something that is no file: a pipe is not even touched.
        """
        with self.folder(names[:-1]) as folder:
            self._check_file(os.stat(names[-1], dir_fd=folder, follow_symlinks=self.follows))
            descriptor = os.open(names[-1], _FILE | self._nofollow, dir_fd=folder)
        try:
            self._check_file(os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def place(self, names: Names) -> "Place":
        """Where a file stands, to look at it again by its name alone."""
        return Place(self.root, names, follows=self.follows)

    def kind(self, name: bytes, folder: int) -> int | None:
        """The file type bits of what stands at a name, links not followed; None: nothing."""
        try:
            return stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return None

    def unlink(self, names: Names, *, sync: bool) -> None:
        """Remove a file, and the folders that are empty without it, which would stand in the way of their names."""
        with self.folder(names[:-1]) as folder:
            os.unlink(names[-1], dir_fd=folder)
            if sync:
                os.fsync(folder)
        for depth in range(len(names) - 1, 0, -1):
            try:
                with self.folder(names[: depth - 1]) as folder:
                    os.rmdir(names[depth - 1], dir_fd=folder)
            except OSError:
                return

    def sync(self, names: Names) -> None:
        """Make the names of a path durable, from its folder up to the root."""
        for depth in range(len(names) - 1, -1, -1):
            with self.folder(names[:depth]) as folder:
                os.fsync(folder)

    @staticmethod
    def _check_file(status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


class Place:
    """One name below a tree; looks at it cost a call a folder and none of them opens anything."""

    def __init__(self, root: bytes, names: Names, *, follows: bool) -> None:
        self._root = root
        self._folders = [] if follows else [os.path.join(root, *names[:depth]) for depth in range(1, len(names))]
        self._path = os.path.join(root, *names)
        self._look = os.stat if follows else os.lstat

    def status(self) -> os.stat_result | None:
        """Of what stands there; None: nothing, or nothing that an opening would find."""
        try:
            for folder in self._folders:
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    return None
            return self._look(self._path)
        except OSError:
            return None

    def is_empty(self) -> bool:
        """There is no such name in a tree that is there; False: there is one, or it cannot be told."""
        try:
            self._look(self._path)
        except (FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(OSError):
                return stat.S_ISDIR(os.stat(self._root).st_mode)
        except OSError:
            return False
        return False
