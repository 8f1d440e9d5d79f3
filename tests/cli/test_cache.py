"""What commands tell of a bucket with a store behind it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill.cli.main import run
from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node
from tests.server.readers import wait_until
from tests.storage.cache.support import MIB, make
from tests.storage.cache.web import Served, Web, web

FAR = "gs://far"
Shell = Callable[..., tuple[str, str]]


@pytest.fixture
def origin() -> Iterator[Web]:
    with web() as found:
        found.objects["shards/train/a.tar"] = Served(make(3 * MIB), "v1")
        found.objects["shards/train/b.tar"] = Served(make(10 * MIB), "v2")
        yield found


@pytest.fixture
def near(origin: Web, tmp_path: Path) -> Iterator[RunningNode]:
    """A node before the origin, which has read one object and a part of another."""
    flags = ("--bucket", f"{FAR}={origin.url}/shards", "--bucket", "ais://pool", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data") as node:
        with Client(node.endpoint) as client:
            bucket = client.bucket(FAR)
            bucket.object("train/a.tar").read()
            bucket.object("train/b.tar").get_range(2 * MIB, 2 * MIB + 10)
            client.object("ais://pool/c").put(b"c")
            wait_until(lambda: not client.cache().buckets[0].filling, "all has arrived")
        yield node


@pytest.fixture
def shell(near: RunningNode, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command; gives standard output and standard error."""
    monkeypatch.setenv("SHARDMILL_ENDPOINT", near.endpoint)

    def execute(*arguments: str, status: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        assert run(arguments) == status
        captured = capfd.readouterr()
        return captured.out, captured.err

    return execute


def test_status_ls_and_stat_tell_what_is_cached(shell: Shell) -> None:
    out, _ = shell("status")
    (row,) = (line.split() for line in out.splitlines() if line.startswith(FAR) and "read-only" not in line)
    assert row[:6] == [FAR, "2", "4.0", "MiB", "0", "2"]
    assert json.loads(shell("status", "--json")[0])["cache"]["buckets"][0]["fetched"] == 4 * MIB
    out, said = shell("ls", "--cached", FAR)
    assert [line.split()[:3] for line in out.splitlines()] == [["3.0", "MiB", "100%"], ["1.0", "MiB", "10%"]]
    assert [line.split()[-1] for line in out.splitlines()] == ["train/a.tar", "train/b.tar"]
    assert said == "2 objects, 4.0 MiB on the node's disk\n"
    lines = shell("ls", "--cached", f"{FAR}/train/b", "--json")[0].splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["train/b.tar"]
    out, _ = shell("stat", f"{FAR}/train/b.tar")
    assert "cached:    1.0 MiB of 10.0 MiB\n" in out
    assert f"ranges:    {2 * MIB}-{3 * MIB - 1}\n" in out
    assert "version:   etag:v2\n" in out
    assert re.search(r"^asked: +\d+s ago$", out, re.MULTILINE)
    facts = json.loads(shell("stat", f"{FAR}/train/a.tar", "--json")[0])
    assert (facts["cached"]["cached"], facts["ranges"]) == (3 * MIB, [[0, 3 * MIB]])
    assert "cached" not in shell("stat", "ais://pool/c")[0]


def test_ls_cached_without_a_store_behind_says_so(shell: Shell) -> None:
    assert "no store behind it" in shell("ls", "--cached", "ais://pool", status=2)[1]
    assert "which bucket" in shell("ls", "--cached", status=2)[1]


def test_a_dry_run_tells_what_would_be_fetched_and_evicted(shell: Shell, near: RunningNode) -> None:
    out, err = shell("prefetch", f"{FAR}/train/{{a,b}}.tar", "--dry-run")
    assert out.splitlines() == ["train/a.tar  (done)", "train/b.tar"]
    assert "would fetch 1 of 2 objects; 9.0 MiB" in err
    out, err = shell("evict", "-r", f"{FAR}/train/", "--dry-run")
    assert out.splitlines() == ["train/a.tar", "train/b.tar"]
    assert "would evict 2 of 2 objects; 4.0 MiB" in err
    out, _ = shell("evict", f"{FAR}/train/a.tar", "--dry-run", "--json")
    assert (json.loads(out)["total"], json.loads(out)["left"]) == (1, 3 * MIB)
    with Client(near.endpoint) as client:
        assert client.jobs.list() == []
        assert [found.cached for found in client.bucket(FAR).cached()] == [3 * MIB, MIB]
