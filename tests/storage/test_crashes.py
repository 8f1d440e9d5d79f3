"""Nodes killed at any moment while many clients write: what was acknowledged is there, nothing is half there."""

import contextlib
import http.client
import json
import random
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import xxhash

from shardmill.core.errors import ObjectNotFound
from shardmill.core.refs import quote_key
from shardmill.testing.node import RunningNode, running_node
from shardmill.testing.stores import keys_on, page_of, read
from tests.storage.support import open_pool, run, temporary_files

ROUNDS = 8
WRITERS = 4
KEYS_EACH = 6
CONTESTED = ("contested/one", "contested/two")
SIZES = (0, 1, 100, 4096, 100_000, (1 << 20) + 1, 3 << 20)
BUCKETS = ("ais/pool", "gs/files")
SECONDS = 60.0

Body = bytes | None
"""What a GET gives; None: 404."""


class Connection:
    """One connection of one client; every call is one request, nothing is tried again."""

    def __init__(self, endpoint: str) -> None:
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(endpoint).netloc, timeout=SECONDS)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None, *, chunked: bool = False) -> "Answer":
        pieces: object = body
        if chunked and body is not None:
            pieces = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
        self._connection.request(method, path, body=pieces, encode_chunked=chunked)  # type: ignore[arg-type]  # an iterable of bytes
        response = self._connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Ledger:
    """What each object may be: by path, the bodies that a GET may give."""

    possible: dict[str, set[Body]] = field(default_factory=dict)
    acknowledged: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, path: str, body: Body) -> None:
        with self.changed:
            self.possible.setdefault(path, {None}).add(body)

    def acknowledge(self, path: str, body: Body, *, is_own: bool) -> None:
        with self.changed:
            if is_own:
                self.possible[path] = {body}
            self.acknowledged += 1
            self.changed.notify_all()

    def wait_acknowledged(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.acknowledged >= count, SECONDS)


def write(endpoint: str, ledger: Ledger, number: int, chance: random.Random) -> None:
    """Put, replace and delete until the node is gone. Each writer has keys of its own, and all share some."""
    own = [f"/o/{bucket}/w{number}/{key}" for bucket in BUCKETS for key in range(KEYS_EACH)]
    shared = [f"/o/{bucket}/{key}" for bucket in BUCKETS for key in CONTESTED]
    with Connection(endpoint) as connection, contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            path = chance.choice(own) if chance.random() < 0.85 else chance.choice(shared)
            is_own = path in own
            if chance.random() < 0.2:
                ledger.begin(path, None)
                answer = connection.ask("DELETE", path)
                assert answer.status in (204, 404), answer
                ledger.acknowledge(path, None, is_own=is_own)
                continue
            body = chance.randbytes(chance.choice(SIZES))
            ledger.begin(path, body)
            answer = connection.ask("PUT", path, body, chunked=chance.random() < 0.2)
            assert answer.status in (200, 201), answer
            assert answer.headers["shardmill-checksum"] == f"xxh3:{xxhash.xxh3_128_hexdigest(body)}"
            ledger.acknowledge(path, body, is_own=is_own)


def check(node: RunningNode, ledger: Ledger) -> None:
    """Every object is one of those it may be, and every way to see it says the same; then it can only be that one."""
    with Connection(node.endpoint) as connection:
        found: dict[str, Answer] = {}
        for path, possible in ledger.possible.items():
            answer = connection.ask("GET", path)
            assert answer.status in (200, 404), (path, answer)
            body = answer.body if answer.status == 200 else None
            assert body in possible, f"{path}: {len(body or b'')} bytes that nobody put last"
            head = connection.ask("HEAD", path)
            assert head.status == answer.status
            if body is not None:
                assert int(answer.headers["content-length"]) == len(body) == int(head.headers["content-length"])
                assert head.headers["etag"] == answer.headers["etag"]
                if path.startswith("/o/ais/"):
                    assert answer.headers["shardmill-checksum"] == f"xxh3:{xxhash.xxh3_128_hexdigest(body)}"
                found[path] = answer
            ledger.possible[path] = {body}
        for bucket in BUCKETS:
            provider, name = bucket.split("/")
            listed = {
                f"/o/{bucket}/{quote_key(info['key'])}": info for info in listing(connection, f"{provider}://{name}")
            }
            assert set(listed) == {path for path in found if path.startswith(f"/o/{bucket}/")}
            for path, info in listed.items():
                assert info["size"] == len(found[path].body)
                assert f'"{info["etag"]}"' == found[path].headers["etag"]


