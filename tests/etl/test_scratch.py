"""Removing what a function wrote, whatever it did to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardmill.etl.scratch import remove_tree


def test_files_links_pipes_and_directories_go_and_nothing_outside_does(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o750)
    (outside / "kept").write_text("kept")
    scratch = tmp_path / "scratch"
    (scratch / "a" / "b" / "c").mkdir(parents=True)
    (scratch / "a" / "b" / "file").write_text("x")
    (scratch / "a" / "to-directory").symlink_to(outside)
    (scratch / "to-file").symlink_to(outside / "kept")
    (scratch / "loop").symlink_to(scratch)
    os.link(outside / "kept", scratch / "a" / "hard")
    os.mkfifo(scratch / "a" / "b" / "pipe")
    assert remove_tree(scratch)
    assert not scratch.exists()
    assert (outside / "kept").read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o750


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (tmp_path / "scratch").symlink_to(tmp_path / "outside")
    assert not remove_tree(tmp_path / "scratch")
    assert (tmp_path / "outside" / "kept").exists()


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    assert remove_tree(tmp_path / "nothing")


def test_depth_needs_no_stack_and_no_descriptors(tmp_path: Path) -> None:
    make = "import os\nfor _ in range(1200):\n    os.mkdir('d'); open('f', 'w').close(); os.chdir('d')"
    (tmp_path / "scratch").mkdir()
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path / "scratch", check=True)
    assert remove_tree(tmp_path / "scratch")


REMOVE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from shardmill.etl.scratch import remove_tree
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.makedirs("scratch/a/b/c")
open("scratch/a/b/file", "w").close()
os.makedirs("scratch/names/removed-0")
for mode, name in ((0, "a/b/c"), (0o500, "a/b"), (0, "a"), (0o111, "names/removed-0"), (0o400, "names"), (0, "")):
    os.chmod(os.path.join("scratch", name), mode)
print(remove_tree(Path("scratch")), os.path.exists("scratch"))
"""


def test_permissions_are_no_hindrance_to_their_owner(tmp_path: Path) -> None:
    """Run without root's own way past them."""
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    workplace.chmod(0o777)
    source = Path(__file__).parent.parent.parent / "src"
    done = subprocess.run([sys.executable, "-c", REMOVE, str(source)], cwd=workplace, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("kind", ["file", "fifo"])
def test_what_is_no_directory_is_left(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "scratch"
    os.mkfifo(path) if kind == "fifo" else path.write_text("x")
    assert not remove_tree(path)
