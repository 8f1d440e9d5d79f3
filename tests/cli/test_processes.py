"""The installed command as a process among others: pipes, signals, terminals, and what it leaves when it is stopped."""

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode

SHARDMILL = Path(sys.executable).with_name("shardmill")
IMAGENET = "gs://sharded-imagenet"
SHARD = "imagenet-train-000000.tar"
SLOW = """
import time


def slow(sample):
    time.sleep(0.2)
    sample["blob"] = bytes(200_000)
    return sample


def fail_late(sample):
    if int(sample["__key__"]) % 32 == 20:
        raise ValueError("late in " + sample["__key__"])
    sample["blob"] = bytes(100_000)
    return sample
"""


@pytest.fixture
def environ(node: RunningNode) -> dict[str, str]:
    """The installed command on the path, and this node as its."""
    path = f"{SHARDMILL.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SHARDMILL_ENDPOINT": node.endpoint, "NO_COLOR": "1"}


@pytest.fixture
def bucket(client: Client) -> Iterator[str]:
    """The URI of an empty bucket of this test's own."""
    handle = client.bucket("ais://processes")
    handle.create()
    yield handle.uri
    handle.remove(force=True)


@pytest.fixture
def large(client: Client, bucket: str) -> tuple[str, bytes]:
    """The URI and the bytes of an object that a pipe does not hold."""
    data = os.urandom(1 << 20) * 96
    client.object(f"{bucket}/large.bin").put(data)
    return f"{bucket}/large.bin", data


