"""Processes that are measured: started, spoken to by lines, looked at from outside, and ended with all below them."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

END_SECONDS = 10.0
_ENDS = (signal.SIGTERM, signal.SIGHUP)
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Spoken:
    """A process that says `ready …` when it is, and answers lines with lines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.said = self._line().split()[1:]
        """What followed `ready`."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str = "go") -> list[str]:
        """Have it do its work once."""
        self.tell(what)
        return self.hear()

    def tell(self, what: str) -> None:
        """Have it begin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()

    def hear(self) -> list[str]:
        """Return when it has done what it was told to."""
        return self._line().split()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args!r} ended"
        return line


@contextlib.contextmanager
def spoken(command: Sequence[str | os.PathLike[str]], environ: Mapping[str, str] | None = None) -> Iterator[Spoken]:
    """A process that prints `ready` first; gone, with what it has started, when the context is left."""
    with grouped(command, environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Spoken(process)


@contextlib.contextmanager
def grouped(
    command: Sequence[str | os.PathLike[str]],
    environ: Mapping[str, str] | None = None,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> Iterator["subprocess.Popen[str]"]:
    """A process in a session of its own, which ends with it."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=stdin,
        stdout=stdout,
        text=True,
        env={**os.environ, **(environ or {})},
        start_new_session=True,
    )
    try:
        with process:
            try:
                yield process
            finally:
                _end(process)
    finally:
        assert process.poll() is not None


def end_when_told() -> None:
    """Have SIGTERM and SIGHUP unwind the program as an interrupt does, so that what it has started is ended with it."""

    def leave(number: int, _: object) -> None:
        # Told again, as `make` and a shell both do it, it goes on ending.
        for other in _ENDS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in _ENDS:
        signal.signal(number, leave)


def _end(process: "subprocess.Popen[str]") -> None:
    """Of all of its session: those that it has left behind hold the pipes open, too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process, of all below it, and of those of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) * _TICK + sum(map(cpu_of, children_of(pid)))


def children_of(pid: int) -> list[int]:
    """Processes directly below one."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def resident(pid: int) -> int:
    """Bytes of memory of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def proportional(pid: int) -> int:
    """Bytes of memory of a process and of all below it; what several map is shared out among them."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total + sum(map(proportional, children_of(pid)))


def private(pid: int) -> int:
    """Bytes of memory that one process shares with no other."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")):
            total += int(line.split()[1]) << 10
    return total
