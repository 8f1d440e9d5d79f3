"""What holds for every file: whole modules, nothing left undone, no machine's own paths."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Written in parts, so that this file does not contain them.
UNWANTED = {
    "work left undone": re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b"),
    "a body that only refuses": re.compile("NotImplemented" + "Error"),
    "a machine's own path": re.compile(r"/(ro" + r"ot|wo" + r"rk)/\w"),
    "a debugger": re.compile(r"\b(break" + r"point\(\)|import p" + r"db)\b"),
    "a conflict of a merge": re.compile(r"^(<{7}|>{7}) ", re.MULTILINE),
}


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked_files():
        if path.suffix in (".png", ".jpg", ".lock") or path.name == "LICENSE":
            continue
        found.append((path, path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_has(what: str) -> None:
    pattern = UNWANTED[what]
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts()
        for match in pattern.finditer(text)
    ]
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_every_public_name_of_an_interface_is_described() -> None:
    """The package's own modules and the client are what the reference is made from."""
    undescribed = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        if path.parent.name in ("shardmill", "client", "testing")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any("overload" in ast.dump(decorator) for decorator in node.decorator_list)
        and not ast.get_docstring(node)
    ]
    assert undescribed == []


def test_modules_stay_readable() -> None:
    """A module past this length holds two subjects."""
    long = {str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := path.read_text().count("\n")) > 620}
    assert long == {}


def test_no_test_is_skipped() -> None:
    pattern = re.compile(r"pytest\.(skip|importor" + r"skip)\(|mark\.skip")
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text())]
    assert found in ([], [str(Path(__file__).relative_to(ROOT))])


def test_every_locked_distribution_has_its_hash_and_no_address() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.lock")):
        text = lock.read_text()
        assert "://" not in text, lock.name
        requirements = re.findall(r"^[a-z0-9].*(?:\n    .*)*", text, re.MULTILINE)
        assert requirements
        assert [line for line in requirements if "--hash=sha256:" not in line] == []


def test_the_lock_has_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    groups = project["dependency-groups"]
    locks = {
        "dev": [
            *project["project"]["dependencies"],
            *extras["server"],
            *extras["demo"],
            *extras["notebook"],
            *groups["dev"],
        ],
        "torch": [*project["project"]["dependencies"], *extras["server"], *groups["torch"]],
        "docs": groups["docs"],
        "bench": [*project["project"]["dependencies"], *groups["bench"]],
        "bench-tensorflow": groups["bench-tensorflow"],
    }
    for name, requirements in locks.items():
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        locked = set(re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE))
        wanted = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements} - {"shardmill"}
        assert wanted - locked == set(), f"run make lock: requirements/{name}.lock is older than pyproject.toml"
