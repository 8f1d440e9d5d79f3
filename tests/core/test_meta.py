"""Metadata is a value."""

import msgspec
import pytest

from shardmill.core.meta import ListPage, ObjectMeta


def test_metadata_is_compared_by_value_and_never_changed() -> None:
    meta = ObjectMeta("key", 5, "etag", "v1", 1.5)
    assert meta == ObjectMeta("key", 5, "etag", "v1", 1.5, None, {})
    assert meta != msgspec.structs.replace(meta, version="v2")
    with pytest.raises(AttributeError, match="immutable"):
        meta.size = 6  # type: ignore[misc]  # that it cannot be set is what is tested
    assert ListPage((meta,), (), None).objects[0] is meta


def test_two_objects_never_share_user_metadata() -> None:
    first, second = (ObjectMeta(key, 0, None, "v", 0.0) for key in "ab")
    assert first.user == {}
    assert first.user is not second.user
