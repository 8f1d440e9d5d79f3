"""What a node remembers of its jobs, below its data directory; it survives a kill at any moment.

DATA/jobs/ID/job.json        for whom it works, and how it stood when that last changed
DATA/jobs/ID/entries.jsonl   a line for each object that is done or failed, synced before the next is begun
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shardmill.core.jobs import JobEntry, JobInfo, ObjectFailure
from shardmill.storage.files import disk_errors, replace_durably, sync_directory, write_all

logger = logging.getLogger(__name__)

_FORMAT = 1


class Saved(msgspec.Struct, frozen=True):
    """`job.json`."""

    principal: str
    info: JobInfo
    format: int = _FORMAT


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    entry: JobEntry | None = None
    failure: ObjectFailure | None = None


@dataclass(slots=True)
class Known:
    """What is written down of a job's objects."""

    entries: dict[str, JobEntry] = field(default_factory=dict)
    failures: dict[str, ObjectFailure] = field(default_factory=dict)
    is_clean: bool = True
    """The file has a line for each entry, and nothing else."""


class Records:
    """Files of all jobs of a node. Every method blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with disk_errors("the record of jobs"):
            directory.mkdir(parents=True, exist_ok=True)

    def load(self) -> list[Saved]:
        """Every job; one whose file cannot be read is left alone."""
        found = []
        for path in sorted(self._directory.iterdir()):
            try:
                saved = msgspec.json.decode((path / "job.json").read_bytes(), type=Saved)
            except (OSError, msgspec.MsgspecError) as error:
                logger.warning("job %s is not known any more: %s", path.name, error)
                continue
            if saved.format == _FORMAT and saved.info.id == path.name:
                found.append(saved)
        return found

    def save(self, saved: Saved) -> None:
        """Put `job.json` in place, durably."""
        path = self._directory / saved.info.id
        with disk_errors("the record of the job"):
            if not path.is_dir():
                path.mkdir()
                sync_directory(self._directory)
            replace_durably(path / "job.json", msgspec.json.encode(saved))

    def read(self, job: str) -> Known:
        """What is written down of its objects; the last word on each counts."""
        known = Known()
        with disk_errors("the record of the job"), contextlib.suppress(FileNotFoundError):
            *lines, torn = self._entries(job).read_bytes().split(b"\n")
            for line in lines:
                _take(known, line)
            known.is_clean = not torn and len(lines) == len(known.entries)
        return known

    def append(self, job: str, written: JobEntry | ObjectFailure) -> None:
        """Write one more down; when this returns, it survives a power cut. One at a time for each job."""
        line = _Line(entry=written) if isinstance(written, JobEntry) else _Line(failure=written)
        with disk_errors("the record of the job"):
            descriptor = os.open(self._entries(job), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    write_all(descriptor, msgspec.json.encode(line) + b"\n")
                    os.fdatasync(descriptor)
                except OSError:
                    # Half a line would take the next one with it.
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)

    def rewrite(self, job: str, entries: Iterable[JobEntry]) -> None:
        """Write these down in place of what was, a torn line included."""
        with disk_errors("the record of the job"):
            lines = [msgspec.json.encode(_Line(entry=entry)) + b"\n" for entry in entries]
            replace_durably(self._entries(job), b"".join(lines))

    def remove(self, job: str) -> None:
        """Forget it."""
        shutil.rmtree(self._directory / job, ignore_errors=True)

    def _entries(self, job: str) -> Path:
        return self._directory / job / "entries.jsonl"


def _take(known: Known, data: bytes) -> None:
    try:
        line = msgspec.json.decode(data, type=_Line)
    except msgspec.MsgspecError:
        # Torn by a power cut. The object is done again.
        return
    if line.entry is not None:
        known.entries[line.entry.object] = line.entry
        known.failures.pop(line.entry.object, None)
    elif line.failure is not None:
        known.failures[line.failure.object] = line.failure
