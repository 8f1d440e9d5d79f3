"""Conditional requests: the tables of RFC 9110 §13."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.conditions import Conditions, http_date

ETAG = "abc"
MODIFIED = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC).timestamp() + 0.75
BEFORE, SAME, AFTER = (http_date(MODIFIED + seconds) for seconds in (-1, 0, 1))


def parse(**headers: str) -> Conditions:
    return Conditions.parse({name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("headers", "verdict"),
    [
        ({}, "proceed"),
        # §13.1.1 If-Match: strong comparison
        ({"If_Match": '"abc"'}, "proceed"),
        ({"If_Match": '"x", "abc"'}, "proceed"),
        ({"If_Match": '"x" ,"abc" '}, "proceed"),
        ({"If_Match": "*"}, "proceed"),
        ({"If_Match": " * "}, "proceed"),
        ({"If_Match": '"x"'}, "failed"),
        ({"If_Match": 'W/"abc"'}, "failed"),
        ({"If_Match": '"*"'}, "failed"),
        ({"If_Match": "abc"}, "failed"),
        ({"If_Match": ""}, "failed"),
        # §13.1.2 If-None-Match: weak comparison
        ({"If_None_Match": '"abc"'}, "not_modified"),
        ({"If_None_Match": 'W/"abc"'}, "not_modified"),
        ({"If_None_Match": '"x", W/"abc"'}, "not_modified"),
        ({"If_None_Match": "*"}, "not_modified"),
        ({"If_None_Match": '"x"'}, "proceed"),
        ({"If_None_Match": '"*"'}, "proceed"),
        ({"If_None_Match": "abc"}, "proceed"),
        # §13.1.3 If-Modified-Since
        ({"If_Modified_Since": SAME}, "not_modified"),
        ({"If_Modified_Since": AFTER}, "not_modified"),
        ({"If_Modified_Since": BEFORE}, "proceed"),
        ({"If_Modified_Since": "yesterday"}, "proceed"),
        ({"If_Modified_Since": "Tue, 99 Nov 2026 12:00:00 GMT"}, "proceed"),
        ({"If_Modified_Since": "Tuesday, 24-Nov-26 12:00:00 GMT"}, "not_modified"),
        ({"If_Modified_Since": "Tue Nov 24 12:00:00 2026"}, "not_modified"),
        # §13.1.4 If-Unmodified-Since
        ({"If_Unmodified_Since": SAME}, "proceed"),
        ({"If_Unmodified_Since": AFTER}, "proceed"),
        ({"If_Unmodified_Since": BEFORE}, "failed"),
        ({"If_Unmodified_Since": "yesterday"}, "proceed"),
        # §13.2.2 precedence: ETags decide, dates beside them are ignored; If-Match comes before If-None-Match
        ({"If_Match": '"abc"', "If_Unmodified_Since": BEFORE}, "proceed"),
        ({"If_Match": '"x"', "If_Unmodified_Since": AFTER}, "failed"),
        ({"If_None_Match": '"x"', "If_Modified_Since": AFTER}, "proceed"),
        ({"If_None_Match": '"abc"', "If_Modified_Since": BEFORE}, "not_modified"),
        ({"If_Match": '"abc"', "If_None_Match": '"abc"'}, "not_modified"),
        ({"If_Match": '"x"', "If_None_Match": '"abc"'}, "failed"),
        ({"If_Unmodified_Since": BEFORE, "If_None_Match": '"abc"'}, "failed"),
        ({"If_Unmodified_Since": AFTER, "If_None_Match": '"abc"'}, "not_modified"),
        ({"If_Unmodified_Since": SAME, "If_Modified_Since": SAME}, "not_modified"),
    ],
)
def test_a_read_is_judged(headers: dict[str, str], verdict: str) -> None:
    assert parse(**headers).judge_read(ETAG, MODIFIED) == verdict


@pytest.mark.parametrize(
    ("headers", "on_existing", "on_missing"),
    [
        ({}, "proceed", "proceed"),
        ({"If_Match": '"abc"'}, "proceed", "failed"),
        ({"If_Match": '"x"'}, "failed", "failed"),
        ({"If_Match": "*"}, "proceed", "failed"),
        ({"If_Match": 'W/"abc"'}, "failed", "failed"),
        ({"If_None_Match": "*"}, "failed", "proceed"),
        ({"If_None_Match": '"abc"'}, "failed", "proceed"),
        ({"If_None_Match": '"x"'}, "proceed", "proceed"),
        ({"If_None_Match": '"*"'}, "proceed", "proceed"),
        ({"If_Unmodified_Since": BEFORE}, "failed", "proceed"),
        ({"If_Unmodified_Since": SAME}, "proceed", "proceed"),
        ({"If_Modified_Since": AFTER}, "proceed", "proceed"),
        ({"If_Match": '"abc"', "If_None_Match": '"x"'}, "proceed", "failed"),
        ({"If_Match": '"abc"', "If_Unmodified_Since": BEFORE}, "proceed", "failed"),
    ],
)
def test_a_write_is_judged(headers: dict[str, str], on_existing: str, on_missing: str) -> None:
    conditions = parse(**headers)
    assert conditions.judge_write(ETAG, MODIFIED) == on_existing
    assert conditions.judge_write(None, None) == on_missing


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (None, True),
        ('"abc"', True),
        ('"x"', False),
        ('W/"abc"', False),
        ("abc", False),
        ("*", False),
        ('"abc", "x"', False),
        ("", False),
        (SAME, True),
        (BEFORE, False),
        (AFTER, False),
        ("yesterday", False),
    ],
)
def test_a_range_is_allowed_only_of_the_version_that_if_range_names(header: str | None, allowed: bool) -> None:
    conditions = parse() if header is None else parse(If_Range=header)
    assert conditions.allows_range(ETAG, MODIFIED) is allowed


def test_an_object_without_an_etag_matches_none() -> None:
    assert parse(If_Match='"abc"').judge_read(None, MODIFIED) == "failed"
    assert parse(If_None_Match='"abc"').judge_read(None, MODIFIED) == "proceed"
    assert parse(If_None_Match="*").judge_read(None, MODIFIED) == "not_modified"
    assert not parse(If_Range='"abc"').allows_range(None, MODIFIED)


def test_an_empty_etag_is_an_etag() -> None:
    assert parse(If_None_Match='""').judge_read("", MODIFIED) == "not_modified"
    assert parse(If_None_Match='""').judge_read(ETAG, MODIFIED) == "proceed"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0xFF), max_size=40)
            | st.text(alphabet='W/"*abc, ', max_size=20)
            | st.sampled_from(
                [
                    BEFORE,
                    SAME,
                    AFTER,
                    "Mon, 01 Jan 0001 00:00:00 GMT",
                    "Fri, 31 Dec 9999 23:59:59 +2359",
                    "1 Jan 1 0:0:0 -9999",
                ]
            )
            for name in ("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range")
        },
    )
)
def test_any_headers_have_a_verdict(headers: dict[str, str]) -> None:
    conditions = Conditions.parse(headers)
    assert conditions.judge_read(ETAG, MODIFIED) in ("proceed", "not_modified", "failed")
    assert conditions.judge_write(ETAG, MODIFIED) in ("proceed", "failed")
    assert conditions.judge_write(None, None) in ("proceed", "failed")
    assert conditions.allows_range(ETAG, MODIFIED) in (True, False)


@given(st.floats(0, 4e9))
def test_last_modified_sent_back_means_not_modified(modified: float) -> None:
    conditions = parse(If_Modified_Since=http_date(modified), If_Unmodified_Since=http_date(modified))
    assert conditions.judge_read(ETAG, modified) == "not_modified"
    assert parse(If_Range=http_date(modified)).allows_range(ETAG, modified)


def test_dates_are_those_of_http() -> None:
    assert http_date(784111777.9) == "Sun, 06 Nov 1994 08:49:37 GMT"
