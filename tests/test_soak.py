"""Half a minute of mixed traffic; ten minutes of it, with slopes, are `make soak`."""

from pathlib import Path

from benchmarks.soak import CODE, READERS, soak

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
