"""What a node remembers of its jobs, torn and whole."""

from pathlib import Path

import msgspec
import pytest

from shardmill.core.errors import InsufficientStorage
from shardmill.core.jobs import JobInfo, JobRequest
from shardmill.jobs.records import Records, Saved
from tests.jobs.test_progress import build_entry, build_failure, build_items
from tests.storage.full_disk import write_limit

ITEMS = build_items(1, 2, 3)
JOB = "0123456789abcdef"


def build_saved(job: str = JOB) -> Saved:
    info = JobInfo(
        id=job,
        request=JobRequest("transform", "gs://a", prefix=""),
        state="running",
        created=1.0,
        started=None,
        ended=None,
        error=None,
        total=3,
        done=0,
        found=0,
        failed=0,
        running=0,
        samples=0,
        failures=0,
        bytes=6,
        bytes_done=0,
        bytes_out=0,
        rate=0.0,
        time_left=None,
        manifest=None,
    )
    return Saved("anonymous", info)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    records = Records(tmp_path / "jobs")
    records.save(build_saved())
    return records


def test_what_is_saved_is_loaded(records: Records, tmp_path: Path) -> None:
    other = build_saved("0" * 16)
    records.save(other)
    changed = msgspec.structs.replace(build_saved(), principal="somebody")
    records.save(changed)
    assert Records(tmp_path / "jobs").load() == [other, changed]
    records.remove(JOB)
    assert records.load() == [other]


def test_a_job_whose_file_is_torn_is_left_alone(records: Records, tmp_path: Path) -> None:
    records.save(build_saved("0" * 16))
    path = tmp_path / "jobs" / JOB / "job.json"
    path.write_bytes(path.read_bytes()[:-5])
    assert [saved.info.id for saved in records.load()] == ["0" * 16]
    assert path.exists()


def test_the_last_word_on_an_object_counts(records: Records) -> None:
    assert records.read(JOB).entries == {}
    entry = build_entry(ITEMS[0])
    records.append(JOB, build_failure(ITEMS[0]))
    records.append(JOB, build_failure(ITEMS[1]))
    records.append(JOB, entry)
    known = records.read(JOB)
    assert known.entries == {ITEMS[0].key: entry}
    assert known.failures == {ITEMS[1].key: build_failure(ITEMS[1])}
    assert not known.is_clean
    records.rewrite(JOB, known.entries.values())
    known = records.read(JOB)
    assert (known.is_clean, known.entries, known.failures) == (True, {ITEMS[0].key: entry}, {})


@pytest.mark.parametrize("cut", [1, 10])
def test_a_line_that_was_torn_costs_its_own_object_only(records: Records, tmp_path: Path, cut: int) -> None:
    for item in ITEMS[:2]:
        records.append(JOB, build_entry(item))
    path = tmp_path / "jobs" / JOB / "entries.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    known = records.read(JOB)
    assert list(known.entries) == [ITEMS[0].key]
    assert not known.is_clean, "another line must not be written behind half a one"


def test_a_full_disk_is_told_as_one_and_leaves_no_half_a_line(records: Records, tmp_path: Path) -> None:
    records.append(JOB, build_entry(ITEMS[0]))
    size = (tmp_path / "jobs" / JOB / "entries.jsonl").stat().st_size
    with write_limit(size + 10), pytest.raises(InsufficientStorage):
        records.append(JOB, build_entry(ITEMS[1]))
    records.append(JOB, build_entry(ITEMS[2]))
    known = records.read(JOB)
    assert (known.is_clean, list(known.entries)) == (True, [ITEMS[0].key, ITEMS[2].key])
