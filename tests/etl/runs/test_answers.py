"""Transformed shards over HTTP from real nodes: what decides their bytes, and what a failure looks like."""

import hashlib
import http.client
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etl.judges import count_samples, gnu_tar_is_content, tarfile_is_content
from tests.etl.over_http import Refused, Served, serve
from tests.etl.support import IDENTITY, members, write_shard
from tests.shards.archives import END, member

CROP = """
    import random

    import numpy as np

    def transform(sample):
        picture = sample.pop("jpg").convert("RGB")
        width, height = picture.size
        wide, high = random.randint(width // 3, width), random.randint(height // 3, height)
        left, top = random.randint(0, width - wide), random.randint(0, height - high)
        picture = picture.resize((24, 24), box=(left, top, left + wide, top + high))
        sample["npy"] = np.asarray(picture, "float32") / 255
        return sample
"""
SHARD = "imagenet-train-000000.tar"


@pytest.fixture(scope="module")
def node(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers; the train shards, and `numbers.tar` of 100 small samples."""
    directory = tmp_path_factory.mktemp("served")
    for path in shards.glob("imagenet-train-*.tar"):
        (directory / path.name).symlink_to(path)
    write_shard(directory / "numbers.tar", [{"txt": b"%d" % ordinal} for ordinal in range(100)])
    with serve(directory, "--workers", "2", environ={"SHARDMILL_STORAGE_LINKS": "follow"}) as served:
        yield served


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def labels(data: bytes) -> dict[str, bytes]:
    return {name: payload for name, payload in members(data).items() if name.endswith(".cls")}


def test_a_url_without_a_seed_draws_other_crops_each_time(node: Served, shards: Path) -> None:
    info = node.register(CROP, name="crop")
    first, second = node.get(info, SHARD), node.get(info, SHARD)
    assert first.headers["cache-control"] == second.headers["cache-control"] == "no-store"
    assert first.headers["shardmill-seed"] != second.headers["shardmill-seed"]
    ours, theirs = members(first.body), members(second.body)
    crops = [name for name in ours if name.endswith(".npy")]
    assert len(crops) == count_samples((shards / SHARD).read_bytes())
    assert sum(ours[name] == theirs[name] for name in crops) <= len(crops) // 20
    assert labels(first.body) == labels(second.body) == labels((shards / SHARD).read_bytes())
    # The drawn seed makes it the same again.
    again = node.get(info, SHARD, f",seed={first.headers['shardmill-seed']}")
    assert again.body == first.body


def test_a_seed_gives_one_sha256_over_workers_and_restarts(shards: Path, tmp_path: Path) -> None:
    digests, others = [], []
    for workers in ("1", "2", "2"):
        with serve(shards, "--workers", workers, data=tmp_path / "data") as served:
            # Found again after the first time: the version is kept with the node's data.
            info = served.register(CROP, name="crop")
            for _ in range(2):
                answer = served.get(info, SHARD, ",seed=1,epoch=1")
                digests.append(sha256(answer.body))
            other = served.get(info, SHARD, ",seed=1,epoch=2")
            others.append(sha256(other.body))
            assert labels(other.body) == labels(answer.body) == labels((shards / SHARD).read_bytes())
    assert len(set(digests)) == len(set(others)) == 1
    assert set(digests) != set(others)


def with_a_truncated_jpeg(source: Path, target: Path, ordinal: int) -> str:
    """Copy a shard with one picture cut in half; its key."""
    found = -1
    with tarfile.open(source) as original, tarfile.open(target, "w") as copy:
        for member in original:
            file = original.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".jpg"):
                found += 1
                if found == ordinal:
                    key = member.name.removesuffix(".jpg")
                    data = data[: len(data) // 2]
                    member.size = len(data)
            copy.addfile(member, io.BytesIO(data))
    return key


def test_a_truncated_jpeg_costs_one_sample_and_leaves_a_record(shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    directory.mkdir()
    key = with_a_truncated_jpeg(shards / SHARD, directory / "bad.tar", 13)
    with serve(directory, "--workers", "2") as served:
        info = served.register(CROP, name="crop")
        answer = served.get(info, "bad.tar", ",errors=skip:0.02")
        assert answer.status == 200
        found = members(answer.body)
        assert len(found) == 2 * (count_samples((directory / "bad.tar").read_bytes()) - 1)
        assert f"{key}.npy" not in found
        kept = served.failures(request=answer.headers["shardmill-request-id"])
        (failure,) = kept.failures
        assert (kept.total, failure.sample, failure.ordinal, failure.object) == (1, key, 13, "bad.tar")
        assert "cannot be decoded" in failure.message
        assert failure.traceback is not None
        assert "truncated" in failure.traceback
        assert failure.version
        # A bare spec skips nothing: the answer may have begun, but it does not end.
        with pytest.raises(http.client.IncompleteRead):
            served.get(info, "bad.tar")


def test_a_function_that_always_raises_is_422_with_its_own_traceback(node: Served) -> None:
    info = node.register("def transform(sample):\n    return sample['nothing']\n", name="raises")
    for options in ("", ",errors=skip:0.01", ",errors=skip:1"):
        answer = node.get(info, "numbers.tar", options)
        assert (answer.status, answer.error.code) == (422, "transform_failed")
        assert answer.error.traceback is not None
        assert 'File "/home/user/transform.py", line 2, in transform' in answer.error.traceback
        assert "shardmill/" not in answer.error.traceback
        assert node.failures(request=answer.headers["shardmill-request-id"]).total >= 1


def test_a_probe_refuses_a_function_that_raises_and_names_its_line(node: Served) -> None:
    source = "def transform(sample):\n    picture = sample['png']\n    return sample\n"
    with pytest.raises(Refused) as caught:
        node.register(source, name="probed", probe="numbers.tar")
    assert caught.value.status == 422
    assert caught.value.error.traceback is not None
    assert 'File "/home/user/transform.py", line 2, in transform' in caught.value.error.traceback
    assert "KeyError: 'png'" in caught.value.error.traceback
    names = node.ask("GET", "/api/transforms/probed")
    assert names.status == 404
    assert node.register(source, name="probed").name == "probed"


def test_a_failure_at_sample_fifty_cuts_the_answer_where_every_reader_sees_it(node: Served) -> None:
    source = """
        import time

        def transform(sample):
            if sample["__key__"] == "0050":
                time.sleep(0.3)
                raise ValueError("fifty is too many")
            return sample
    """
    info = node.register(source, name="fifty")
    with pytest.raises(http.client.IncompleteRead) as caught:
        node.get(info, "numbers.tar")
    partial = caught.value.partial
    assert b"0049.txt" in partial
    assert not tarfile_is_content(partial)
    assert not gnu_tar_is_content(partial)
    (failure,) = node.failures(transform="fifty").failures
    assert (failure.sample, failure.message) == ("0050", "sample '0050': ValueError: fifty is too many")


def test_an_answer_tells_its_seed_only_where_one_was_used(node: Served) -> None:
    info = node.register(IDENTITY, name="same")
    answer = node.get(info, "numbers.tar", ",seed=9")
    assert answer.headers["shardmill-seed"] == "9"
    head = node.ask("HEAD", node.path(info, "numbers.tar", ",seed=9"))
    assert head.status == 200
    assert "shardmill-run" not in head.headers


def test_a_failure_with_names_that_are_not_utf8_can_be_read_back(tmp_path: Path) -> None:
    (tmp_path / "raw.tar").write_bytes(member(b"caf\xe9/\xff.txt", b"x") + END)
    with serve(tmp_path, "--workers", "1") as served:
        info = served.register("def transform(sample):\n    raise ValueError(sample['__key__'] + '\\ud800')\n")
        answer = served.get(info, "raw.tar")
        assert (answer.status, answer.error.code) == (422, "transform_failed")
        assert "ValueError: caf\\udce9/\\udcff\\ud800" in answer.error.message
        (failure,) = served.failures(request=answer.headers["shardmill-request-id"]).failures
        assert failure.sample == "caf\\udce9/\\udcff"
        assert served.failures(key="caf\\udce9/\\udcff").total == 1
