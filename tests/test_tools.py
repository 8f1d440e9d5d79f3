"""Setting up on machines that lack something ends with a line that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"

TOO_OLD = "#!/bin/sh\nexit 1\n"
# Debian without python3-venv: the interpreter is there, the modules are not.
NO_VENV = f"""#!/bin/sh
case "$*" in
  *ensurepip*) exit 1;;
esac
exec {sys.executable} "$@"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory for PATH with what the scripts need, but no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("bash", "sh", "env", "dirname", "mkdir", "cmp", "cp", "rm", "grep", "flock"):
        found = next((Path(folder, name) for folder in ("/usr/bin", "/bin") if Path(folder, name).exists()), None)
        if found is not None:
            (directory / name).symlink_to(found)
    return directory


def add_python(path: Path, name: str, script: str) -> None:
    file = path / name
    file.write_text(script)
    file.chmod(0o755)


def run(path: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": str(path), "HOME": str(path), **variables}
    return subprocess.run(
        ["/bin/bash", str(TOOLS / command[0]), *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_python_at_all_says_what_is_needed(path: Path) -> None:
    done = run(path, "find-python")
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr


def test_a_newer_python_is_found_behind_an_old_one(path: Path) -> None:
    add_python(path, "python3", TOO_OLD)
    add_python(path, "python3.12", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    done = run(path, "find-python")
    assert done.stdout.strip() == str(path / "python3.12")


def test_a_named_python_that_is_too_old_is_not_replaced_by_another(path: Path) -> None:
    add_python(path, "old", TOO_OLD)
    add_python(path, "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    done = run(path, "find-python", PYTHON="old")
    assert done.returncode == 1
    assert "PYTHON=old" in done.stderr


def test_a_python_without_venv_names_the_package(path: Path, tmp_path: Path) -> None:
    add_python(path, "python3", NO_VENV)
    lock = tmp_path / "x.lock"
    lock.write_text("")
    done = run(path, "make-venv", str(tmp_path / "venv"), str(lock))
    assert done.returncode == 1
    assert f"python3.{sys.version_info.minor}-venv" in done.stderr


def test_an_environment_made_from_this_very_lock_is_left_alone(path: Path, tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text("")
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (venv / ".installed-from").write_text("")
    done = run(path, "make-venv", str(venv), str(lock))
    assert done.returncode == 0
    assert done.stdout == ""
