"""What a job decides: what is next, whether it goes on, how fast it is."""

import random

from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.jobs import JobEntry, ObjectFailure
from shardmill.jobs.kinds import Item
from shardmill.jobs.progress import FIRST_ALL, Progress


def build_items(*sizes: int) -> list[Item]:
    return [Item(index, f"s-{index}.tar", size, f"t-{index}.tar") for index, size in enumerate(sizes)]


def build_entry(item: Item, *, samples: int = 10, failures: int = 0) -> JobEntry:
    return JobEntry(
        object=item.key,
        version="1",
        size=item.size,
        target=item.target,
        bytes=item.size // 2,
        etag="e",
        checksum=None,
        result="r",
        made=0.0,
        samples=samples,
        failures=failures,
    )


def build_failure(item: Item) -> ObjectFailure:
    return ObjectFailure(item.key, "transform_failed", f"{item.key} is bad", 0.0)


def take(progress: Progress, now: float = 0.0) -> Item:
    item = progress.take(now)
    assert item is not None
    return item


def test_items_are_taken_in_order_each_once() -> None:
    items = build_items(1, 2, 3)
    progress = Progress(items, 0.0)
    assert [progress.take(0.0) for _ in range(4)] == [*items, None]


def test_an_item_that_failed_leaves_the_others_to_be_done() -> None:
    progress = Progress(build_items(10, 10), 0.0)
    progress.fail(take(progress), build_failure(progress.items[0]), ends_all=False)
    progress.end(take(progress), "made", build_entry(progress.items[1]))
    assert progress.error == "1 of 2 objects failed"
    assert progress.counts == {"failed": 1, "made": 1}


def test_a_failure_that_all_would_meet_ends_the_job() -> None:
    progress = Progress(build_items(*[1] * 9), 0.0)
    progress.fail(take(progress), build_failure(progress.items[0]), ends_all=True)
    assert progress.take(0.0) is None
    assert progress.error == "s-0.tar is bad"


def test_when_the_first_all_fail_no_more_are_tried() -> None:
    progress = Progress(build_items(*[1] * 20), 0.0)
    for item in progress.items[:FIRST_ALL]:
        progress.fail(take(progress), build_failure(item), ends_all=False)
    assert progress.take(0.0) is None
    assert progress.error == f"the first {FIRST_ALL} objects all failed; the last: s-7.tar is bad"


def test_one_that_was_found_done_says_that_not_all_must_fail() -> None:
    progress = Progress(build_items(*[1] * 20), 0.0)
    progress.end(take(progress), "found", build_entry(progress.items[0]))
    for item in progress.items[1 : FIRST_ALL + 3]:
        progress.fail(take(progress), build_failure(item), ends_all=False)
    assert progress.take(0.0) is not None


def test_speed_counts_what_was_made_and_parts_of_what_is_in_work() -> None:
    progress = Progress(build_items(100, 100, 100, 100), 1000.0)
    progress.end(take(progress), "found", build_entry(progress.items[0]))
    progress.end(take(progress), "made", build_entry(progress.items[1], failures=3))
    progress.report(take(progress, 1005.0), 0.5)
    speed = progress.speed(1010.0)
    assert speed.rate == 15.0
    assert speed.time_left == 10.0
    assert progress.bytes_done == 250
    assert (progress.samples, progress.sample_failures, progress.bytes_out, progress.bytes_made) == (20, 3, 100, 50)
    [running] = progress.running
    assert (running.object, running.target, running.done, running.started) == ("s-2.tar", "t-2.tar", 0.5, 1005.0)


def test_before_anything_is_done_the_time_left_is_not_known() -> None:
    assert Progress(build_items(5), 0.0).speed(0.0).time_left is None


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(["found", "made", "failed"])), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_counts_add_up_whatever_the_order_of_the_ends(fates: list[tuple[int, str]], chance: random.Random) -> None:
    progress = Progress(build_items(*(size for size, _ in fates)), 0.0)
    begun: list[Item] = []
    while True:
        item = progress.take(0.0)
        if item is not None:
            begun.append(item)
        if not begun:
            break
        if item is not None and chance.random() < 0.5:
            continue
        ended = begun.pop(chance.randrange(len(begun)))
        match fates[ended.index][1]:
            case "failed":
                progress.fail(ended, build_failure(ended), ends_all=False)
            case "made":
                progress.end(ended, "made", build_entry(ended))
            case _:
                progress.end(ended, "found", build_entry(ended))
    assert sum(progress.counts.values()) == len(progress.entries) + len(progress.failures)
    assert progress.bytes_done == sum(item.size for item in progress.items if item.key in progress.entries)
    assert [entry.object for entry in progress.in_order()] == [
        item.key for item in progress.items if item.key in progress.entries
    ]
    if progress.stopped_by is None:
        assert sum(progress.counts.values()) == len(fates)
        assert (progress.error is None) == (len(progress.entries) == len(fates))
