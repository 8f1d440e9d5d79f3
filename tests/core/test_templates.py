"""Shard templates: braces as bash itself expands them, AIStore's `@`, counters against a listing."""

import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardmill.core.errors import BadRequest
from shardmill.core.templates import MAX_NAMES, expand, listing_prefix, match_listing, needs_listing

TEMPLATES = [
    "shard-{000000..000005}.tar",
    "{0..3}",
    "{3..0}",
    "{-2..2}",
    "{00..10..5}",
    "{0..10..3}",
    "{10..0..3}",
    "{0..10..-3}",
    "{01..3}",
    "{1..03}",
    "{-01..10..5}",
    "{a..e}",
    "{e..a..2}",
    "{a,b}",
    "{a,b}{0..1}",
    "x{a,b{1..3},c}y",
    "{{a,b},{c,d}}",
    "train/{train,val}-{00..02}.tar",
    "{a,}b",
    "{,a}",
    "{a}",
    "{}",
    "a{}b",
    "plain.tar",
    "{1..1}",
    "{5..5..2}",
    "{a,b,c}-{x,y}",
    "{0..2..0}",
    "{0..2..1}",
    "{a..c}{1..2}{x,y}",
    "{1...3}",
    "{1..}",
    "{..3}",
    "{1..b}",
    "{a..3}",
    "{1.5..3}",
]


def bash(template: str) -> list[str]:
    """What bash expands a word of these characters to."""
    script = f"printf '%s\\0' {template}"
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, check=True, text=True, timeout=20)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_expand_as_bash_does(template: str) -> None:
    assert expand(template) == [word for word in bash(template) if word]


_WORDS = st.recursive(
    st.one_of(
        st.text(alphabet="ab.-/0", min_size=1, max_size=3),
        st.builds("{{{}..{}}}".format, st.integers(-12, 12), st.integers(-12, 12)),
        st.builds("{{{:02d}..{:03d}..{}}}".format, st.integers(-9, 12), st.integers(-9, 12), st.integers(-3, 3)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(_WORDS)
@example("{-02..-10..3}")
def test_any_nest_of_braces_expands_as_bash_does(template: str) -> None:
    assert expand(template) == [word for word in bash(template) if word]


@pytest.mark.parametrize("template", ["{a,b", "a{b", "{{a,b}", "{0..3", "a}b", "{a,b}}", "}{", "{a,}b}", "{" * 5000])
def test_braces_without_their_other_half_are_refused(template: str) -> None:
    """Bash keeps them; in a template they are more likely a typo than a name."""
    with pytest.raises(BadRequest, match="unbalanced braces"):
        expand(template)


def test_deep_nests_are_refused_and_what_can_be_counted_is_expanded() -> None:
    with pytest.raises(BadRequest, match="nested more than"):
        expand("{" * 3000 + "a,b" + "}" * 3000)
    assert expand("{" * 20 + "a,b" + "}" * 20) == bash("{" * 20 + "a,b" + "}" * 20)
    assert len(expand("{{0..999},{0..9999}}")) == 11_000


def test_an_at_counts_from_zero_to_its_number_inclusive() -> None:
    assert expand("shard-@3.tar") == [f"shard-{number}.tar" for number in range(4)]
    assert expand("shard-@0.tar") == ["shard-0.tar"]
    assert expand("a@1-{x,y}") == ["a0-x", "a0-y", "a1-x", "a1-y"]
    assert expand("user@host.tar") == ["user@host.tar"]


@pytest.mark.parametrize(
    "template",
    [
        "{0..999999999}",
        "@999999999",
        "{0..9999}{0..9999}",
        "{a,b}{0..999999}",
        "{a,{0..600000},{0..600000}}" + "{0..9}",
        "{a,b}" * 24,
        "{{a,b}{0..9999}{0..9999},c}",
        "{1..2" + "0" * 30 + "}",
    ],
)
def test_a_template_of_more_than_a_million_names_is_refused_before_it_fills_the_memory(template: str) -> None:
    with pytest.raises(BadRequest, match=f"more than {MAX_NAMES}"):
        expand(template)


def test_a_large_template_that_is_allowed_expands() -> None:
    names = expand("shard-{000000..099999}.tar")
    assert len(names) == 100_000
    assert names[-1] == "shard-099999.tar"


def test_a_counter_needs_the_listing() -> None:
    assert needs_listing("shard-%06d.tar")
    assert needs_listing("shard-%d.tar")
    assert not needs_listing("100%.tar")
    assert not needs_listing("shard-{0..3}.tar")
    assert listing_prefix("train/shard-%06d.tar") == "train/shard-"
    assert listing_prefix("plain") == "plain"
    with pytest.raises(BadRequest, match="listing"):
        expand("shard-%06d.tar")


@pytest.mark.parametrize(
    ("template", "matching"),
    [
        ("s-%06d.tar", ["s-000000.tar", "s-123456.tar", "s-1234567.tar"]),
        ("s-%d.tar", ["s-0.tar", "s-123456.tar", "s-1234567.tar"]),
        ("s-%02d.t%d", ["s-01.t1"]),
    ],
)
def test_a_counter_matches_what_printf_would_write(template: str, matching: list[str]) -> None:
    keys = [
        "s-0.tar",
        "s-000000.tar",
        "s-01.t1",
        "s-123456.tar",
        "s-1234567.tar",
        "s-00000.tar",
        "s-00001.tar",
        "s-.tar",
        "s-00000a.tar",
        "xs-000000.tar",
        "s-000000.tar.gz",
        "s-000000xtar",
        "s-٠٠٠٠٠٠.tar",
    ]
    expected = [key for key in keys if key in matching]
    assert list(match_listing(template, keys)) == expected


@given(st.integers(0, 10**8), st.integers(1, 9))
def test_what_printf_writes_is_matched_and_a_longer_zero_padding_is_not(number: int, width: int) -> None:
    assert list(match_listing(f"a%0{width}d", [f"a{number:0{width}d}"])) == [f"a{number:0{width}d}"]
    assert list(match_listing(f"a%0{width}d", [f"a{number:0{width + 9}d}"])) == []
