"""What is kept of transformed shards on a disk that is small, full, torn or wrong."""

import contextlib
import itertools
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.errors import InsufficientStorage
from tests.server.readers import Answer, Reader, get, metric, wait_until
from tests.server.served import TRAIN, Sample, Served, crop_slowly, names_in, serving

MIB = 1 << 20
AHEAD = 16 * MIB  # verified before the first byte of an answer, at most
TRAINING = [f"imagenet-train-{number:06d}.tar" for number in range(4)]
SMALL_DISK = 24 * MIB


def noise(sample: Sample, size: int) -> Sample:
    """So many bytes beside the picture that were never there before."""
    sample["bin"] = random.randbytes(size)
    return sample


def read_kept(served: Served, url: str) -> Answer:
    """The result, once it is kept."""
    get(url)
    wait_until(lambda: "ETag" in get(url, method="HEAD").headers, "the result is not kept")
    return get(url)


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_node_killed_midway_leaves_no_torn_result(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(shards, function=crop_slowly, data=data) as served:
        kept, torn = served.url(seed=1), served.url(TRAIN, seed=2)
        whole = read_kept(served, kept)
        with Reader(torn) as reader:
            reader.begin(3 * MIB)
            assert any(path.stat().st_size for path in served.spools())
            served.node.kill()
            with pytest.raises((IncompleteRead, ConnectionError)):
                reader.finish()
        left = served.spools()
        assert left
    with serving(shards, function=crop_slowly, data=data) as served:
        assert served.spools() == []
        [only] = served.kept()
        assert only.stat().st_size > len(whole.body)
        done = served.count()
        again = get(served.url(seed=1))
        assert (again.body, again.etag) == (whole.body, whole.etag)
        assert served.count() == done
        assert "ETag" not in get(served.url(TRAIN, seed=2), method="HEAD").headers
        answer = get(served.url(TRAIN, seed=2))
        assert len(names_in(answer.body)) == 2 * served.samples(TRAIN)
        assert answer.body.startswith(reader.received)


def test_results_torn_in_any_place_are_swept_at_the_start(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(shards, data=data) as served:
        bodies = {seed: read_kept(served, served.url(seed=seed)).body for seed in range(5)}
        paths = served.kept()
    assert len(paths) == 5
    size = len(bodies[0])
    for path, length in zip(paths, (0, 1, size // 2, size, paths[4].stat().st_size - 1), strict=True):
        os.truncate(path, length)
    with serving(shards, data=data) as served:
        assert served.kept() == []
        for seed, body in bodies.items():
            assert get(served.url(seed=seed)).body == body


def test_a_result_with_a_wrong_byte_is_made_again_before_the_first_byte(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(shards, data=data) as served:
        url, samples = served.url(seed=1), served.samples()
        whole = get(url)
        wait_until(lambda: len(served.kept()) == 1, "the result is not kept")
        for offset in (0, len(whole.body) // 2, len(whole.body) - 1):
            done = served.count()
            damage(served.kept()[0], offset)
            again = get(url)
            assert (again.status, again.body) == (200, whole.body)
            assert served.count() == done + samples
            wait_until(lambda: len(served.kept()) == 1, "the result is not kept")
        done = served.count()
        damage(served.kept()[0], 5)
        part = get(url, {"Range": "bytes=0-99"})
        assert (part.status, part.body) == (206, whole.body[:100])
        assert served.count() == done + samples
        read_kept(served, url)
    damage(path := next(path for path in (data / "results").iterdir() if path.is_file()), 7)
    with serving(shards, data=data) as served:
        assert served.kept() == [path]
        assert get(served.url(seed=1)).body == whole.body


def test_a_result_that_turns_out_wrong_midway_is_cut_and_then_made_again(shards: Path) -> None:
    with serving(shards, function=noise, args={"size": 1_000_000}) as served:
        url, samples = served.url(TRAIN, seed=1), served.samples(TRAIN)
        whole = get(url)
        assert len(whole.body) > AHEAD + MIB
        wait_until(lambda: len(served.kept()) == 1, "the result is not kept")
        damage(served.kept()[0], AHEAD + 1000)
        with Reader(url) as reader:
            assert reader.response.headers["Content-Length"] == str(len(whole.body))
            with pytest.raises(IncompleteRead):
                reader.finish()
            assert whole.body.startswith(reader.received)
        assert served.kept() == []
        done = served.count()
        assert get(url).body == whole.body
        assert served.count() == done + samples


def disk_use(directory: Path) -> int:
    """Bytes taken by its files, whatever their length says."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def states_of(shards: Path) -> list[tuple[int, int, int]]:
    """What would tell that a shard was touched."""
    return [
        (status.st_ino, status.st_size, status.st_mtime_ns) for status in ((shards / name).stat() for name in TRAINING)
    ]


def test_many_results_in_a_small_quota_lose_no_sample(shards: Path) -> None:
    """240 MB of results in 64 MB, two readers each, and what is on the disk meanwhile."""
    capacity, window = 64 * MIB, 64 * MIB
    before = states_of(shards)
    with serving(shards, "--results-capacity", "64MiB", function=noise, args={"size": 1}) as served:
        samples = [served.samples(name) for name in TRAINING]
        uuid = served.client.transforms.add(noise, "sized", args={"size": 240_000_000 // (4 * sum(samples))}).uuid
        served.client.close()
        sized = Served(served.node, served.client, uuid)
        peak, total = 0, 0
        with ThreadPoolExecutor(2) as threads:
            for seed in range(4):
                for name, count in zip(TRAINING, samples, strict=True):
                    answers = list(threads.map(get, [sized.url(name, seed=seed)] * 2))
                    assert answers[0].body == answers[1].body
                    assert len(names_in(answers[0].body)) == 3 * count
                    total += len(answers[0].body)
                    peak = max(peak, disk_use(served.results))
        assert total > 240_000_000
        assert MIB < peak <= capacity + window
        wait_until(lambda: sized.runs("running") == 0, "a run has no end")
        assert disk_use(served.results) <= capacity + MIB
        assert get(sized.url(TRAINING[-1], seed=3), {"Range": "bytes=0-1023"}).status == 206
    assert states_of(shards) == before


def test_a_smaller_quota_holds_from_the_start(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(shards, data=data) as served:
        for seed in range(4):
            whole = read_kept(served, served.url(seed=seed))
        used = disk_use(served.results)
    capacity = used * 5 // 8
    with serving(shards, "--results-capacity", str(capacity), data=data) as served:
        assert 0 < disk_use(served.results) <= capacity
        assert get(served.url(seed=3), method="HEAD").etag == whole.etag


@dataclass
class SmallDisk:
    """A file system of its own below a node's data directory, as the node's process sees it."""

    served: Served
    is_own: bool
    """False: this kernel lets nobody have one; a limit of the size of files stands for it."""

    def fill(self) -> None:
        """Leave room for nothing: no byte, no file, no directory."""
        if not self.is_own:
            return
        with contextlib.suppress(OSError), (self.served.node.data / "ballast").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(MIB))
        with contextlib.suppress(OSError), (self.served.node.data / "ballast").open("ab", buffering=0) as file:
            while True:
                file.write(b"x")
        with contextlib.suppress(OSError):
            for number in itertools.count(len(list(self.served.node.data.glob("ballast-*")))):
                (self.served.node.data / f"ballast-{number}").mkdir()

    def empty(self) -> None:
        for path in self.served.node.data.glob("ballast*"):
            path.rmdir() if path.is_dir() else path.unlink()


@contextmanager
def small_disk(shards: Path, tmp_path: Path, **options: Any) -> Iterator[SmallDisk]:
    data, wrapper = tmp_path / "data", tmp_path / "python"
    data.mkdir()
    mount = f"mount -t tmpfs -o size={SMALL_DISK},nr_inodes=400 tmpfs {shlex.quote(str(data))}"
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    is_own = bool(shutil.which("unshare")) and not subprocess.run([*own, mount], check=False, timeout=60).returncode
    limits = shlex.join([*own, f'{mount} && exec "$@"', "-"]) if is_own else ""
    before = "" if is_own else f"ulimit -f {SMALL_DISK // 512} && "
    wrapper.write_text(f'#!/bin/sh\n{before}exec {limits} {shlex.quote(sys.executable)} "$@"\n')
    wrapper.chmod(0o755)
    with serving(shards, python=wrapper, data=data, **options) as served:
        if is_own:
            served.node.data = Path(f"/proc/{served.node.pid}/root{data}")
        yield SmallDisk(served, is_own)


def test_on_a_full_disk_every_sample_still_arrives(shards: Path, tmp_path: Path) -> None:
    before = states_of(shards)
    environ = {"SHARDMILL_TRANSFORMS_IDLE_WORKERS": "1s"}
    with small_disk(shards, tmp_path, function=noise, args={"size": 1}, environ=environ) as disk:
        served = disk.served
        samples = served.samples(TRAIN)
        large = served.client.transforms.add(noise, "large", args={"size": 3 * SMALL_DISK // samples}).uuid
        small = served.client.transforms.add(noise, "small", args={"size": 6 * MIB // samples}).uuid
        served.client.close()

        def read(uuid: str, seed: int) -> Answer:
            """By three readers, the first of whom has one byte of it when the others come."""
            url = Served(served.node, served.client, uuid).url(TRAIN, seed=seed)
            with Reader(url) as first, ThreadPoolExecutor(2) as threads:
                first.begin()
                others = threads.map(get, [url] * 2)
                answers = [first.finish(), *others]
            assert len({answer.digest for answer in answers}) == 1
            assert len(names_in(answers[0].body)) == 3 * samples
            wait_until(lambda: served.runs("running") == 0, "a run has no end")
            wait_until(lambda: not served.spools(), "the spool is left")
            return answers[0]

        read(large, 1)
        assert served.kept() == []
        for seed in range(2, 6):
            read(small, seed)
        assert served.kept(), "what fits is not kept"
        disk.fill()
        again = read(small, 5)
        read(small, 6)
        read(large, 7)
        wait_until(lambda: metric(served.client, "shardmill_workers") == 0, "idle workers do not end")
        read(small, 8)
        if disk.is_own:
            # Runs have made room meanwhile: results that gave way, scratch directories that were removed.
            disk.fill()
            with pytest.raises(InsufficientStorage, match="nothing was registered"):
                served.client.transforms.add(noise, "late", args={"size": 1000})
            served.client.close()
        disk.empty()
        assert read(small, 5).body == again.body
        wait_until(lambda: bool(served.kept()), "nothing is kept again")
    assert states_of(shards) == before
