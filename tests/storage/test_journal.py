"""Notes of changes: whole ones are read back after a kill, whatever stands behind them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmill.core.errors import InsufficientStorage
from shardmill.storage import journal as journals
from shardmill.storage.journal import Journal
from tests.storage.full_disk import fill, small_disk, write_limit

STORE = "0123456789abcdef"


def notes_in(directory: Path) -> list[tuple[str, str]]:
    """As the next process reads them; its own files are removed again."""
    journal = Journal(directory)
    found = list(journal.read_notes())
    journal.close()
    return found


def test_notes_of_changes_that_are_not_done_are_there_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from shardmill.storage.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        f"[journal.note('{STORE}', key) for key in ('a', 'dir/ö', 'k' * 1024)]\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60).returncode == -9
    assert notes_in(tmp_path) == [(STORE, "a"), (STORE, "dir/ö"), (STORE, "k" * 1024)]
    journal = Journal(tmp_path)
    journal.forget_old()
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_journal_leaves_only_what_the_index_does_not_have(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.done(journal.note(STORE, "done"))
    journal.close()
    assert list(tmp_path.iterdir()) == []
    journal = Journal(tmp_path)
    journal.note(STORE, "owed")
    journal.close()
    assert notes_in(tmp_path) == [(STORE, "owed")]


def test_files_are_used_again_and_never_lose_a_change_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "ROTATE", 2000)
    journal = Journal(tmp_path)
    slow = journal.note(STORE, "slow")
    later = [journal.note(STORE, f"later/{number}") for number in range(150)]
    for number in range(1000):
        journal.done(journal.note(STORE, f"quick/{number}"))
        assert (STORE, "slow") in read_as_they_are(tmp_path)
    assert len(list(tmp_path.iterdir())) <= 8
    for generation in (slow, *later):
        journal.done(generation)
    before = len(list(tmp_path.iterdir()))
    for number in range(1000):
        journal.done(journal.note(STORE, f"more/{number}"))
    assert len(list(tmp_path.iterdir())) == before
    journal.close()
    assert list(tmp_path.iterdir()) == []


def read_as_they_are(directory: Path) -> list[tuple[str, str]]:
    return [note for path in directory.glob("*.notes") for note in journals._records(path.read_bytes())]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    keys=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5),
    cut=st.integers(0, 200),
    junk=st.binary(max_size=50),
)
def test_a_torn_note_ends_the_reading_and_hurts_none_before_it(
    tmp_path: Path, keys: list[str], cut: int, junk: bytes
) -> None:
    journal = Journal(tmp_path)
    ends = []
    for key in keys:
        generation = journal.note(STORE, key)
        ends.append(generation.size)
    data = generation.path.read_bytes()[: min(cut, ends[-1])]
    whole = sum(end <= len(data) for end in ends)
    for path in tmp_path.iterdir():
        path.unlink()
    journal.close()
    (tmp_path / "1.notes").write_bytes(data + junk)
    assert notes_in(tmp_path)[:whole] == [(STORE, key) for key in keys[:whole]]
    (tmp_path / "1.notes").unlink()


def test_a_file_of_zeros_or_of_anything_else_has_no_notes(tmp_path: Path) -> None:
    for number, data in enumerate((b"", bytes(8192), os.urandom(8192), b"\xff" * 100)):
        (tmp_path / f"{number}.notes").write_bytes(data)
    (tmp_path / "strange.notes").write_bytes(b"x")
    assert notes_in(tmp_path) == []


def test_changes_can_be_noted_on_a_full_disk(tmp_path: Path) -> None:
    """Else nothing could be removed from it."""
    with small_disk(tmp_path / "disk", "4m") as is_small:
        journal = Journal(tmp_path / "disk" / "journal")
        if is_small:
            fill(tmp_path / "disk" / "filler")
        for number in range(5000):
            journal.done(journal.note(STORE, f"a key that is long enough to come around twice {number:0200d}"))
        last = journal.note(STORE, "last")
        assert (STORE, "last") in read_as_they_are(tmp_path / "disk" / "journal")
        journal.done(last)
        journal.close()


def test_a_note_that_the_disk_has_no_room_for_is_refused_and_the_next_is_whole(tmp_path: Path) -> None:
    with write_limit(60):
        journal = Journal(tmp_path)
        journal.note(STORE, "fits")
        with pytest.raises(InsufficientStorage):
            journal.note(STORE, "does not fit" * 10)
    journal.note(STORE, "fits now")
    journal.close()
    assert notes_in(tmp_path) == [(STORE, "fits"), (STORE, "fits now")]
