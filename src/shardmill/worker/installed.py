"""What stands on an interpreter's path, and whether it has changed since: asked by the node and by a zygote alike.

Standard library only. Installing, upgrading and removing a distribution all add or remove an entry of its directory, so
one stat of each directory tells in microseconds that nothing was done.
"""

import hashlib
import os
import sys
from collections.abc import Sequence

_METADATA = (".dist-info", ".egg-info", ".egg-link", ".egg")


def search_path(stage: str) -> list[str]:
    """What decides what this interpreter imports: its own file, and its path without the node's stage."""
    return [sys.executable, *(path for path in sys.path if path and path != stage)]


def stamps(paths: Sequence[str]) -> list[list[int]]:
    """One stat of each: cheap, and other than before whenever `fingerprint` is."""
    return [_stamp(path) for path in paths]


def fingerprint(paths: Sequence[str]) -> str:
    """A hash of which distributions stand there, and when each was put there.

    A cache directory or a module of somebody's own beside them changes a directory's stamp, but not this.
    """
    digest = hashlib.sha256()
    for path in paths:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                found = sorted(entry.path for entry in entries if entry.name.endswith(_METADATA))
        else:
            found = [path]
        for item in found:
            digest.update(repr((item, _stamp(item))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _stamp(path: str) -> list[int]:
    """Identity and times of a file or directory; empty if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_mtime_ns]
