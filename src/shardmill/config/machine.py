"""What settings ask of the machine: its cores, where a user's data lies, which addresses are its own."""

import ipaddress
import os
from pathlib import Path


def absolute(path: str | Path) -> Path:
    """With `~` as the user's home; that of a user who has none stays as it is, and does not exist."""
    return Path(os.path.expanduser(path)).absolute()


def default_data() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "shardmill"


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by a cgroup's CPU quota; at least 1."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = _cgroup_cores()
    return max(1, int(min(cores, quota) if quota else cores))


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        return quota_us / int((base / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