def run(*arguments: str | Path, environ: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[bytes]":
    command: list[str | Path] = [SHARDMILL, *arguments]
    return subprocess.run(command, env=environ, cwd=cwd, capture_output=True, check=False, timeout=100)


def shell(line: str, environ: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["bash", "-c", line], env=environ, cwd=cwd, capture_output=True, check=False, timeout=100)


def bytes_kept(path: Path) -> int:
    """Up to where a partial file has no holes: what its name says, or its size."""
    return int(path.name.split(".")[-2]) if path.suffix == ".parts" else path.stat().st_size


def wait_for_part(directory: Path) -> Path:
    """The partial file of a download, once there are bytes in it that a later one can go on from."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in directory.glob(".*.part*"):
            # Its name changes as it grows.
            with contextlib.suppress(FileNotFoundError):
                if bytes_kept(path):
                    return path
        time.sleep(0.005)
    raise AssertionError("no download has begun")


def test_ten_members_of_a_shard(environ: dict[str, str], tmp_path: Path) -> None:
    """As it stands in the documentation: ten lines, nothing on standard error, status 0 or 141."""
    line = "shardmill get gcp://sharded-imagenet/imagenet-train-000000.tar - | tar -tvf - | head -n 10"
    for before in ("", "set -o pipefail; "):
        done = shell(before + line, environ, tmp_path)
        assert (len(done.stdout.splitlines()), done.stderr) == (10, b"")
        assert done.returncode in (0, 141)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        f"get {IMAGENET}/{SHARD} -",
        "ls -r ais://processes",
        "ls -r --json ais://processes",
        f"ls --members {IMAGENET}/{SHARD}",
    ],
)
def test_a_closed_pipe_is_no_error(
    environ: dict[str, str], tmp_path: Path, client: Client, bucket: str, command: str
) -> None:
    for number in range(300):
        client.object(f"{bucket}/{'k' * 300}{number:04d}").put(b"")
    done = shell(f"shardmill {command} | head -c 1; echo; echo ${{PIPESTATUS[0]}}", environ, tmp_path)
    assert done.stderr == b""
    assert done.stdout.splitlines()[-1] in (b"0", b"141")


def test_a_closed_standard_output_is_one_line(environ: dict[str, str], tmp_path: Path) -> None:
    done = shell("shardmill ls >&-", environ, tmp_path)
    assert b"Traceback" not in done.stderr
    full = shell(f"shardmill get {IMAGENET}/{SHARD} - > /dev/full", environ, tmp_path)
    assert full.returncode == 1
    assert full.stderr.count(b"\n") == 1
    assert b"No space left" in full.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_was_stopped_is_continued(
    environ: dict[str, str],
    tmp_path: Path,
    large: tuple[str, bytes],
    node: RunningNode,
    client: Client,
    number: signal.Signals,
) -> None:
    uri, data = large
    command: list[str | Path] = [SHARDMILL, "get", uri, "got.bin"]
    # A stopped process leaves the download where it is.
    with subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE) as started:
        wait_for_part(tmp_path)
        started.send_signal(signal.SIGSTOP)
        started.send_signal(number)
        started.send_signal(signal.SIGCONT)
        _, said = started.communicate(timeout=60)
    assert started.returncode in (-number, 130 if number == signal.SIGINT else -number)
    assert b"Traceback" not in said
    (part,) = tmp_path.iterdir()
    kept = bytes_kept(part)
    assert kept
    assert part.read_bytes()[:kept] == data[:kept]
    assert not (tmp_path / "got.bin").exists()
    done = run("get", uri, "got.bin", environ=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got.bin").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["got.bin"]


def test_ctrl_c_while_a_shard_is_transformed_leaves_no_file(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    assert run("transform", "add", "mine.py:slow", "--name", "slow", environ=environ, cwd=tmp_path).returncode == 0
    command: list[str | Path] = [SHARDMILL, "get", f"{IMAGENET}/{SHARD}", "made.tar", "--transform", "slow"]
    with subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE) as started:
        wait_for_part(tmp_path)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    assert started.returncode in (130, -signal.SIGINT)
    assert b"Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_ctrl_c_while_several_are_transformed_ends_at_once(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.replace("0.2", "3.0"))
    assert run("transform", "add", "slow.py:slow", "--name", "slower", environ=environ, cwd=tmp_path).returncode == 0
    command: list[str | Path] = [SHARDMILL, "get", "-r", f"{IMAGENET}/", "all", "--transform", "slower"]
    process = subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process, contextlib.closing(process.stderr):
        while not list(tmp_path.glob("all/.*.part")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        # A shard takes longer than this by far.
        assert process.wait(30) == 130
    assert not list(tmp_path.glob("all/[!.]*"))


@pytest.mark.parametrize("more", [(), ("--range", "0-9"), ("--member",)])
def test_what_is_no_file_is_written_to_and_stays(
    environ: dict[str, str], tmp_path: Path, shards: Path, more: tuple[str, ...]
) -> None:
    """A pipe by its name, and by the name of an open descriptor; /dev/null is spared where this runs as root."""
    if more == ("--member",):
        with tarfile.open(shards / SHARD) as archive:
            more = ("--member", archive.getnames()[1])
    data = run("get", f"{IMAGENET}/{SHARD}", "-", *more, environ=environ, cwd=tmp_path).stdout
    assert data
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = f"'{SHARDMILL}' get {IMAGENET}/{SHARD} pipe {' '.join(more)} & cat pipe; wait $!"
    done = shell(line, environ, tmp_path)
    assert (done.returncode, done.stdout) == (0, data), done.stderr
    assert pipe.is_fifo()
    done = run("get", f"{IMAGENET}/{SHARD}", "/dev/stdout", *more, environ=environ, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, data), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]


def test_a_transform_cut_in_mid_stream_names_sample_and_line(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    assert (
        run("transform", "add", "mine.py:fail_late", "--name", "fail-late", environ=environ, cwd=tmp_path).returncode
        == 0
    )
    done = run("get", f"{IMAGENET}/{SHARD}", "made.tar", "--transform", "fail-late", environ=environ, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(rb"sample '\d{6}20'|sample '\d+'", done.stderr)
    assert b"late in" in done.stderr
    assert b'mine.py", line 13, in fail_late' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    piped = shell(
        f"shardmill get {IMAGENET}/{SHARD} - --transform fail-late | tar -tf - > /dev/null; echo ${{PIPESTATUS[@]}}",
        environ,
        tmp_path,
    )
    statuses = piped.stdout.split()
    assert statuses[0] == b"1"
    assert statuses[1] != b"0"


def test_a_key_that_leads_out_of_the_directory_is_refused(
    environ: dict[str, str], tmp_path: Path, client: Client, bucket: str
) -> None:
    client.object(f"{bucket}/d/../../evil").put(b"evil")
    client.object(f"{bucket}/d/good").put(b"good")
    target = tmp_path / "in" / "here"
    target.mkdir(parents=True)
    done = run("get", "-r", f"{bucket}/d/", target, environ=environ, cwd=tmp_path)
    assert done.returncode == 2
    assert b"leads out of" in done.stderr
    assert not list(tmp_path.rglob("evil*"))


def test_keys_of_any_spelling_go_through_the_command(
    environ: dict[str, str], tmp_path: Path, client: Client, bucket: str
) -> None:
    for number, key in enumerate(["a b", "a#b?c&d", "100%", "caf\u00e9", "a::b", "x~y", "-dash"]):
        (tmp_path / "source").write_bytes(b"%d" % number)
        done = run("put", "source", f"{bucket}/{key}", environ=environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert client.object(f"{bucket}/{key}").read() == b"%d" % number
        got = run("get", f"{bucket}/{key}", "-", environ=environ, cwd=tmp_path)
        assert (got.returncode, got.stdout) == (0, b"%d" % number), got.stderr
    listed = run("ls", bucket, environ=environ, cwd=tmp_path).stdout.decode().splitlines()
    assert "caf\u00e9" in listed and "a b" in listed


def test_put_of_a_directory_with_its_options(
    environ: dict[str, str], tmp_path: Path, client: Client, bucket: str
) -> None:
    for name in ("a", "sub/b", "sub/deeper/c"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert run("put", "tree", bucket, "--meta", "who=me", "--if-absent", environ=environ, cwd=tmp_path).returncode == 0
    assert [item.key for item in client.bucket(bucket).list()] == ["a", "sub/b", "sub/deeper/c"]
    assert {client.object(f"{bucket}/{key}").head().user["who"] for key in ("a", "sub/b")} == {"me"}
    (tmp_path / "tree" / "a").write_bytes(b"changed")
    again = run("put", "tree", bucket, "--if-absent", environ=environ, cwd=tmp_path)
    assert again.returncode == 1
    assert b"Traceback" not in again.stderr
    assert client.object(f"{bucket}/a").read() == b"a"
    assert run("put", "tree", bucket, environ=environ, cwd=tmp_path).returncode == 0
    assert client.object(f"{bucket}/a").read() == b"changed"


def test_ranges_are_inclusive_and_checked(environ: dict[str, str], tmp_path: Path, shards: Path) -> None:
    data = (shards / SHARD).read_bytes()
    for text, expected in (
        ("0-0", data[:1]),
        ("10-19", data[10:20]),
        ("-7", data[-7:]),
        (f"{len(data) - 3}-", data[-3:]),
        (f"5-{10**30}", data[5:]),
    ):
        done = run("get", f"{IMAGENET}/{SHARD}", "-", "--range", text, environ=environ, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
    beyond = run("get", f"{IMAGENET}/{SHARD}", "-", "--range", f"{len(data)}-", environ=environ, cwd=tmp_path)
    assert (beyond.returncode, beyond.stdout) == (2, b"")
    assert b"has only" in beyond.stderr


def test_what_cannot_be_written_is_one_line(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in ("file/below", "/proc/none/x"):
        done = run("get", f"{IMAGENET}/{SHARD}", target, environ=environ, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1, done.stderr


def test_what_is_not_there_is_status_1_and_says_where_to_look(environ: dict[str, str], tmp_path: Path) -> None:
    for command in ("stat", "get", "rm", "ls --members"):
        for uri in (f"{IMAGENET}/none.tar", "ais://nowhere/none.tar"):
            done = run(*command.split(), uri, environ=environ, cwd=tmp_path)
            assert done.returncode == 1, command
            assert done.stdout == b""
            assert 1 <= done.stderr.count(b"\n") <= 2
    assert run("rm", "-r", f"{IMAGENET}/none", environ=environ, cwd=tmp_path).returncode == 1
    readonly = run("rm", f"{IMAGENET}/{SHARD}", environ=environ, cwd=tmp_path)
    assert readonly.returncode == 1
    assert b"read-only" in readonly.stderr


def test_copies_take_metadata_and_transforms_along(
    environ: dict[str, str], tmp_path: Path, client: Client, bucket: str
) -> None:
    client.object(f"{bucket}/from").put(b"bytes", meta={"k": "v"})
    assert run("cp", f"{bucket}/from", f"{bucket}/to", environ=environ, cwd=tmp_path).returncode == 0
    assert (client.object(f"{bucket}/to").read(), dict(client.object(f"{bucket}/to").head().user)) == (
        b"bytes",
        {"k": "v"},
    )
    (tmp_path / "mine.py").write_text(
        "def keep(sample):\n    return {'__key__': sample['__key__'], 'cls': sample['cls']}\n"
    )
    assert run("transform", "add", "mine.py:keep", "--name", "keep", environ=environ, cwd=tmp_path).returncode == 0
    done = run(
        "cp",
        f"{IMAGENET}/{SHARD}",
        f"{bucket}/small.tar",
        "--transform",
        "keep",
        "--seed",
        "1",
        "--count",
        "3",
        environ=environ,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert run("get", f"{bucket}/small.tar", "small.tar", environ=environ, cwd=tmp_path).returncode == 0
    with tarfile.open(tmp_path / "small.tar") as archive:
        assert [name.rpartition(".")[2] for name in archive.getnames()] == ["cls"] * 3


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(environ: dict[str, str], tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [SHARDMILL],
        env={**environ, "_SHARDMILL_COMPLETE": f"source_{name}"},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"shardmill" in done.stdout
    assert b"_SHARDMILL_COMPLETE" in done.stdout
    if name == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, check=False).returncode == 0


def test_bash_completes_commands(environ: dict[str, str], tmp_path: Path) -> None:
    asked = {**environ, "_SHARDMILL_COMPLETE": "complete_bash", "COMP_WORDS": "shardmill st", "COMP_CWORD": "1"}
    done = subprocess.run([SHARDMILL], env=asked, cwd=tmp_path, capture_output=True, check=False)
    assert {b"stat", b"status"} <= set(done.stdout.split())


@pytest.mark.parametrize("words", ["transform show comp", "get gs://imgs/a.tar --transform comp"])
def test_bash_completes_names_of_transforms(
    environ: dict[str, str], tmp_path: Path, client: Client, words: str
) -> None:
    (tmp_path / "mine.py").write_text("def keep(sample):\n    return sample\n")
    for name in ("complete-a", "complete-b", "other"):
        client.transforms.add(f"{tmp_path}/mine.py:keep", name)
    call = {
        "_SHARDMILL_COMPLETE": "complete_bash",
        "COMP_WORDS": f"shardmill {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
    }
    asked = [environ | call, environ | call | {"SHARDMILL_ENDPOINT": "http://127.0.0.1:1"}]
    found, nothing = (
        subprocess.run([SHARDMILL], env=env, cwd=tmp_path, capture_output=True, check=False) for env in asked
    )
    assert found.stdout.split() == [b"complete-a", b"complete-b"]
    assert (nothing.stdout.strip(), nothing.stderr) == (b"", b"")


def test_progress_is_for_terminals_and_words_go_to_standard_error(
    environ: dict[str, str], tmp_path: Path, large: tuple[str, bytes]
) -> None:
    uri, data = large
    quiet = run("get", uri, "quiet.bin", environ=environ, cwd=tmp_path)
    assert quiet.stdout == b""
    assert quiet.stderr.count(b"\n") == 1
    assert b"\r" not in quiet.stderr and b"\x1b" not in quiet.stderr
    outer, inner = pty.openpty()
    try:
        with subprocess.Popen(
            [SHARDMILL, "get", uri, "shown.bin"],
            env={**environ, "TERM": "xterm"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=inner,
        ) as started:
            os.close(inner)
            shown = b""
            while True:
                try:
                    piece = os.read(outer, 1 << 16)
                except OSError:  # the other side has gone
                    break
                if not piece:
                    break
                shown += piece
            assert started.stdout is not None
            assert started.stdout.read() == b""
        assert started.returncode == 0
    finally:
        os.close(outer)
    assert b"\r" in shown or b"\x1b" in shown
    for name in ("quiet.bin", "shown.bin"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).digest() == hashlib.sha256(data).digest()


def test_json_of_every_listing_is_one_document_a_line(environ: dict[str, str], tmp_path: Path) -> None:

    for command in (
        "ls",
        f"ls {IMAGENET}",
        f"ls --members {IMAGENET}/{SHARD}",
        "transform ls",
        "transform errors",
        "doctor",
    ):
        done = run(*command.split(), "--json", environ=environ, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        for line in done.stdout.splitlines():
            assert isinstance(json.loads(line), dict), command
    for command in (f"stat {IMAGENET}/{SHARD}", "status"):
        assert isinstance(json.loads(run(*command.split(), "--json", environ=environ, cwd=tmp_path).stdout), dict)
    assert isinstance(json.loads(run("config", environ=environ, cwd=tmp_path).stdout), dict)
