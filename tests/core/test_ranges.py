"""Byte ranges of RFC 9110 §14, against a plain reading of the rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.ranges import ByteRange, content_range

SIZE = 10


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-9", (0, 10)),
        ("bytes=0-10", (0, 10)),
        ("bytes=3-", (3, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-10", (0, 10)),
        ("bytes=-11", (0, 10)),
        ("bytes=9-9", (9, 10)),
        ("bytes= 2-4 ", (2, 5)),
        ("bytes=00002-0004", (2, 5)),
        (f"bytes={'0' * 40}2-{'0' * 40}4", (2, 5)),
        (f"bytes=2-{2**63}", (2, 10)),
        (f"bytes=2-{'9' * 40}", (2, 10)),
        (f"bytes=2-{'9' * 8000}", (2, 10)),
        (f"bytes=-{'9' * 40}", (0, 10)),
    ],
)
def test_a_range_that_can_be_satisfied(header: str, expected: tuple[int, int]) -> None:
    found = ByteRange.parse(header)
    assert found is not None
    assert found.resolve(SIZE) == expected


@pytest.mark.parametrize(
    "header",
    ["bytes=10-", "bytes=10-20", "bytes=-0", f"bytes={2**63}-", f"bytes={'9' * 40}-", f"bytes={'9' * 40}-{'9' * 41}"],
)
def test_a_range_outside_the_object_cannot_be_satisfied(header: str) -> None:
    found = ByteRange.parse(header)
    assert found is not None
    assert found.resolve(SIZE) is None


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0"])
def test_no_range_of_an_empty_object_can_be_satisfied(header: str) -> None:
    found = ByteRange.parse(header)
    assert found is not None
    assert found.resolve(0) is None


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5-2",
        f"bytes={'9' * 41}-{'9' * 40}",
        "bytes=a-b",
        "bytes=1-2,4-5",
        "bytes=1-2,",
        "bytes=--1",
        "bytes=+1-2",
        "bytes=1 - 2",
        "bytes=1-2-3",
        "bytes=٣-٤",
        "items=0-1",
        "bytes 0-1",
    ],
)
def test_a_malformed_or_multiple_range_is_ignored(header: str | None) -> None:
    assert ByteRange.parse(header) is None


@given(st.text(alphabet="bytes=-,0123456789 ", max_size=30) | st.text(max_size=20))
def test_any_header_is_a_range_or_ignored(header: str) -> None:
    found = ByteRange.parse(header)
    if found is not None:
        resolved = found.resolve(SIZE)
        assert resolved is None or 0 <= resolved[0] < resolved[1] <= SIZE


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 15))
def test_start_and_stop_are_those_of_the_inclusive_form(first: int, last: int, size: int) -> None:
    data = bytes(range(size))
    found = ByteRange.parse(f"bytes={first}-{last}")
    if last < first:
        assert found is None
        return
    assert found is not None
    resolved = found.resolve(size)
    expected = data[first : last + 1]
    assert (b"" if resolved is None else data[resolved[0] : resolved[1]]) == expected


@given(st.integers(0, 20), st.integers(0, 15))
def test_a_suffix_is_the_end_of_the_object(count: int, size: int) -> None:
    data = bytes(range(size))
    found = ByteRange.parse(f"bytes=-{count}")
    assert found is not None
    resolved = found.resolve(size)
    assert (b"" if resolved is None else data[resolved[0] : resolved[1]]) == data[max(0, size - count) :][: count or 0]


@given(
    st.one_of(
        st.builds(lambda start, length: ByteRange(start, start + 1 + length), st.integers(0, 99), st.integers(0, 99)),
        st.builds(lambda start: ByteRange(start, None), st.integers(0, 99)),
        st.builds(lambda stop: ByteRange(None, stop), st.integers(0, 99)),
    )
)
def test_a_range_is_read_back_from_its_header(found: ByteRange) -> None:
    assert ByteRange.parse(str(found)) == found


def test_content_range_is_inclusive() -> None:
    assert content_range(2, 5, 10) == "bytes 2-4/10"
