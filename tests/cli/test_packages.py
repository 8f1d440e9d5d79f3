"""`transform add --package`, `transform show` and `transform env` against a node that has wheels of its own."""

import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill.cli.main import run
from shardmill.testing.node import running_node
from tests.etl.wheels import write_wheel

Shell = Callable[..., tuple[int, str, str]]

FUNCTION = """
from shardmill import transform

@transform(name="marked", decoder=None, packages=["colours<2"])
def paint(sample):
    import colours
    sample["txt"] = colours.NAME
    return sample
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    wheels = tmp_path_factory.mktemp("wheels")
    for name in ("numpy", "pillow"):
        write_wheel(wheels, name, "1.0", {f"base_{name}.py": ""})
    for version in ("1.0", "2.0"):
        write_wheel(wheels, "colours", version, {"colours.py": f"NAME = {version!r}\n"})
    environ = {"SHARDMILL_PACKAGES_FIND_LINKS": str(wheels), "SHARDMILL_PACKAGES_NO_INDEX": "true"}
    with running_node("--workers", "1", environ=environ) as node:
        yield node.endpoint


@pytest.fixture
def shell(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setenv("SHARDMILL_ENDPOINT", endpoint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTION)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run(arguments)
        return status, *capfd.readouterr()

    return execute


def test_a_function_is_added_with_packages_and_its_environment_listed_and_removed(shell: Shell) -> None:
    status, out, err = shell(
        "transform", "add", "f.py:paint", "--name", "two", "--package", "colours", "--package", "numpy"
    )
    assert status == 0, err
    uuid = out.strip()
    assert "resolving colours, numpy\n" in err
    assert "built environment packages-" in err
    status, out, err = shell("transform", "show", "two")
    assert "packages:     colours, numpy\n" in out
    assert "locked:       colours==2.0, numpy==1.0, pillow==1.0\n" in out
    status, out, err = shell("transform", "env", "ls", "--json")
    default, built = map(json.loads, out.splitlines())
    assert (default["name"], default["packages"]) == ("default", None)
    assert (built["transforms"], built["packages"]) == ([uuid], ["colours==2.0", "numpy==1.0", "pillow==1.0"])
    status, out, err = shell("transform", "env", "ls")
    assert [line.split()[0] for line in out.splitlines()] == ["ENVIRONMENT", "default", built["name"]]
    assert re.search(rf"^{built['name']} +warm +{platform.python_version()} +3 +[\d.]+ \w+ ", out.splitlines()[2])
    assert re.search(
        rf"^default +\w+ +{platform.python_version()} +{default['distributions']} +- ", out.splitlines()[1]
    )
    status, out, err = shell("status")
    assert re.search(rf"\n{built['name']} +warm +{platform.python_version()} +3 +[\d.]+ \w+ +python of ", out)
    assert uuid in out
    status, out, err = shell("transform", "env", "rm", built["name"])
    assert status == 1
    assert f"{uuid} run in" in err
    assert shell("transform", "rm", "two")[0] == 0
    status, out, err = shell("transform", "env", "rm", built["name"])
    assert (status, err) == (0, f"removed {built['name']}\n")
    assert built["name"] not in shell("transform", "env", "ls")[1]


def test_a_function_says_by_its_mark_what_it_needs(shell: Shell) -> None:
    status, _, err = shell("transform", "add", "f.py:paint")
    assert status == 0, err
    assert "locked:       colours==1.0" in shell("transform", "show", "marked")[1]
    name = json.loads(shell("transform", "env", "ls", "--json")[1].splitlines()[-1])["name"]
    status, _, err = shell("transform", "env", "rm", "--force", name)
    assert status == 0, err


def test_a_wrong_requirement_ends_in_the_resolvers_words(shell: Shell) -> None:
    status, out, err = shell("transform", "add", "f.py:paint", "--package", "colors")
    assert (status, out) == (1, "")
    assert "colors was not found" in " ".join(err.split())
    status, _, err = shell("transform", "add", "f.py:paint", "--package", "-r x.txt")
    assert status == 2
    assert "is not a requirement" in err