def listing(connection: Connection, bucket: str) -> Iterator[dict[str, Any]]:
    """The whole listing; asked for again while it is being rebuilt."""
    after: str | None = ""
    deadline = threading.Event()
    while after is not None:
        query = urllib.parse.urlencode({"bucket": bucket, "after": after, "limit": 5})
        answer = connection.ask("GET", f"/api/objects?{query}")
        if answer.status == 503:
            assert "retry-after" in answer.headers
            deadline.wait(0.05)
            continue
        assert answer.status == 200, answer
        page = json.loads(answer.body)
        yield from page["objects"]
        after = page["next"]


def leftovers(data: Path, files: Path) -> list[Path]:
    return [*data.glob("pool/*/tmp/*"), *files.glob("**/.shardmill-*"), *data.glob("*.new"), *data.glob("index/*.new")]


@contextlib.contextmanager
def node_on(data: Path, files: Path) -> Iterator[RunningNode]:
    with running_node("--bucket", "ais://pool", "--bucket", f"gs://files=dir-rw:{files}", data=data) as node:
        yield node


@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    data, files = tmp_path / "data", tmp_path / "files"
    files.mkdir()
    chance = random.Random()  # a new history each time; what fails is told with its keys
    ledger = Ledger()
    for number in range(ROUNDS):
        if number % 3 == 2:
            # A start that is killed too, amid whatever it completes.
            with node_on(data, files) as node:
                node.kill()
        if number % 4 == 3:
            shutil.rmtree(data / "index")
        with node_on(data, files) as node, ThreadPoolExecutor(WRITERS) as writers:
            assert leftovers(data, files) == []
            check(node, ledger)
            ledger.acknowledged = 0
            writing = [
                writers.submit(write, node.endpoint, ledger, writer, random.Random(chance.random()))
                for writer in range(WRITERS)
            ]
            try:
                ledger.wait_acknowledged(chance.randrange(1, 80))
            finally:
                node.kill()
            for one in writing:
                one.result(SECONDS)
    with node_on(data, files) as node:
        check(node, ledger)
        assert node.terminate() == 0
    assert leftovers(data, files) == []
    with node_on(data, files) as node:
        check(node, ledger)


def test_objects_are_read_while_a_lost_index_is_built_and_the_listing_is_never_short(tmp_path: Path) -> None:
    data, files = tmp_path / "data", tmp_path / "files"
    files.mkdir()
    paths = [f"/o/ais/pool/key/{number:05d}" for number in range(600)]
    with node_on(data, files) as node, Connection(node.endpoint) as connection:
        for path in paths:
            assert connection.ask("PUT", path, path.encode()).status == 201
        node.kill()
    shutil.rmtree(data / "index")
    with node_on(data, files) as node, Connection(node.endpoint) as connection:
        assert connection.ask("GET", paths[-1]).body == paths[-1].encode()
        assert connection.ask("PUT", "/o/ais/pool/key/99999", b"new").status == 201
        assert connection.ask("DELETE", paths[0]).status == 204
        found = [f"/o/ais/pool/{info['key']}" for info in listing(connection, "ais://pool")]
        assert found == [*paths[1:], "/o/ais/pool/key/99999"]
        node.kill()
    with node_on(data, files) as node, Connection(node.endpoint) as connection:
        assert len(list(listing(connection, "ais://pool"))) == 600


@pytest.mark.timeout(300)
def test_thousands_of_small_objects_survive_a_kill(tmp_path: Path) -> None:
    """Every acknowledged one reads back, its checksum verified."""
    count, data, files = 2000, tmp_path / "data", tmp_path / "files"
    files.mkdir()
    acknowledged: dict[str, str] = {}

    def store(endpoint: str, numbers: range) -> None:
        with Connection(endpoint) as connection, contextlib.suppress(OSError, http.client.HTTPException):
            for number in numbers:
                path, body = f"/o/ais/pool/small/{number:05d}", random.Random(number).randbytes(4096)
                answer = connection.ask("PUT", path, body)
                assert answer.status == 201, answer
                acknowledged[path] = xxhash.xxh3_128_hexdigest(body)

    with node_on(data, files) as node, ThreadPoolExecutor(WRITERS) as writers:
        for one in [writers.submit(store, node.endpoint, range(first, count, WRITERS)) for first in range(WRITERS)]:
            one.result(SECONDS * 4)
        assert len(acknowledged) == count
        more = [
            writers.submit(store, node.endpoint, range(count + first, 2 * count, WRITERS)) for first in range(WRITERS)
        ]
        node.kill()
        for one in more:
            one.result(SECONDS)
    with node_on(data, files) as node, Connection(node.endpoint) as connection:
        for path, checksum in acknowledged.items():
            answer = connection.ask("GET", path)
            assert answer.status == 200, (path, answer)
            assert xxhash.xxh3_128_hexdigest(answer.body) == checksum
            assert answer.headers["shardmill-checksum"] == f"xxh3:{checksum}"
        listed = [f"/o/ais/pool/{info['key']}" for info in listing_of(connection)]
        assert listed == sorted(listed)
        # At most what was on its way is there without its answer.
        assert set(acknowledged) <= set(listed)
        assert len(listed) <= len(acknowledged) + WRITERS


