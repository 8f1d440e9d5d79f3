"""Work is done once: what readers of one transformed URL share, and what is there for those who come later.

Real nodes as child processes, real shards, plain HTTP.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.readers import Reader, get, open_files, processes_of, wait_until
from tests.server.served import TRAIN, Served, crop_slowly, names_in, serving


@pytest.fixture(scope="module")
def common(shards: Path) -> Iterator[Served]:
    """One node for all stories that take a seed of their own and leave nothing to the next."""
    with serving(shards, environ={"SHARDMILL_TRANSFORMS_IDLE_WORKERS": "1s"}) as served:
        yield served


@pytest.fixture(scope="module")
def slow(shards: Path) -> Iterator[Served]:
    """One whose samples take long enough that something can happen meanwhile."""
    with serving(shards, function=crop_slowly, environ={"SHARDMILL_TRANSFORMS_IDLE_WORKERS": "1s"}) as served:
        yield served


def test_four_readers_of_a_cold_url_cause_one_run_though_one_of_them_stalls(common: Served) -> None:
    url, samples = common.url(TRAIN, seed=1), common.samples(TRAIN)
    done, ended = common.count(), common.runs("ended")
    with Reader(url) as stalled, ThreadPoolExecutor(3) as threads:
        stalled.begin(1)
        found = list(threads.map(get, [url] * 3))
        assert len(names_in(found[0].body)) == 2 * samples
        found.append(stalled.finish())
    assert {answer.status for answer in found} == {200}
    assert len({answer.digest for answer in found}) == 1
    assert common.count() == done + samples
    assert common.runs("ended") == ended + 1
    assert get(url).digest == found[0].digest
    assert common.count() == done + samples


def test_the_first_reader_leaves_midway_and_the_others_do_not_notice(slow: Served) -> None:
    url, samples = slow.url(seed=2), slow.samples()
    done = slow.count()
    with ExitStack() as readers, ThreadPoolExecutor(2) as threads:
        first = readers.enter_context(Reader(url)).begin()
        others = [readers.enter_context(Reader(url)).begin() for _ in range(2)]
        first.leave()
        found = list(threads.map(Reader.finish, others))
    assert len({answer.digest for answer in found}) == 1
    assert len(names_in(found[0].body)) == 2 * samples
    assert slow.count() == done + samples


def test_the_last_reader_leaves_and_no_worker_descriptor_or_spool_is_left(slow: Served) -> None:
    pid = slow.node.pid
    # Shards are kept open for some seconds.
    left = ("arena", ".tar")
    wait_until(
        lambda: not any(word in file for word in left for file in open_files(pid)), "an earlier story does not end"
    )
    files, processes = open_files(pid), len(processes_of(pid))
    abandoned = slow.runs("abandoned")
    with Reader(slow.url(TRAIN, seed=3)) as one, Reader(slow.url(TRAIN, seed=3)) as other:
        one.begin()
        other.begin()
        assert slow.runs("running") == 1
        assert len(slow.spools()) == 1
        assert len(processes_of(pid)) > processes
    wait_until(lambda: slow.runs("running") == 0, "the run goes on without a reader")
    assert slow.runs("abandoned") == abandoned + 1
    wait_until(lambda: not slow.spools(), "the spool is left")
    wait_until(lambda: len(processes_of(pid)) <= processes, "a worker is left")
    wait_until(lambda: open_files(pid) == files, f"descriptors are left: {files} → {open_files(pid)}")


def test_a_finished_result_is_an_object_like_any_other(common: Served) -> None:
    url = common.url(seed=4)
    cold = get(url)
    assert cold.headers["Accept-Ranges"] == "none"
    assert not {"ETag", "Content-Length", "Last-Modified"} & set(cold.headers)
    wait_until(lambda: "ETag" in get(url, method="HEAD").headers, "the result is not kept")
    done, size = common.count(), len(cold.body)

    warm = get(url)
    assert warm.body == cold.body
    assert warm.headers["Content-Length"] == str(size)
    assert warm.headers["Accept-Ranges"] == "bytes"
    assert warm.headers["Shardmill-Checksum"].startswith("xxh3:")
    head = get(url, method="HEAD")
    assert (head.status, head.body, head.etag) == (200, b"", warm.etag)
    assert head.headers["Content-Length"] == str(size)

    unchanged = get(url, {"If-None-Match": warm.etag})
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert get(url, {"If-Modified-Since": warm.headers["Last-Modified"]}).status == 304
    assert get(url, {"If-None-Match": '"another"'}).status == 200
    assert get(url, {"If-Match": warm.etag}).body == cold.body
    assert get(url, {"If-Match": '"another"'}).status == 412

    for start, stop in [(0, 1), (1000, 70_000), (size - 100_000, size), (511, 513), (0, size), (size - 1, size)]:
        part = get(url, {"Range": f"bytes={start}-{stop - 1}"})
        assert (part.status, part.headers["Content-Range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
        assert part.etag == warm.etag
        assert part.body == cold.body[start:stop]
    assert get(url, {"Range": "bytes=-1024"}).body == cold.body[-1024:]
    assert get(url, {"Range": f"bytes={size}-"}).status == 416
    assert get(url, {"Range": "bytes=10-19", "If-Range": warm.etag}).body == cold.body[10:20]
    restarted = get(url, {"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (restarted.status, restarted.body) == (200, cold.body)
    assert common.count() == done, "a finished result was computed again"


def test_head_starts_nothing(common: Served) -> None:
    runs = {state: common.runs(state) for state in ("running", "ended", "failed", "abandoned")}
    head = get(common.url(seed=5), method="HEAD")
    assert (head.status, head.headers["Accept-Ranges"]) == (200, "none")
    assert not {"Content-Length", "ETag"} & set(head.headers)
    assert {state: common.runs(state) for state in runs} == runs
    wait_until(lambda: not common.spools(), "a spool is there")


def test_range_on_a_cold_seeded_url_waits_for_the_result(common: Served) -> None:
    url, samples = common.url(seed=6), common.samples()
    done = common.count()
    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(lambda wanted: get(url, {"Range": wanted}), ["bytes=0-99999", "bytes=100000-"]))
    assert [part.status for part in parts] == [206, 206]
    assert parts[0].etag == parts[1].etag
    assert common.count() == done + samples
    assert parts[0].body + parts[1].body == get(url).body


def test_range_while_the_run_goes_on_waits_beside_its_readers(slow: Served) -> None:
    url, samples = slow.url(seed=7), slow.samples()
    done = slow.count()
    with Reader(url) as reader, ThreadPoolExecutor(1) as threads:
        reader.begin()
        waiting = threads.submit(get, url, {"Range": "bytes=512-1023"})
        whole = reader.finish()
        part = waiting.result()
    assert (part.status, part.body) == (206, whole.body[512:1024])
    assert slow.count() == done + samples


def test_without_a_seed_every_read_is_its_own_and_range_is_ignored(common: Served) -> None:
    url, samples = common.url(), common.samples()
    done, kept = common.count(), len(common.kept())
    found = [get(url, {"Range": "bytes=0-99"}) for _ in range(2)]
    for answer in found:
        assert (answer.status, answer.headers["Accept-Ranges"]) == (200, "none")
        assert answer.headers["Cache-Control"] == "no-store"
        assert "ETag" not in answer.headers
    assert found[0].body != found[1].body
    assert common.count() == done + 2 * samples
    assert len(common.kept()) == kept
    again = get(common.url(seed=int(found[0].headers["Shardmill-Seed"])))
    assert again.body == found[0].body


def test_with_results_off_everything_is_streamed_and_nothing_kept(shards: Path) -> None:
    with serving(shards, "--results", "off") as served:
        url, samples = served.url(seed=1), served.samples()
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda _: get(url, {"Range": "bytes=0-99"}), range(2)))
        for answer in found:
            assert (answer.status, answer.headers["Accept-Ranges"]) == (200, "none")
        assert found[0].body == found[1].body
        assert len(names_in(found[0].body)) == 2 * samples
        assert served.count() == 2 * samples
        assert "ETag" not in get(url, method="HEAD").headers
        assert not served.results.exists()


def test_range_of_what_cannot_be_kept_is_503_with_a_time_to_come_back(shards: Path) -> None:
    with serving(shards, "--results-capacity", "1MiB") as served:
        url = served.url(seed=1)
        refused = get(url, {"Range": "bytes=0-99"})
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert b"without Range" in refused.body
        wait_until(lambda: served.runs("running") == 0, "the run has no end")
        whole = get(url)
        assert len(names_in(whole.body)) == 2 * served.samples()
        wait_until(lambda: not served.spools(), "the spool is left")
        assert served.kept() == []
