"""What an origin's facts say about versions."""

import pytest

from shardmill.core.origins import OriginFacts, Validator


def facts(*, size: int | None = 10, etag: str | None = None, modified: float | None = None) -> OriginFacts:
    return OriginFacts("key", size, etag, modified)


@pytest.mark.parametrize(
    ("found", "validator"),
    [
        (facts(etag="a", modified=1.0), "strong"),
        (facts(size=None, etag="a"), "strong"),
        (facts(modified=1.0), "dated"),
        (facts(size=None, modified=1.0), "none"),
        (facts(), "none"),
    ],
)
def test_a_version_is_worth_what_it_is_known_by(found: OriginFacts, validator: Validator) -> None:
    assert found.validator == validator


def test_versions_differ_by_etag_alone_where_there_is_one() -> None:
    assert facts(etag="a", modified=1.0).version == facts(etag="a", modified=2.0).version
    assert facts(etag="a").version != facts(etag="b").version


def test_without_an_etag_versions_differ_by_size_and_date() -> None:
    versions = {
        facts(size=size, modified=modified).version for size in (1, 2, None) for modified in (1.0, 2.0, None)
    } | {facts(etag="1:2").version}
    assert len(versions) == 10
