"""What the kernel tells of a process and of those that came from it; one that has just ended counts as nothing."""

import contextlib
import os

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_READ = 1 << 16  # bytes; all that these files say


def live_descendants(pid: int) -> list[int]:
    """Pids of all that run below a process, zombies left out."""
    found: list[int] = []
    pending = [pid]
    while pending:
        below = _children(pending.pop())
        pending += below
        found += [child for child in below if _stat(child)[:1] not in ([], [b"Z"])]
    return found


def resident_bytes_at_most(pid: int) -> int:
    """What `resident_bytes` is no more than, pages of files included; costs a tenth of it."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE if len(fields) > 1 else 0


def resident_bytes(pid: int) -> int:
    """Memory that no file stands behind, its own or shared; pages that a fork left shared count in every process."""
    return 1024 * sum(_values(f"/proc/{pid}/status", (b"RssAnon", b"RssShmem")))


def proportional_bytes(pid: int) -> int:
    """The same with shared pages divided among those who have them; costs a millisecond and more."""
    return 1024 * sum(_values(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon", b"Pss_Shmem")))


def cpu_seconds(pid: int) -> float:
    """Processor time of all its threads so far."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
    return found


def _stat(pid: int) -> list[bytes]:
    """Fields of its status line from the state on; the name before may hold anything."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _values(path: str, names: tuple[bytes, ...]) -> list[int]:
    return [int(line.split()[1]) for line in _read(path).splitlines() if line.partition(b":")[0] in names]


def _read(path: str) -> bytes:
    """All of a file of the kernel's; nothing if what it tells of is gone."""
    data = b""
    try:
        # Many times a second: Python's file objects would cost more than the answer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return data
    try:
        while piece := os.read(descriptor, _READ):
            data += piece
    except OSError:
        return b""
    finally:
        os.close(descriptor)
    return data
