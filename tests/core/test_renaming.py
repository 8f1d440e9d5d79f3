"""Templates for the keys of a job's results."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.errors import BadRequest
from shardmill.core.renaming import literal, rename_all

KEYS = ["data/train/a-000000.tar", "data/train/b.v1.tar"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{key}", KEYS),
        ("small/{path}", ["small/train/a-000000.tar", "small/train/b.v1.tar"]),
        ("{name}", ["a-000000.tar", "b.v1.tar"]),
        ("{dirs}{stem}-small{ext}", ["data/train/a-000000-small.tar", "data/train/b.v1-small.tar"]),
        ("s-{index}.tar", ["s-0.tar", "s-1.tar"]),
        ("s-{index:06d}.tar", ["s-000000.tar", "s-000001.tar"]),
        ("{{{name}}}", ["{a-000000.tar}", "{b.v1.tar}"]),
    ],
)
def test_fields_stand_for_parts_of_the_key(template: str, expected: list[str]) -> None:
    assert rename_all(template, KEYS, base="data/") == expected


def test_a_name_without_dot_or_folder_has_empty_parts() -> None:
    assert rename_all("{dirs}|{stem}|{ext}", ["x"], base="") == ["|x|"]


@pytest.mark.parametrize("template", ["{nothing}", "{key", "key}", "{}", "{key:03d}", "{index:x}", "{key!r}"])
def test_what_is_no_template_is_refused_with_the_fields_there_are(template: str) -> None:
    with pytest.raises(BadRequest, match=r"\{stem\}"):
        rename_all(template, KEYS, base="")


def test_two_sources_are_never_one_target() -> None:
    with pytest.raises(BadRequest, match=r"'x.tar' of both 'a/x.tar' and 'b/x.tar'"):
        rename_all("{name}", ["a/x.tar", "b/x.tar"], base="")


@given(st.text())
def test_a_literal_gives_itself(text: str) -> None:
    assert rename_all(literal(text), ["key"], base="") == [text]
