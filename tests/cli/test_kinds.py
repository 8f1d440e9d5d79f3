"""Commands that register functions over whole objects, command lines and pipelines."""

import gzip
import json
from pathlib import Path

import pytest

from tests.cli.test_commands import IMAGENET, SHARD, Shell, shell

__all__ = ["shell"]

CODE = """
from shardmill import transform


def reverse(data, ref, times=1):
    return data[::-1] * times


@transform(kind="stream")
def first_line(reader, writer):
    writer.write(reader.readline())


def name_of(path):
    import os
    return os.path.basename(path).encode()


def small(sample):
    sample["jpg"] = sample["jpg"].resize((8, 8))
    return sample


def count(sample, by=1):
    sample["json"] = {"by": by}
    return sample
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "kinds.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def text(tmp_path: Path, shell: Shell) -> str:
    """The URI of an object with two lines."""
    path = tmp_path / "note.txt"
    path.write_text("one\ntwo\n")
    status, _, err = shell("put", str(path), "ais://pool/notes/note.txt")
    assert status == 0, err
    return "ais://pool/notes/note.txt"


def added(shell: Shell, *arguments: str) -> str:
    status, out, err = shell("transform", *arguments)
    assert status == 0, err
    return out.strip()


def test_functions_over_whole_objects_are_added_and_read_through(shell: Shell, code: Path, text: str) -> None:
    reverse = added(shell, "add", f"{code}:reverse", "--kind", "bytes", "--args", '{"times": 2}', "--name", "cli-rev")
    assert shell("get", text, "-", "--transform", reverse)[:2] == (0, "\nowt\neno\nowt\neno")
    line = added(shell, "add", f"{code}:first_line", "--name", "cli-line")
    assert shell("get", text, "-", "--transform", line)[:2] == (0, "one\n")
    name = added(shell, "add", f"{code}:name_of", "--kind", "bytes", "--by-path", "--name", "cli-name")
    assert shell("get", text, "-", "--transform", name)[:2] == (0, "note.txt")
    status, out, _ = shell("transform", "show", name)
    assert status == 0
    assert "kind:         bytes by path\n" in out
    assert "decoder" not in out


def test_a_command_line_is_added_and_read_through(shell: Shell, text: str, tmp_path: Path) -> None:
    argv = ["--", "sh", "-c", "tr a-z A-Z; echo {greeting} {name}"]
    uuid = added(shell, "add-command", "cli-shout", "--args", '{"greeting": "hello"}', "--probe", text, *argv)
    assert uuid.startswith("cli-shout@")
    assert shell("get", text, "-", "--transform", "cli-shout")[:2] == (0, "ONE\nTWO\nhello note.txt\n")
    status, out, _ = shell("transform", "show", uuid)
    assert status == 0
    assert "from:         sh -c 'tr a-z A-Z; echo {greeting} {name}'\n" in out
    assert "kind:         command\n" in out
    assert "an object tried" in out
    assert 'arguments:    {"greeting":"hello"}' in out
    status, out, _ = shell("transform", "ls")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("cli-shout@")] == ["command"]
    added(shell, "add-command", "cli-zip", "--", "gzip", "-nc")
    assert shell("get", text, "--transform", "cli-zip")[0] == 0
    assert gzip.decompress((tmp_path / "note.txt").read_bytes()) == b"one\ntwo\n"


def test_a_pipeline_is_added_from_names_and_uuids(shell: Shell, code: Path, tmp_path: Path) -> None:
    first = added(shell, "add", f"{code}:small", "--name", "cli-small")
    second = added(shell, "add", f"{code}:count", "--name", "cli-count", "--args", '{"by": 3}')
    uuid = added(shell, "add-pipeline", "cli-both", "cli-small", second)
    status, out, _ = shell("transform", "show", uuid, "--json")
    assert status == 0
    info = json.loads(out)["transform"]
    assert info["parts"] == [first, second]
    assert info["kind"] == "sample"
    status, _, err = shell("get", f"{IMAGENET}/{SHARD}", "out.tar", "--transform", uuid, "--count", "2")
    assert status == 0, err
    status, out, _ = shell("transform", "show", uuid)
    assert f"from:         {first} >> {second}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "{code}:reverse", "--kind", "video"], "no kind of function; known: sample, bytes, stream"),
        (["add", "{code}:reverse", "--kind", "stream", "--by-path"], "by_path is of kind 'bytes'"),
        (["add-command", "cli-bad", "--", "./tool"], "neither a plain name nor an absolute path"),
        (["add-command", "cli-bad", "--", "echo", "{nme}"], "which nothing stands for"),
        (["add-command", "cli-bad", "--", "no-such-command-x"], "not found in"),
        (["add-pipeline", "cli-bad", "cli-missing", "cli-missing"], "no transform 'cli-missing'"),
        (["try", "{code}:first_line", f"{IMAGENET}/{SHARD}"], "first_line is of kind stream, and try shows samples"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shell: Shell, code: Path, arguments: list[str], message: str) -> None:
    status, out, err = shell("transform", *(argument.replace("{code}", str(code)) for argument in arguments))
    assert status in (1, 2)
    assert out == ""
    assert message in err.strip().splitlines()[-1]
