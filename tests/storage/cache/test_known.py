"""Listings of a bucket whose store comes and goes: what is known of it is shown to people, marked, and to no job."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill.cli.main import run
from shardmill.client import Client
from shardmill.core.api import ObjectPage
from shardmill.core.errors import AccessDenied, BackendUnavailable, NotFound
from shardmill.testing.faults import Fault, FaultServer, fault_server
from shardmill.testing.node import RunningNode, running_node
from tests.etl.over_http import Served as Asking
from tests.etl.support import IDENTITY
from tests.server.readers import wait_until
from tests.storage.cache.support import MIB, make
from tests.storage.cache.test_faults import CONFIG

S3 = "s3://bucket"
KEYS = ["train/a/0.tar", "train/a/1.tar", "train/b/0.tar", "train/é.tar", "val.tar"]
READ = ["train/a/1.tar", "train/b/0.tar", "train/é.tar"]
AWAY = {
    "refused": [Fault("status", status=500)],
    "busy": [Fault("status", status=503)],
    "silent": [Fault("silent")],
    "cut": [Fault("cut", at=10)],
}
Shell = Callable[..., tuple[str, str]]


@pytest.fixture
def store() -> Iterator[FaultServer]:
    with fault_server() as found:
        for key in KEYS:
            found.put(f"/bucket/{key}", make(3 * MIB))
        yield found


def start(store: FaultServer, directory: Path, listing: str) -> Iterator[RunningNode]:
    text = CONFIG.format(endpoint=store.endpoint).replace('listing = "0s"', f'listing = "{listing}"')
    text = text.replace('uri = "s3://bucket"', 'uri = "s3://bucket"\nwritable = true')
    # Nobody listens there.
    text += """
