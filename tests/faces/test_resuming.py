"""Readers that take a transformed shard in parts: they get on, or start again, and never join two different shards."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path

import pytest

from tests.server.readers import Answer, Reader, get, wait_until
from tests.server.served import VAL, Served, crop_slowly, names_in, serving

OTHER = "imagenet-val-000001.tar"
PART = 1 << 20


@pytest.fixture(scope="module")
def bucket(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose shards may be replaced."""
    directory = tmp_path_factory.mktemp("bucket")
    for name in (VAL, OTHER):
        shutil.copyfile(shards / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def served(bucket: Path) -> Iterator[Served]:
    with serving(bucket) as served:
        yield served


def curl(url: str, file: Path) -> int:
    return _run(["curl", "-sSf", "-C", "-", "-o", str(file), url], url, file)


def wget(url: str, file: Path) -> int:
    return _run(["wget", "-q", "-c", "--tries=1", "-O", str(file), url], url, file)


def _run(command: list[str], url: str, file: Path) -> int:
    """Exit status of the tool; where it is not installed, the request that it sends is sent from here."""
    if shutil.which(command[0]):
        return subprocess.run(command, check=False, timeout=60).returncode
    answer = get(url, {"Range": f"bytes={file.stat().st_size}-"})
    if answer.status != 206:
        return 33
    with file.open("ab") as stream:
        stream.write(answer.body)
    return 0


def cut_short(url: str, file: Path, size: int) -> None:
    """Read that much of a running answer into a file, and hang up."""
    with Reader(url) as reader:
        body = reader.begin(size).response
        assert body.status == 200
        file.write_bytes(bytes(reader.received))


@pytest.mark.parametrize("tool", [curl, wget])
def test_a_seeded_shard_cut_midway_is_continued_with_its_own_bytes(
    served: Served, tmp_path: Path, tool: Callable[[str, Path], int]
) -> None:
    url, file = served.url(seed=1 if tool is curl else 2), tmp_path / "shard.tar"
    cut_short(url, file, PART + 77)
    assert tool(url, file) == 0
    assert file.read_bytes() == get(url).body
    assert len(names_in(file.read_bytes())) == 2 * served.samples()


@pytest.mark.parametrize("tool", [curl, wget])
def test_a_shard_without_a_seed_is_not_joined_with_another_draw(
    served: Served, tmp_path: Path, tool: Callable[[str, Path], int]
) -> None:
    """wget would take a 200 for the same bytes again, and leave out as many as it has."""
    url, file = served.url(), tmp_path / "shard.tar"
    cut_short(url, file, PART + 77)
    begun = file.read_bytes()
    wait_until(lambda: served.runs("running") == 0, "the run that nobody reads goes on")
    ended = served.runs("ended")
    assert tool(url, file) != 0
    assert file.read_bytes() == begun
    refused = get(url, {"Range": f"bytes={len(begun)}-"})
    assert (refused.status, b"give it a seed" in refused.body) == (409, True)
    wait_until(lambda: served.runs("running") == 0, "a run for who was refused goes on")
    assert served.runs("ended") == ended
    restarted = get(url, {"Range": f"bytes={len(begun)}-", "If-Range": '"of the first draw"'})
    assert (restarted.status, len(names_in(restarted.body))) == (200, 2 * served.samples())


def test_ranged_readers_in_parallel_put_the_whole_together(served: Served) -> None:
    url, samples = served.url(seed=3), served.samples()
    done = served.count()
    first = get(url, {"Range": f"bytes=0-{PART - 1}"})
    size = int(first.headers["Content-Range"].rpartition("/")[2])

    def fetch(start: int) -> Answer:
        return get(url, {"Range": f"bytes={start}-{start + PART - 1}", "If-Match": first.etag})

    with ThreadPoolExecutor(6) as threads:
        parts = list(threads.map(fetch, range(PART, size, PART)))
    assert {part.status for part in parts} == {206}
    assert first.body + b"".join(part.body for part in parts) == get(url).body
    assert served.count() == done + samples


def test_a_shard_that_was_replaced_in_between_is_started_again(served: Served, bucket: Path, tmp_path: Path) -> None:
    url = served.url(seed=4)
    old = get(url, {"Range": f"bytes=0-{PART - 1}"})
    assert old.status == 206
    shutil.copyfile(bucket / OTHER, tmp_path / "new.tar")
    (tmp_path / "new.tar").rename(bucket / VAL)
    rest = f"bytes={PART}-"
    matched = get(url, {"Range": rest, "If-Match": old.etag})
    assert matched.status == 412
    again = get(url, {"Range": rest, "If-Range": old.etag})
    assert (again.status, again.body) == (200, get(url).body)
    assert len(names_in(again.body)) == 2 * served.samples()
    assert again.etag != old.etag
    assert get(url, {"If-None-Match": old.etag}).status == 200

    dated = get(url, {"Range": rest, "If-Range": again.headers["Last-Modified"]})
    assert (dated.status, dated.body) == (206, again.body[PART:])


def test_a_shard_that_changes_while_it_is_transformed_is_cut_and_not_kept(bucket: Path) -> None:
    with serving(bucket, function=crop_slowly) as served, Reader(served.url(OTHER, seed=5)) as reader:
        reader.begin()
        with (bucket / OTHER).open("r+b") as file:
            file.write(b"9")
        with pytest.raises(IncompleteRead):
            reader.finish()
        wait_until(lambda: served.runs("running") == 0, "the run has no end")
        wait_until(lambda: not served.spools(), "the spool is left")
        assert served.kept() == []
        failures = served.client.transforms.errors(request=reader.response.headers["Shardmill-Request-Id"])
        served.client.close()
        assert "changed while it was read" in failures.failures[-1].message
