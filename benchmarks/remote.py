"""Buckets of stores: what is not on the disk yet beside the same client straight from the store, and what is.

Stores are a server that is limited, nginx, and an emulator of S3, each with the same objects; between two readings the
node lets them all go. Where an emulator or nginx is not given, the rows that need it are left out.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import obstore
from obstore.store import S3Store

from benchmarks import nginx as nginxes
from benchmarks.processes import cpu_of, spoken
from benchmarks.serving import first_byte
from benchmarks.table import Row, Samples, ratio_of, wait_quiet
from benchmarks.transforms import HERE
from shardmill import Client
from shardmill.testing import emulators
from shardmill.testing.node import RunningNode, running_node

OBJECTS = 4
SIZE = 64_000_000  # bytes of each, about
MEMBER = 128 << 10  # bytes of a picture in it, with its header
LIMIT = 200_000_000  # bytes a second of the limited store
WORKERS = 2
FIRST_BYTES = 3  # a round

_KEYS = 'access_key_id = "name"\nsecret_access_key = "secret"\n'


@dataclass
class Store:
    """Where the objects come from, with what was measured of it."""

    name: str
    bucket: str
    """Its URI at the node."""
    settings: str
    """Of the bucket, in TOML."""
    direct: Callable[[], float]
    """Reads all objects from it without a node; seconds."""
    at_least: float
    straight: Samples = field(default_factory=Samples)
    """Megabytes a second, without the node."""
    cold: Samples = field(default_factory=Samples)
    """The same through the node, which has none of it."""
    cost: Samples = field(default_factory=Samples)
    """CPU seconds of the node for a gigabyte."""


def measure(
    directory: Path, rounds: int, shards: Sequence[Path], nginx: Path | None, programs: Path | None
) -> list[Row]:
    """Rates, first bytes and cost.

    Args:
        directory: Scratch.
        rounds: Of the table.
        shards: For the transform.
        nginx: Its program; default: the emulators', or the one that is installed.
        programs: Emulators, where `tools/emulators` put them.
    """
    files = directory / "files"
    files.mkdir(parents=True)
    names = [f"{number}.tar" for number in range(OBJECTS)]
    for name in names:
        _write_shard(files / name)
    for path in shards:
        shutil.copy(path, files / path.name)
    with contextlib.ExitStack() as stack:
        stores = list(_stores(stack, directory, files, names, nginx, programs))
        config = directory / "node.toml"
        config.write_text("".join(f'[[bucket]]\nuri = "{store.bucket}"\n{store.settings}' for store in stores))
        flags = ("--config", config, "--bucket", f"gs://files=dir:{files}", "--workers", str(WORKERS))
        node = stack.enter_context(running_node(*flags, data=directory / "data"))
        client = stack.enter_context(Client(node.endpoint))
        beside = Beside(node, client, names)
        rows = [row for store in stores for row in beside.rates(store, rounds)]
        web = next((store for store in stores if store.bucket == "ht://web"), None)
        if web is not None:
            rows += beside.first_bytes(web, f"{_backing(web)}/{names[0]}", rounds)
            rows += beside.transforms(web, [path.name for path in shards], rounds)
            rows += beside.warm(web, rounds)
        return rows


def _write_shard(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(SIZE // MEMBER):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = MEMBER - tarfile.BLOCKSIZE
            archive.addfile(info, io.BytesIO(os.urandom(info.size)))


def _stores(
    stack: contextlib.ExitStack,
    directory: Path,
    files: Path,
    names: Sequence[str],
    nginx: Path | None,
    programs: Path | None,
) -> Iterator[Store]:
    limited = stack.enter_context(spoken([sys.executable, HERE / "peers" / "limited.py", files, str(LIMIT)]))
    origin = f"http://127.0.0.1:{limited.said[0]}"
    yield _web_store(f"a store limited to {LIMIT // 1_000_000} MB/s", "ht://limited", origin, names, 0.9)
    program = nginx or (emulators.program(programs, "nginx") if programs else None) or shutil.which("nginx")
    if program is not None:
        port = stack.enter_context(nginxes.running(program, directory, files)).port
        yield _web_store("nginx", "ht://web", f"http://127.0.0.1:{port}", names, 0.4)
    if programs is not None:
        moto = stack.enter_context(emulators.moto(programs))
        name = emulators.make_moto_bucket(moto)
        store = S3Store(
            name,
            endpoint=moto.endpoint,
            access_key_id="name",
            secret_access_key="secret",
            region="us-east-1",
            client_options={"allow_http": True},
        )
        for each in names:
            obstore.put(store, each, files / each)
        alone = stack.enter_context(spoken([sys.executable, HERE / "peers" / "obstore_alone.py", moto.endpoint, name]))
        settings = f'endpoint = "{moto.endpoint}"\n{_KEYS}'
        what = "an S3 emulator (moto), by obstore alone"
        yield Store(what, f"s3://{name}", settings, lambda: float(alone.ask()[0]), 0.7)


def _web_store(name: str, bucket: str, origin: str, names: Sequence[str], at_least: float) -> Store:
    urls = [f"{origin}/{each}" for each in names]
    return Store(name, bucket, f'backing = "{origin}"\n', lambda: _seconds(urls), at_least)


def _backing(store: Store) -> str:
    return store.settings.split('"')[1]


class Beside:
    """A node, beside its stores.

    Args:
        node: With a bucket for each store, and one of the directory that they all serve.
        client: Of it.
        names: Of the objects.
    """

    def __init__(self, node: RunningNode, client: Client, names: Sequence[str]) -> None:
        self._node = node
        self._client = client
        self._names = names

    def rates(self, store: Store, rounds: int) -> list[Row]:
        """Cold, in turn with the same reading without a node."""
        megabytes = OBJECTS * SIZE / 1e6
        for number in range(rounds + 1):
            straight = store.direct()
            wait_quiet()
            self._evict(store)
            before = cpu_of(self._node.pid)
            cold = _seconds(self._urls(store.bucket))
            wait_quiet()
            # The first round brings what is read into the page cache, and opens connections.
            if number:
                store.straight.add(megabytes / straight)
                store.cold.add(megabytes / cold)
                store.cost.add((cpu_of(self._node.pid) - before) / megabytes * 1000)
        ratio = ratio_of(store.cold, store.straight)
        return [
            Row(f"{store.name}: straight from it", store.straight, "MB/s"),
            Row(f"{store.name}: through a node that has none of it", store.cold, "MB/s"),
            Row(f"{store.name}: the node's rate, of the one straight from it", ratio, "", at_least=store.at_least),
            Row(f"{store.name}: CPU of the node for a gigabyte", store.cost, "s"),
        ]

    def first_bytes(self, store: Store, origin: str, rounds: int) -> list[Row]:
        """Until the first byte of an object that the node has nothing of."""
        (url,) = self._urls(store.bucket)[:1]
        straight, cold, more = Samples(), Samples(), Samples()
        for _ in range(rounds * FIRST_BYTES):
            straight.add(first_byte(origin) * 1000)
            self._evict(store)
            cold.add(first_byte(url) * 1000)
            more.add(cold.values[-1] - straight.values[-1])
            wait_quiet()
        return [
            Row(f"{store.name}: first byte, straight from it", straight, "ms"),
            Row(f"{store.name}: first byte, through a node that has none of it", cold, "ms"),
            Row(f"{store.name}: how much later that is", more, "ms", at_most=20),
        ]

    def transforms(self, store: Store, names: Sequence[str], rounds: int) -> list[Row]:
        """Of shards that are there, and of the same when they have to come first."""
        spec = self._client.transforms.add(f"{HERE / 'functions.py'}:crop", "bench").uuid
        urls = [self._client.object_url(store.bucket, name, spec) for name in names]
        warm, cold = Samples(), Samples()
        _seconds(urls)
        # What was written before goes to the disk now, not meanwhile.
        os.sync()
        for _ in range(2 * rounds):
            warm.add(_seconds(urls))
            wait_quiet()
            self._evict(store)
            cold.add(_seconds(urls))
            wait_quiet()
        what = (
            f"a transform (Pillow and numpy) of shards that come from {store.name} meanwhile, of its rate from the disk"
        )
        return [Row(what, ratio_of(warm, cold), "", at_least=0.8)]

    def warm(self, store: Store, rounds: int) -> list[Row]:
        """What is cached, beside the same in a directory."""
        cached, plain = self._urls(store.bucket), self._urls("gs://files")
        _seconds(cached)
        os.sync()
        ratio = Samples()
        for number in range(2 * rounds):
            # Each is the first in turn.
            times = {urls[0]: 0.0 for urls in (cached, plain)}
            for urls in (cached, plain) if number % 2 else (plain, cached):
                times[urls[0]] = _seconds(urls)
            ratio.add(times[plain[0]] / times[cached[0]])
        return [Row("objects that are cached, of the rate from a directory", ratio, "", at_least=0.95)]

    def _urls(self, bucket: str) -> list[str]:
        return [self._client.object_url(bucket, name) for name in self._names]

    def _evict(self, store: Store) -> None:
        job = self._client.jobs.evict(store.bucket, prefix="")
        self._client.jobs.wait(job.id)


def _seconds(urls: Sequence[str]) -> float:
    """All by one curl, one after the other."""
    command = ["curl", "-sSf"]
    for url in urls:
        command += ["-o", "/dev/null", url]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start
