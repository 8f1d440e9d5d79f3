"""What the kernel tells of a process and of those that came from it; one that has just ended counts as nothing."""

import contextlib
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def live_descendants(pid: int) -> list[int]:
    """Pids of all that run below a process, zombies left out."""
    found: list[int] = []
    pending = [pid]
    while pending:
        below = _children(pending.pop())
        pending += below
        found += [child for child in below if _stat(child)[:1] not in ([], ["Z"])]
    return found


def resident_bytes(pid: int) -> int:
    """Memory that no file stands behind, its own or shared; pages that a fork left shared count in every process."""
    return 1024 * sum(_values(Path(f"/proc/{pid}/status"), ("RssAnon", "RssShmem")))


def proportional_bytes(pid: int) -> int:
    """The same with shared pages divided among those who have them; costs a millisecond and more."""
    return 1024 * sum(_values(Path(f"/proc/{pid}/smaps_rollup"), ("Pss_Anon", "Pss_Shmem")))


def cpu_seconds(pid: int) -> float:
    """Processor time of all its threads so far."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _stat(pid: int) -> list[str]:
    """Fields of its status line from the state on; the name before may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _values(path: Path, names: tuple[str, ...]) -> list[int]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.partition(":")[0] in names]
