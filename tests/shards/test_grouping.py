"""Which members are one sample."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardmill.shards import split_name
from shardmill.shards.grouping import is_meta


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("0001.seg.png", ("0001", "seg.png")),
        ("train/n01/0001.JPG", ("train/n01/0001", "jpg")),
        ("train/n01.v2/0001.Seg.PNG", ("train/n01.v2/0001", "seg.png")),
        ("./0001.jpg", ("./0001", "jpg")),
        ("/abs/0001.jpg", ("/abs/0001", "jpg")),
        ("../0001.jpg", ("../0001", "jpg")),
        ("0001.", ("0001", "")),
        ("README", None),
        ("", None),
        (".hidden", None),
        ("dir.v1/README", None),
        ("dir/.jpg", ("dir/", "jpg")),
        ("dir.v1/.jpg", None),
    ],
)
def test_a_name_splits_at_the_first_dot_of_its_last_part(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


# The documented rule of the format, which the implementation spells out without backtracking.
RULE = re.compile(r"((?:.*/)?[^.]+)[.]([^/]*)")


@settings(max_examples=2000, deadline=None)
@given(st.text("ab./\n", max_size=12))
@example("a.b//.c")
@example("a\n/b.c/d.e")
@example("a.b\n/c/d.e")
def test_splitting_agrees_with_the_rule_as_a_regular_expression(name: str) -> None:
    match = RULE.fullmatch(name)

    assert split_name(name) == (match and match.groups())


def test_splitting_takes_linear_time() -> None:
    """A regular expression would need minutes for this name, which a shard's author may choose."""
    assert split_name("a/" * 500_000) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("__meta__", True),
        ("__meta__/0001.jpg", True),
        ("__a.b__", True),
        ("__meta__.json", False),
        ("__x.jpg", False),
        ("dir/__meta__", False),
        ("0001.jpg", False),
    ],
)
def test_members_that_webdataset_passes_over(name: str, expected: bool) -> None:
    assert is_meta(name) is expected
