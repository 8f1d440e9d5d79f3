"""Finished results that the front keeps open: never longer than they are what their URL stands for, and counted."""

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.readers import Answer, Reader, get, metric, open_files, wait_until
from tests.server.served import BUCKET, VAL, Served, serving


@pytest.fixture
def files(shards: Path, tmp_path: Path) -> Path:
    """A directory of its own, whose files a test may replace."""
    for name in (VAL, "imagenet-val-000001.tar"):
        shutil.copyfile(shards / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def served(files: Path) -> Iterator[Served]:
    with serving(files) as served:
        yield served


def finish(served: Served, url: str) -> Answer:
    """Read it until it is kept open."""
    get(url)
    wait_until(lambda: "ETag" in get(url, method="HEAD").headers, "the result is not kept")
    found = get(url)
    assert is_open(served)
    return found


def is_open(served: Served) -> bool:
    """The front has a result open. Whoever else reads one has closed it with the answer."""
    return any(file.startswith(f"{served.results}/") for file in open_files(served.node.pid))


def test_a_result_that_is_removed_is_closed_and_made_again(served: Served) -> None:
    url, samples = served.url(seed=1), served.samples()
    first = finish(served, url)
    done = served.count()
    served.client.transforms.remove_results(everything=True)
    assert not is_open(served)
    again = get(url)
    assert (again.status, again.digest) == (200, first.digest)
    assert "ETag" not in again.headers
    assert served.count() == done + samples


def test_a_shard_that_was_replaced_is_seen_by_the_next_reader(served: Served, files: Path) -> None:
    url = served.url(seed=1)
    first = finish(served, url)
    os.replace(files / "imagenet-val-000001.tar", files / VAL)
    second = get(url)
    assert second.status == 200
    assert second.digest != first.digest
    assert "ETag" not in second.headers
    (files / VAL).unlink()
    assert get(url).status == 404


def test_a_shard_that_was_written_is_seen_by_the_next_reader(served: Served, files: Path) -> None:
    served.client.bucket("ais://pool").create()
    handle = served.client.object("ais://pool/a.tar")
    handle.put(files / VAL)
    url = served.client.object_url("ais://pool", "a.tar", served.uuid, seed=1)
    first = finish(served, url)
    handle.put(files / "imagenet-val-000001.tar")
    second = finish(served, url)
    assert second.digest != first.digest
    handle.put(files / VAL)
    # The bytes are those of the first version, but it is another version: its result is made anew.
    assert get(url).digest == first.digest
    handle.delete()
    assert get(url).status == 404


def test_a_version_that_was_removed_is_found_no_more(served: Served) -> None:
    url = served.url(seed=1)
    finish(served, url)
    served.client.transforms.remove(served.uuid.partition("@")[0])
    assert get(url).status == 404
    assert get(url, method="HEAD").status == 404


def test_what_nobody_asks_for_is_closed(served: Served) -> None:
    finish(served, served.url(seed=1))
    wait_until(lambda: not is_open(served), "it stays open")


def test_readings_are_counted_and_what_is_scratch_stays_for_a_second_reader(served: Served) -> None:
    client, url = served.client, served.url(seed=1, epoch=1)
    get(url)
    wait_until(lambda: "ETag" in get(url, method="HEAD").headers, "the result is not kept")
    (before,) = client.transforms.results().results
    assert before.scratch
    hits = metric(client, "shardmill_transformed_reads_total", outcome="hit")
    sent = metric(client, "shardmill_bytes_total", route="t", direction="out")
    requests = metric(client, "shardmill_requests_total", route="t", status="206")
    for _ in range(3):
        assert get(url, {"Range": "bytes=0-999"}).status == 206
    assert is_open(served)
    assert metric(client, "shardmill_transformed_reads_total", outcome="hit") == hits + 3
    assert metric(client, "shardmill_bytes_total", route="t", direction="out") == sent + 3000
    assert metric(client, "shardmill_requests_total", route="t", status="206") == requests + 3
    (after,) = client.transforms.results().results
    assert after.used > before.used
    assert not after.scratch
    assert after.readers == 0


def test_what_is_kept_open_leaves_for_others_when_the_quota_is_full(files: Path) -> None:
    with serving(files) as served:
        size = len(finish(served, served.url(seed=1)).body)
    with serving(files, environ={"SHARDMILL_RESULTS_CAPACITY": str(size * 3 // 2)}) as served:
        first, second = served.url(seed=1), served.url(seed=2)
        finish(served, first)
        finish(served, second)
        assert len(served.kept()) == 1
        assert "ETag" not in get(first, method="HEAD").headers


def test_a_url_of_another_bucket_with_the_same_result_is_its_own(served: Served) -> None:
    """Two spellings of one result are opened apart, and each is closed with it."""
    url = served.url(seed=1)
    first = finish(served, url)
    name, _, rest = url.rpartition("/")[2].partition("~")
    other = f"{served.node.endpoint}/t/gs/{BUCKET.partition('//')[2]}/{name.rpartition(',k=')[0]}~{rest}"
    assert other != url
    assert get(other).etag == first.etag
    served.client.transforms.remove_results(everything=True)
    assert not is_open(served)
    assert "ETag" not in get(other, method="HEAD").headers


def test_a_node_that_is_killed_leaves_a_result_that_no_tar_reader_takes_for_whole(served: Served) -> None:
    url = served.url(seed=1)
    finish(served, url)
    with Reader(url) as reader:
        reader.begin(100_000)
        assert reader.response.headers["ETag"]
        served.node.kill()
        got = reader.received + reader.response.read1(1 << 30)
        with contextlib.suppress(ConnectionError):
            while piece := reader.response.read1(1 << 20):
                got += piece
    assert len(got) < int(reader.response.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(got), mode="r|") as archive, pytest.raises(tarfile.ReadError):
        for member in archive:
            archive.extractfile(member).read()  # type: ignore[union-attr]
