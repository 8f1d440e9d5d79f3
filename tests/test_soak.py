"""Half a minute of mixed traffic; ten minutes of it, with slopes, are `make soak`."""

from pathlib import Path

import pytest

from benchmarks.soak import CODE, READERS, Held, growth, soak

SECONDS = 30.0


def test_under_mixed_traffic_counts_add_up_and_nothing_is_left(shards: Path) -> None:
    report = soak(sorted(shards.glob("*.tar")), SECONDS, seed=20_26)
    assert report.wrong == []
    # It was traffic: each kind of it happened.
    assert report.counts["runs ended"] > READERS
    assert report.counts["reads started"] > READERS
    assert report.tally.ledger > 0
    assert report.tally.versions > len(CODE)
    assert report.tally.kills > 0


@pytest.mark.parametrize(
    ("memory", "threads", "disk", "grown"),
    [
        (0, 0, 0, []),
        (1, 0, 0, ["memory: 100000000 in the middle third, 130000000 in the last"]),
        (0, 1, 0, ["threads: 20 in the middle third, 50 in the last"]),
        (0, 0, 1, ["disk: 60000000 in the middle third, 120000000 in the last"]),
    ],
)
def test_what_grows_to_the_end_is_found(memory: int, threads: int, disk: int, grown: list[str]) -> None:
    held = [
        Held(
            seconds=float(third),
            memory=(100 + 30 * memory * (third == 2)) * 10**6,
            descriptors=20,
            processes=3,
            threads=20 + 30 * threads * (third == 2),
            disk=(60 + 60 * disk * (third == 2)) * 10**6,
        )
        for third in range(3)
        for _ in range(10)
    ]
    assert growth(held) == grown