[[bucket]]
uri = "s3://gone"
endpoint = "http://127.0.0.1:1"
access_key_id = "name"
secret_access_key = "secret"
"""
    (directory / "node.toml").write_text(text)
    flags = ("--config", directory / "node.toml", "--bucket", "ais://pool", "--workers", "1")
    with running_node(*flags, data=directory / "data") as found:
        yield found


@pytest.fixture
def node(store: FaultServer, tmp_path: Path) -> Iterator[RunningNode]:
    """One that believes a listing for no time at all."""
    yield from start(store, tmp_path, "0s")


@pytest.fixture
def trusting(store: FaultServer, tmp_path: Path) -> Iterator[RunningNode]:
    """One that believes a listing for an hour."""
    yield from start(store, tmp_path, "1h")


@pytest.fixture
def client(node: RunningNode) -> Iterator[Client]:
    with Client(node.endpoint) as found:
        yield found


@pytest.fixture
def shell(node: RunningNode, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command; gives standard output and standard error."""
    monkeypatch.setenv("SHARDMILL_ENDPOINT", node.endpoint)

    def execute(*arguments: str, status: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        assert run(arguments) == status
        captured = capfd.readouterr()
        return captured.out, captured.err

    return execute


def read_some(client: Client, bucket: str = S3) -> None:
    """All of one object, and the beginning of two."""
    client.object(f"{bucket}/{READ[0]}").read()
    for key in READ[1:]:
        client.object(f"{bucket}/{key}").get_range(0, 10)
    wait_until(lambda: not any(found.filling for found in client.cache().buckets), "all has arrived")


def keys(page: ObjectPage) -> list[str]:
    return [item.key for item in page.objects]


def test_what_is_written_and_deleted_here_shows_at_once(trusting: RunningNode, store: FaultServer) -> None:
    with Client(trusting.endpoint) as client:
        bucket = client.bucket(S3)

        def sizes() -> dict[str, int]:
            return {item.key: item.size for item in bucket.list("train/a/")}

        before = sizes()
        store.put("/bucket/train/a/2.tar", b"by others")
        assert sizes() == before, "the page is not believed for its time, so this shows nothing"
        bucket.object("train/a/3.tar").put(b"by this node")
        assert sizes() == {**before, "train/a/2.tar": 9, "train/a/3.tar": 12}
        bucket.object("train/a/3.tar").put(b"again")
        assert sizes()["train/a/3.tar"] == 5
        bucket.object("train/a/3.tar").delete()
        store.remove("/bucket/train/a/3.tar")  # which the store of the test does not do by itself
        assert sizes() == {**before, "train/a/2.tar": 9}


def test_entries_tell_how_much_is_cached(client: Client, store: FaultServer) -> None:
    client.object("ais://pool/c").put(b"c")
    bucket = client.bucket(S3)
    assert {item.cached for item in bucket.list()} == {0}
    read_some(client)
    there = {item.key: item.cached for item in bucket.list()}
    assert there == {**dict.fromkeys(KEYS, 0), READ[0]: 3 * MIB, READ[1]: MIB, READ[2]: MIB}
    assert [item.cached for item in client.bucket("ais://pool").list()] == [None]
    # What is there of another version is of no use to who reads it next.
    store.put(f"/bucket/{READ[0]}", make(3 * MIB, seed=1))
    assert {item.key: item.cached for item in bucket.list()}[READ[0]] == 0


@pytest.mark.parametrize("provider", ["s3", "gs", "az"])
def test_while_the_store_is_away_the_page_of_before_is_shown(client: Client, store: FaultServer, provider: str) -> None:
    bucket = client.bucket(f"{provider}://bucket")
    (before,) = bucket.pages("train/", "/", stale=True)
    assert (before.stale, before.complete, before.reason) == (False, True, None)
    assert (keys(before), before.prefixes) == (["train/é.tar"], ["train/a/", "train/b/"])
    for fault, given in AWAY.items():
        store.misbehave("*", *given)
        (now,) = bucket.pages("train/", "/", stale=True)
        assert (now.stale, now.complete, bool(now.reason)) == (True, True, True), fault
        assert (now.objects, now.prefixes) == (before.objects, before.prefixes), fault
        store.misbehave("*")
        (after,) = bucket.pages("train/", "/", stale=True)
        assert after == before, fault


def test_a_store_that_refuses_is_no_store_that_is_away(client: Client, store: FaultServer) -> None:
    bucket = client.bucket(S3)
    list(bucket.pages(stale=True))
    for status, error in ((401, AccessDenied), (403, AccessDenied), (404, NotFound)):
        store.misbehave("*", Fault("status", status=status))
        with pytest.raises(error):
            list(bucket.pages(stale=True))


def test_without_a_page_of_before_what_is_cached_is_shown_as_a_part(client: Client, store: FaultServer) -> None:
    read_some(client)
    store.misbehave("*", Fault("status", status=500))
    bucket = client.bucket(S3)
    (page,) = bucket.pages(stale=True)
    assert (page.stale, page.complete) == (True, False)
    assert [(item.key, item.cached) for item in page.objects] == [(READ[0], 3 * MIB), (READ[1], MIB), (READ[2], MIB)]
    (page,) = bucket.pages("train/", "/", stale=True)
    assert (keys(page), page.prefixes, page.complete) == ([READ[2]], ["train/a/", "train/b/"], False)
    (page,) = bucket.pages("train/b", stale=True)
    assert keys(page) == [READ[1]]
    pages = list(bucket.pages(limit=1, stale=True))
    assert [keys(page) for page in pages] == [[READ[0]], [READ[1]], [READ[2]]]
    assert not any(page.complete for page in pages)
    pages = list(bucket.pages("train/", "/", limit=1, stale=True))
    assert [(keys(page), page.prefixes) for page in pages] == [
        ([], ["train/a/"]),
        ([], ["train/b/"]),
        ([READ[2]], []),
    ]
    (page,) = bucket.pages(after=READ[0], stale=True)
    assert keys(page) == READ[1:]
    (page,) = client.bucket("s3://gone").pages(stale=True)
    assert (keys(page), page.stale, page.complete) == ([], True, False)


def test_a_page_from_before_a_change_is_not_shown_again(client: Client, store: FaultServer) -> None:
    bucket = client.bucket(S3)
    list(bucket.pages(stale=True))
    read_some(client)
    bucket.object("val.tar").delete()
    store.misbehave("*", Fault("status", status=500))
    (page,) = bucket.pages(stale=True)
    assert (keys(page), page.complete) == (READ, False)


def test_no_job_and_no_list_takes_what_is_known_for_the_bucket(
    client: Client, node: RunningNode, store: FaultServer
) -> None:
    transform = Asking(node).register(IDENTITY, decoder=None).uuid
    client.object("ais://pool/c").put(b"c")
    bucket = client.bucket(S3)
    assert client.jobs.plan(S3, "ais://pool", transform, prefix="train/").total == 4
    assert [item.key for item in bucket.list("train/")] == KEYS[:4]
    read_some(client)
    store.misbehave("*", Fault("status", status=500))
    assert list(bucket.pages("train/", stale=True)), "what is known is there to be taken"
    with pytest.raises(BackendUnavailable):
        list(bucket.list("train/"))
    with pytest.raises(BackendUnavailable):
        client.jobs.plan_prefetch(S3, prefix="train/")
    with pytest.raises(BackendUnavailable):
        client.jobs.prefetch(S3, prefix="train/")
    with pytest.raises(BackendUnavailable):
        client.jobs.plan(S3, "ais://pool", transform, prefix="train/")
    with pytest.raises(BackendUnavailable):
        client.jobs.transform(S3, "ais://pool", transform, template="train/a/%01d.tar")
    assert client.jobs.list() == []


def test_ls_says_what_it_shows(shell: Shell, client: Client, store: FaultServer) -> None:
    read_some(client)
    out, said = shell("ls", "-l", "-r", S3)
    assert [line.split()[-2:] for line in out.splitlines()] == [
        ["-", KEYS[0]],
        ["cached", KEYS[1]],
        ["33%", KEYS[2]],
        ["33%", KEYS[3]],
        ["-", KEYS[4]],
    ]
    assert said == ""
    store.misbehave("*", Fault("status", status=500))
    again, said = shell("ls", "-l", "-r", S3, status=1)
    assert again == out
    assert "out of reach" in said
    assert "may have changed" in said
    out, said = shell("ls", f"{S3}/train/", status=1)
    assert out.splitlines() == ["train/a/", "train/b/", READ[2]]
    assert "NOT the whole bucket" in said
    lines = shell("ls", "-r", "--json", f"{S3}/train/a/", status=1)[0].splitlines()
    assert [json.loads(line)["cached"] for line in lines] == [3 * MIB]
    # What works on objects takes the store's word only.
    assert "NOT" not in shell("rm", "-r", f"{S3}/train/", status=1)[1]
    assert sorted(store.objects()) == sorted(f"/bucket/{key}" for key in KEYS)
