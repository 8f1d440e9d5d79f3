"""The commands against a real node: what they print, write and return."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill import __version__
from shardmill.cli.main import run
from shardmill.client import Client, ObjectHandle, ObjectReader
from shardmill.client.downloading import Download
from shardmill.testing.node import RunningNode

IMAGENET = "gs://sharded-imagenet"
SHARD = "imagenet-train-000000.tar"
FUNCTION = """
import random


def shrink(sample):
    side = random.choice([24, 32, 40])
    sample["jpg"] = sample["jpg"].resize((side, side))
    return sample


def fail_on_one(sample):
    if sample["__key__"].endswith("3"):
        raise ValueError("unlucky " + sample["__key__"])
    return shrink(sample)
"""

Result = tuple[int, str, str]
Shell = Callable[..., Result]


@pytest.fixture
def shell(
    node: RunningNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shell:
    """Runs a command in an empty directory; gives status, standard output and standard error."""
    monkeypatch.setenv("SHARDMILL_ENDPOINT", node.endpoint)
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> Result:
        capfd.readouterr()
        status = run(arguments)
        out, err = capfd.readouterr()
        return status, out, err

    return execute


@pytest.fixture
def bucket(client: Client) -> Iterator[str]:
    """The URI of an empty bucket of this test's own."""
    handle = client.bucket("ais://commands")
    handle.create()
    yield handle.uri
    handle.remove(force=True)


@pytest.fixture
def function(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION)
    return path


def ok(result: Result) -> str:
    """Standard output of a command that succeeded."""
    status, out, err = result
    assert status == 0, err
    return out


def test_ls_shows_buckets_levels_and_everything(shell: Shell, bucket: str, client: Client) -> None:
    for key in ("top.tar", "train/a.tar", "train/b/c.tar"):
        client.object(f"{bucket}/{key}").put(b"12345")
    assert [bucket, "pool", "read-write"] in [line.split() for line in ok(shell("ls")).splitlines()]
    assert IMAGENET in [json.loads(line)["uri"] for line in ok(shell("ls", "--json")).splitlines()]
    assert ok(shell("ls", bucket)).split() == ["top.tar", "train/"]
    assert ok(shell("ls", f"{bucket}/train/")).split() == ["train/a.tar", "train/b/"]
    assert ok(shell("ls", "-r", bucket)).split() == ["top.tar", "train/a.tar", "train/b/c.tar"]
    long = ok(shell("ls", "-l", bucket)).splitlines()
    assert long[0].split()[0] == "5"
    assert long[1].strip() == "train/"
    entries = [json.loads(line) for line in ok(shell("ls", "--json", bucket)).splitlines()]
    assert entries[0]["size"] == 5
    assert entries[1] == {"prefix": "train/"}


def test_ls_members_shows_the_samples_of_a_shard(shell: Shell, shards: Path) -> None:
    with tarfile.open(shards / SHARD) as archive:
        names = [name for name in archive.getnames() if "." in name]
    listed = ok(shell("ls", "--members", f"{IMAGENET}/{SHARD}")).splitlines()
    made = [f"{line.split()[0]}.{field}" for line in listed for field in line.split()[1:]]
    assert made == names
    first = json.loads(ok(shell("ls", "--members", "--json", f"{IMAGENET}/{SHARD}")).splitlines()[0])
    assert first["ordinal"] == 0
    assert set(first["fields"]) == {"jpg", "cls"}


def test_get_takes_one_member_of_a_shard(shell: Shell, shards: Path, tmp_path: Path, client: Client) -> None:
    with tarfile.open(shards / SHARD) as archive:
        info = next(info for info in reversed(archive.getmembers()) if info.isreg())
        file = archive.extractfile(info)
        assert file is not None
        expected = file.read()
    uri, name = f"{IMAGENET}/{SHARD}", info.name.rpartition("/")[2]
    ok(shell("get", uri, "--member", info.name))
    assert (tmp_path / name).read_bytes() == expected
    ok(shell("get", client.object(uri).member(info.name).url(), "by-url"))
    assert (tmp_path / "by-url").read_bytes() == expected
    ok(shell("get", uri, "part", "--member", info.name, "--range", "1-3"))
    assert (tmp_path / "part").read_bytes() == expected[1:4]
    status, _, said = shell("get", uri, "--member", "none")
    assert status == 1
    assert "ls --members" in said
    for wrong in (("-r", uri), ("--transform", "t@0123456789ab", uri), (f"{IMAGENET}/{{a,b}}.tar",)):
        assert shell("get", *wrong, "--member", info.name)[0] == 2, wrong
    assert not list(tmp_path.rglob("*.part"))