def listing_of(connection: Connection) -> list[dict[str, Any]]:
    """Pages of a thousand."""
    found: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        query = urllib.parse.urlencode({"bucket": "ais://pool", "after": after})
        page = json.loads(connection.ask("GET", f"/api/objects?{query}").body)
        found += page["objects"]
        after = page["next"]
    return found


STEP = """
import asyncio, os, sys
from pathlib import Path
from shardmill.core.refs import Bucket
from shardmill.storage import buckets, groups, index, journal, log, pool, pool_upload
from shardmill.testing.stores import NOTHING, put

change, step, data = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def end(*_, **__):
    os._exit(7)

STEPS = {
    "noted": (pool.PoolStore, "_commit"),
    "written": (pool_upload.PoolUpload, "replace"),
    "kept": (pool_upload.os, "rename"),
    "renamed": (pool, "sync_directory"),
    "durable": (index.Index, "put"),
    "queued": (index.Index, "_commit"),
    "unlinking": (pool.PoolStore, "_unlink"),
    "unlinked": (index.Index, "remove"),
    "indexed": (journal.Journal, "done"),
    "small judged": (groups.Groups, "_judge"),
    "small written": (log.LogFile, "append"),
    "small logged": (groups.Groups, "_ended"),
    "small begun": (log, "write_all"),
    "small made": (index.Index, "put_now"),
    "small indexed": (groups, "sync_file_system"),
    "small synced": (log.LogFile, "clear"),
    "logged unlinking": (pool.PoolStore, "remove_file"),
    "logged unlinked": (log.LogFile, "append"),
    "logged forgotten": (index.Index, "remove"),
}
SIZE = 2000 if step.startswith("small") else 40_000

async def main():
    definition = buckets.BucketDefinition(Bucket.of("ais", "pool"), None, writable=True)
    async with buckets.Buckets.open(data, [definition], threads=2, durability="power") as opened:
        store = opened.writable(definition.bucket)
        await put(store, "other", b"other")
        if change != "new":
            await put(store, "key", b"old" * 1000)
        if "small" not in step and "logged" not in step:
            await store._groups().make_files()
        # The folder of the key is durable by now, so that only the change itself passes the steps.
        store._made.update(store.path(key).parent for key in ("key", "other"))
        store.path("key").parent.mkdir(exist_ok=True)
        owner, name = STEPS[step]
        setattr(owner, name, end)
        if change == "delete":
            await store.delete("key", conditions=NOTHING)
        else:
            await put(store, "key", b"new" * SIZE)

asyncio.run(main())
"""
PUT_STEPS = ("noted", "written", "kept", "renamed", "durable", "queued", "indexed")
SMALL_STEPS = ("judged", "written", "logged", "begun", "made", "indexed", "synced")
LOGGED_STEPS = ("logged unlinking", "logged unlinked", "logged forgotten")
DELETE_STEPS = ("unlinking", "unlinked", "queued", "indexed")


@pytest.mark.parametrize(
    ("change", "step"),
    [
        *[("new", step) for step in PUT_STEPS],
        *[("replace", step) for step in PUT_STEPS],
        *[("new", f"small {step}") for step in SMALL_STEPS],
        *[("replace", f"small {step}") for step in SMALL_STEPS],
        *[("delete", step) for step in (*DELETE_STEPS, *LOGGED_STEPS)],
    ],
)
def test_a_change_is_made_or_not_wherever_the_process_ends(tmp_path: Path, change: str, step: str) -> None:
    ended = subprocess.run([sys.executable, "-c", STEP, change, step, str(tmp_path)], timeout=100)
    assert ended.returncode == 7
    # A small one is made once it is logged: the next start gives it its file.
    begun = ("noted", "written", "kept", "unlinking", "small judged", "small written", *LOGGED_STEPS[:2])
    is_made = step not in begun
    body = b"new" * (2000 if step.startswith("small") else 40_000)
    old, new = {
        "new": (None, body),
        "replace": (b"old" * 1000, body),
        "delete": (b"old" * 1000, None),
    }[change]
    expected = new if is_made else old

    async def story() -> None:
        for _ in range(2):
            async with open_pool(tmp_path) as store:
                assert store._index().is_complete
                assert temporary_files(tmp_path) == []
                listed = (await page_of(store)).objects
                assert keys_on(await page_of(store)) == (["key"] if expected is not None else []) + ["other"]
                for meta in listed:
                    assert await store.head(meta.key) == meta
                if expected is None:
                    with pytest.raises(ObjectNotFound):
                        await store.open("key")
                else:
                    assert (await read(store, "key"))[0] == expected
                assert (await read(store, "other"))[0] == b"other"

    run(story())
