"""Wrong calls and missing nodes: one line that says what to do, the right status, never a traceback."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardmill import __version__
from shardmill.cli import serve
from shardmill.cli.main import app, run


@pytest.fixture(autouse=True)
def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("SHARDMILL_ENDPOINT", endpoint)
    return endpoint


@pytest.mark.parametrize(
    "call",
    [
        "ls",
        "ls gs://imgs",
        "stat gs://imgs/a",
        "get gs://imgs/a",
        "rm gs://imgs/a",
        "mb ais://new",
        "transform ls",
        "transform errors",
        "status",
        "config",
    ],
)
def test_without_a_node_every_command_says_how_to_start_one(
    call: str, nobody_listens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(call.split()) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"shardmill: no node at {nobody_listens}; start one with: shardmill serve DIR\n")


def test_doctor_without_a_node_reports_it_as_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "broken  node" in out
    assert err == "1 thing broken\n"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("get", "shardmill get: Missing argument"),
        ("get nowhere", "'nowhere' is not of the form provider://bucket"),
        ("get xx://bucket/key", "unknown provider 'xx'"),
        ("get gs://imgs/a --range 5", "--range '5' is not A-B"),
        ("get gs://imgs/a --seed 1", "--seed says how to transform; it needs --transform"),
        ("get gs://imgs/{a,b} -", "can only go to a directory"),
        ("get http://127.0.0.1:1/x/y", "no data URL of a node"),
        ("ls --nope", "No such option: --nope"),
        ("nope", "No such command 'nope'"),
        ("put missing.tar gs://imgs/", "missing.tar: no such file or directory"),
        ("put - gs://imgs/", "standard input has no name"),
        ("cp a.tar gs://imgs/", "use: shardmill put a.tar gs://imgs/"),
        ("rm gs://imgs", "remove it with rb"),
        ("mb UPPER", "has no provider"),
        ("ls --endpoint ftp://host", "is not of the form http://HOST:PORT"),
        ("transform add missing.py:f", "missing.py: no such file; what is wanted is FILE.py:FUNC"),
        (f"transform add {__file__}:f --args [1]", "--args '[1]' is not a JSON object"),
        ("serve --listen 0.0.0.0:0", "--insecure-no-auth"),
        ("serve --bucket http://imgs", "which web server? give its URL"),
        ("serve --env torch=/nope", "is not an interpreter that can be run"),
        ("serve --workers many", "--workers"),
        ("serve --sample-timeout soon", "is not a duration"),
    ],
)
def test_a_wrong_call_is_status_2_and_one_line(call: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(call.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_node_is_not_started_with_an_interpreter_that_is_none(tmp_path: Path) -> None:
    call = ["serve", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data"), "--env", "torch=/bin/true"]
    done = subprocess.run([sys.executable, "-m", "shardmill.cli", *call], capture_output=True, text=True, timeout=60)
    said = "shardmill: environment 'torch': /bin/true is no Python: it answers nothing, status 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("call", ["serve", "demo", "transform try {here}:f {here}"])
def test_what_runs_a_node_names_the_extra_that_is_missing(
    call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "SERVER_PARTS", ("a_library_that_nobody_has",))
    assert run(call.format(here=__file__).split()) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "shardmill: only the client is installed; for a node: pip install 'shardmill[server]'\n")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shardmill {__version__}\n"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for call in (
        ["--help"],
        ["transform", "--help"],
        *([info.name or "", "--help"] for info in app.registered_commands),
    ):
        if call[0] == "":
            continue
        assert run(call) == 0, call
        assert "Usage: shardmill" in capsys.readouterr().out


def test_the_endpoint_can_stand_before_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--endpoint", "http://127.0.0.1:1", "ls"]) == 1
    assert "no node at http://127.0.0.1:1;" in capsys.readouterr().err