def test_get_takes_many_members_of_a_shard_as_a_shard(shell: Shell, shards: Path, tmp_path: Path) -> None:
    uri = f"{IMAGENET}/{SHARD}"
    with tarfile.open(shards / SHARD) as archive:
        files = {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}  # type: ignore[union-attr]
    names = sorted(files)[:40:3]
    (tmp_path / "names").write_text("\n".join(names) + "\n\n")
    ok(shell("get", uri, "few.tar", "--members", "names"))
    with tarfile.open(tmp_path / "few.tar") as archive:
        assert [(info.name, archive.extractfile(info).read()) for info in archive] == [  # type: ignore[union-attr]
            (name, files[name]) for name in names
        ]
    (tmp_path / "wrong").write_text(f"{names[0]}\nnone\n")
    status, _, said = shell("get", uri, "none.tar", "--members", "wrong")
    assert status == 1
    assert "'none'" in said
    for wrong in ((uri,), (uri, "x", "--member", names[0]), (uri, "x", "--range", "0-1"), ("-r", uri, "x")):
        assert shell("get", *wrong, "--members", "names")[0] == 2, wrong
    assert shell("get", uri, "x", "--members", "no such file")[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.tar", "names", "wrong"]


def test_get_writes_the_file_under_its_name_or_the_one_given(shell: Shell, shards: Path, tmp_path: Path) -> None:
    expected = (shards / SHARD).read_bytes()
    ok(shell("get", f"gcp://sharded-imagenet/{SHARD}"))
    ok(shell("get", f"{IMAGENET}/{SHARD}", "other.tar"))
    ok(shell("get", f"{IMAGENET}/{SHARD}", "new/"))
    for path in (tmp_path / SHARD, tmp_path / "other.tar", tmp_path / "new" / SHARD):
        assert path.read_bytes() == expected
    assert not list(tmp_path.rglob("*.part"))


def test_get_takes_a_node_url_and_a_range(shell: Shell, client: Client, shards: Path, tmp_path: Path) -> None:
    url = client.object_url(IMAGENET, SHARD)
    ok(shell("get", url, "--range", "10-19", "ten"))
    assert (tmp_path / "ten").read_bytes() == (shards / SHARD).read_bytes()[10:20]
    ok(shell("get", url, "--range", "-5", "tail"))
    assert (tmp_path / "tail").read_bytes() == (shards / SHARD).read_bytes()[-5:]


def test_get_of_braces_a_counter_and_a_prefix_fills_a_directory(shell: Shell, shards: Path, tmp_path: Path) -> None:
    expected = {path.name: path.read_bytes() for path in shards.glob("imagenet-val-*.tar")}
    for number, uri in enumerate(("imagenet-val-{000000..000005}.tar", "imagenet-val-%06d.tar")):
        ok(shell("get", f"{IMAGENET}/{uri}", f"d{number}"))
        assert {path.name: path.read_bytes() for path in (tmp_path / f"d{number}").iterdir()} == expected
    ok(shell("get", "-r", f"{IMAGENET}/imagenet-val", "r"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == expected


def test_get_continues_what_an_earlier_try_left(
    shell: Shell, client: Client, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier part is taken as it is (its name says which version it is of), and the checksum still judges."""
    with client.object(f"{IMAGENET}/{SHARD}").get() as reader:
        part = Download(reader, tmp_path / SHARD).part
    expected = (shards / SHARD).read_bytes()
    part.write_bytes(expected[:100_000])
    starts: list[int] = []
    skip_to = ObjectReader.skip_to

    def watched(reader: ObjectReader, position: int) -> None:
        starts.append(position)
        skip_to(reader, position)

    monkeypatch.setattr(ObjectReader, "skip_to", watched)
    ok(shell("get", f"{IMAGENET}/{SHARD}"))
    assert starts == [100_000]
    assert (tmp_path / SHARD).read_bytes() == expected
    assert not part.exists()


def test_put_of_a_file_a_directory_and_standard_input(
    shell: Shell, bucket: str, client: Client, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a").write_bytes(b"a")
    (tree / "sub" / "b").write_bytes(b"b" * 2_000_000)
    ok(shell("put", str(tree / "a"), f"{bucket}/x"))
    ok(shell("put", str(tree / "a"), f"{bucket}/dir/", "--meta", "Who=me", "--meta", "n=1"))
    ok(shell("put", str(tree), f"{bucket}/tree"))
    keys = [item.key for item in client.bucket(bucket).list()]
    assert keys == ["dir/a", "tree/a", "tree/sub/b", "x"]
    assert client.object(f"{bucket}/dir/a").head().user == {"who": "me", "n": "1"}
    assert client.object(f"{bucket}/tree/sub/b").read() == b"b" * 2_000_000
    status, _, err = shell("put", str(tree / "a"), f"{bucket}/x", "--if-absent")
    assert status == 1
    assert "Traceback" not in err


def test_cp_between_buckets_and_rm(shell: Shell, bucket: str, client: Client, shards: Path) -> None:
    ok(shell("cp", f"{IMAGENET}/{SHARD}", f"{bucket}/copies/"))
    assert client.object(f"{bucket}/copies/{SHARD}").read() == (shards / SHARD).read_bytes()
    ok(shell("cp", "-r", f"{IMAGENET}/imagenet-val", f"{bucket}/val"))
    assert len(list(client.bucket(bucket).list("val/"))) == 6
    ok(shell("rm", f"{bucket}/val/imagenet-val-{{000000..000002}}.tar"))
    ok(shell("rm", "-r", f"{bucket}/val/"))
    assert [item.key for item in client.bucket(bucket).list()] == [f"copies/{SHARD}"]


def test_cp_by_the_node_moves_no_byte_through_here(
    shell: Shell, bucket: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.object(f"{bucket}/in/a-1").put(b"one", meta={"k": "v"})
    client.object(f"{bucket}/in/a-2").put(b"second")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("bytes came to the client")

    monkeypatch.setattr(ObjectHandle, "get", refuse)
    monkeypatch.setattr(ObjectHandle, "put", refuse)
    ok(shell("cp", f"{bucket}/in/a-1", f"{bucket}/one"))
    ok(shell("cp", client.object(f"{bucket}/in/a-1").url(), f"{bucket}/url/"))
    ok(shell("cp", "-r", f"{bucket}/in/", f"{bucket}/below"))
    ok(shell("cp", f"{bucket}/{{in,in}}/a-{{1..2}}", f"{bucket}/braces/"))
    ok(shell("cp", f"{bucket}/in/a-%d", f"{bucket}/counted"))
    monkeypatch.undo()
    copies = [
        "below/a-1",
        "below/a-2",
        "braces/in/a-1",
        "braces/in/a-2",
        "counted/a-1",
        "counted/a-2",
        "one",
        "url/a-1",
    ]
    assert [item.key for item in client.bucket(bucket).list() if not item.key.startswith("in/")] == copies
    for key in copies:
        assert client.object(f"{bucket}/{key}").read() == (b"second" if key.endswith("2") else b"one")
    assert dict(client.object(f"{bucket}/one").head().user) == {"k": "v"}
    assert shell("cp", f"{bucket}/none", f"{bucket}/x")[0] == 1
    assert shell("cp", f"{bucket}/none-%d", f"{bucket}/x")[0] == 1


def test_cp_passes_what_is_large_or_a_member_through_here(
    shell: Shell, bucket: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.cli.transfer.BY_THE_NODE", 3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the node was asked to copy")

    monkeypatch.setattr(ObjectHandle, "copy_to", refuse)
    client.object(f"{bucket}/large").put(b"four", meta={"k": "v"})
    ok(shell("cp", f"{bucket}/large", f"{bucket}/copy"))
    assert (client.object(f"{bucket}/copy").read(), client.object(f"{bucket}/copy").head().user) == (
        b"four",
        {"k": "v"},
    )
    member = next(client.bucket(IMAGENET).object(SHARD).members())
    handle = client.bucket(IMAGENET).object(SHARD).member(member.name)
    ok(shell("cp", handle.url(), f"{bucket}/member"))
    assert client.object(f"{bucket}/member").read() == handle.read()


def test_mb_rb_and_stat(shell: Shell, client: Client) -> None:
    ok(shell("mb", "ais://short"))
    client.object("ais://short/a").put(b"123", meta={"k": "v"})
    facts = json.loads(ok(shell("stat", "--json", "ais://short/a")))
    assert (facts["size"], facts["meta"], facts["uri"]) == (3, {"k": "v"}, "ais://short/a")
    assert "etag:" in ok(shell("stat", "ais://short/a"))
    status, _, err = shell("rb", "ais://short")
    assert status == 1
    assert "ais://short" in err
    ok(shell("rb", "--force", "ais://short"))
    assert "ais://short" not in ok(shell("ls"))


def test_a_function_is_added_used_shown_and_removed(
    shell: Shell, function: Path, tmp_path: Path, client: Client
) -> None:
    uuid = ok(shell("transform", "add", f"{function}:shrink", "--name", "cli-shrink")).strip()
    assert uuid.startswith("cli-shrink@")
    assert uuid in ok(shell("transform", "ls"))
    uri = f"{IMAGENET}/{SHARD}"
    for number, name in enumerate(("cli-shrink", uuid)):
        ok(shell("get", uri, f"{number}.tar", "--transform", name, "--seed", "1", "--count", "4"))
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        assert len(archive.getnames()) == 8
    assert json.loads(ok(shell("transform", "show", "cli-shrink", "--json")))["transform"]["uuid"] == uuid
    assert "4 samples" in ok(shell("transform", "show", uuid)) or "8 samples" in ok(shell("transform", "show", uuid))
    ok(shell("transform", "rm", uuid))
    status, _, err = shell("get", uri, "--transform", uuid)
    assert status == 1
    assert err.count("\n") == 1


def test_try_shows_samples_before_and_after(shell: Shell, function: Path, tmp_path: Path) -> None:
    out = ok(
        shell("transform", "try", f"{function}:shrink", f"{IMAGENET}/{SHARD}", "--samples", "3", "--picture", "p.png")
    )
    assert out.count("->") == 6
    assert "3 samples in, 3 out" in out
    assert "offloading" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(
        ok(shell("transform", "try", f"{function}:shrink", f"{IMAGENET}/{SHARD}", "--samples", "2", "--json"))
    )
    assert report["samples_in"] == 2
    assert report["cpu_seconds_per_sample"] > 0


def test_a_failure_is_explained_recorded_and_replayed(shell: Shell, function: Path, client: Client) -> None:
    uri = f"{IMAGENET}/{SHARD}"
    ok(shell("transform", "add", f"{function}:fail_on_one", "--name", "unlucky"))
    status, _, err = shell("get", uri, "out.tar", "--transform", "unlucky", "--seed", "5")
    assert status == 1
    assert "unlucky" in err
    assert 'mine.py", line 13' in err
    assert "shardmill/" not in err
    assert not Path("out.tar").exists()
    (failure,) = client.transforms.errors("unlucky").failures[:1]
    assert failure.sample is not None
    assert err.partition("Traceback")[0].count(f"sample {failure.sample!r}") == 1
    assert ok(shell("transform", "errors", "unlucky")).count(f"sample {failure.sample!r}") == 1
    assert "ValueError" in ok(shell("transform", "errors", "unlucky", "-v"))
    status, out, err = shell("transform", "errors", "unlucki")
    assert (status, out) == (1, "")
    assert "no transform 'unlucki'; did you mean 'unlucky'?" in err
    status, _, err = shell("transform", "replay", "unlucky", uri, failure.sample)
    assert status == 1
    assert "seed=5" in err
    assert f"unlucky {failure.sample}" in err
    good = next(sample for sample in _keys(shell) if not sample.endswith("3"))
    assert ok(shell("transform", "replay", "unlucky", uri, good)).startswith(good)


def test_status_doctor_and_config(shell: Shell) -> None:
    assert IMAGENET in ok(shell("status"))
    assert json.loads(ok(shell("status", "--json")))["workers"] == 2
    examined = ok(shell("doctor"))
    assert re.search(r"clock +the node's is this one's, to the second", examined)
    assert re.search(r"isolation file_system_scope +not active: this version has none", examined)
    assert {json.loads(line)["verdict"] for line in ok(shell("doctor", "--json")).splitlines()} <= {"ok", "note"}
    assert json.loads(ok(shell("config")))["version"] == __version__


def test_a_read_only_bucket_says_once_how_to_write(shell: Shell, function: Path) -> None:
    status, _, err = shell("put", str(function), IMAGENET)
    assert status == 1
    assert err.count("dir-rw:PATH") == 1


def test_the_newest_version_of_a_name_gives_its_uuid(client: Client, function: Path) -> None:
    uuid = client.transforms.add(f"{function}:shrink", "newest").uuid
    assert client.transforms.get("newest").uuid == uuid


def test_an_environment_lists_few_of_its_transforms(shell: Shell, function: Path, client: Client) -> None:
    for name in ("few-a", "few-b", "few-c"):
        client.transforms.add(f"{function}:shrink", name)
    line = next(line for line in ok(shell("transform", "env", "ls")).splitlines() if line.startswith("default "))
    assert re.search(r" few-c@\w{12}, few-b@\w{12} and \d+ more ", line)


def test_a_closed_pipe_ends_like_any_filter(node: RunningNode, shards: Path, tmp_path: Path) -> None:
    """Ten lines, nothing on standard error, status 0 or 141."""
    command = f"set -o pipefail; {sys.executable} -m shardmill.cli get gcp://sharded-imagenet/{SHARD} - | tar -tvf - | head -n 10"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "SHARDMILL_ENDPOINT": node.endpoint},
        check=False,
    )
    assert (len(done.stdout.splitlines()), done.stderr) == (10, "")
    assert done.returncode in (0, 141)
    command = f"{sys.executable} -m shardmill.cli get {IMAGENET}/{SHARD} - | head -c 100; echo ${{PIPESTATUS[0]}}"
    cut = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={**os.environ, "SHARDMILL_ENDPOINT": node.endpoint},
        check=False,
    )
    assert cut.stdout == (shards / SHARD).read_bytes()[:100] + b"141\n"
    assert cut.stderr == b""


def test_standard_input_and_output_carry_bytes(node: RunningNode, bucket: str, client: Client) -> None:
    body = os.urandom(3_000_000)
    environ = {**os.environ, "SHARDMILL_ENDPOINT": node.endpoint}
    command = [sys.executable, "-m", "shardmill.cli"]
    subprocess.run([*command, "put", "-", f"{bucket}/stdin"], input=body, env=environ, check=True, capture_output=True)
    assert client.object(f"{bucket}/stdin").read() == body
    got = subprocess.run([*command, "get", f"{bucket}/stdin", "-"], env=environ, check=True, capture_output=True)
    assert (got.stdout, got.stderr) == (body, b"")


def _keys(shell: Shell) -> list[str]:
    return [line.split()[0] for line in ok(shell("ls", "--members", f"{IMAGENET}/{SHARD}")).splitlines()]


def test_a_local_shard_gets_a_private_node(shell: Shell, function: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "local.tar", "w") as archive:
        member = tarfile.TarInfo("0.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    function.write_text("def louder(sample):\n    sample['txt'] = sample['txt'].upper()\n    return sample\n")
    out = ok(shell("transform", "try", f"{function}:louder", "local.tar"))
    assert "HELLO" in out
