"""URL paths: what the SDK builds, the server reads back; everything that decides the bytes is in the last segment."""

import pytest
from hypothesis import assume, given

from shardmill.core.errors import BadRequest
from shardmill.core.paths import (
    MAX_SEGMENT,
    folder_key,
    object_path,
    parse_object_path,
    parse_transformed_path,
    render_transformed,
    transformed_path,
)
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import Spec
from tests.core.names import refs, specs

SPEC = Spec.parse("t@1f3a9c2e0b1d,seed=7")


@given(refs)
def test_an_object_is_read_back_from_its_path(ref: ObjectRef) -> None:
    assert parse_object_path(object_path(ref)) == ref


@given(refs, specs(versioned=True))
def test_a_transformed_object_is_read_back_from_its_path(ref: ObjectRef, spec: Spec) -> None:
    assume(not ref.key.endswith("/"))
    segment = render_transformed(ref, spec.with_options(k=folder_key(ref))).rpartition("/")[2]
    if len(segment) > MAX_SEGMENT:
        with pytest.raises(BadRequest, match=f"at most {MAX_SEGMENT}"):
            transformed_path(ref, spec)
        return
    path = transformed_path(ref, spec)
    parsed = parse_transformed_path(path)
    assert parsed.ref == ref
    assert str(parsed.spec) == str(spec.with_options(k=folder_key(ref)))
    assert path.endswith(segment)


def test_the_path_is_the_one_of_the_design() -> None:
    ref = ObjectRef.parse("gs://sharded-imagenet/train/imagenet-train-000000.tar")
    spec = Spec.parse("imagenet-train@1f3a9c2e0b1d,seed=7,epoch=3")
    assert transformed_path(ref, spec) == (
        "/t/gs/sharded-imagenet/train/imagenet-train@1f3a9c2e0b1d,seed=7,epoch=3,"
        f"k={folder_key(ref)}~imagenet-train-000000.tar"
    )
    assert object_path(ref) == "/o/gs/sharded-imagenet/train/imagenet-train-000000.tar"


def test_equal_file_names_of_two_folders_have_different_last_segments() -> None:
    segments = {
        transformed_path(ObjectRef.parse(f"gs://imgs/{folder}a.tar"), SPEC).rpartition("/")[2]
        for folder in ("", "train/", "val/", "train/val/")
    }
    assert len(segments) == 4


def test_a_wrong_k_is_refused_naming_the_right_one() -> None:
    ref = ObjectRef.parse("gs://imgs/train/a.tar")
    with pytest.raises(BadRequest, match=f"it is {folder_key(ref)}"):
        parse_transformed_path("/t/gs/imgs/train/t@1f3a9c2e0b1d,k=0000~a.tar")


@pytest.mark.parametrize("digits", [4, 5, 8])
def test_k_may_have_four_to_eight_digits_or_be_left_out(digits: int) -> None:
    ref = ObjectRef.parse("gs://imgs/train/a.tar")
    path = f"/t/gs/imgs/train/t@1f3a9c2e0b1d,k={folder_key(ref, digits)}~a.tar"
    assert parse_transformed_path(path).ref == ref
    assert parse_transformed_path("/t/gs/imgs/train/t@1f3a9c2e0b1d~a.tar").spec.k is None


def test_the_last_segment_is_split_at_its_first_raw_tilde() -> None:
    parsed = parse_transformed_path("/t/gs/imgs/di~r/t~a~b.tar")
    assert parsed.spec == Spec("t")
    assert parsed.ref.key == "di~r/a~b.tar"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/t/gs/imgs/a.tar", "there is no '~'"),
        ("/t/gs/imgs/t@1f3a9c2e0b1d%7Ea.tar", "there is no '~'"),
        ("/t/gs/imgs/t~", "the file is empty"),
        ("/t/gs/imgs/~a.tar", "bad transform name"),
        ("/t/gs/imgs/t%401f3a9c2e0b1d~a.tar", "write 't@1f3a9c2e0b1d'"),
        ("/t/gs/imgs/t@1f3a9c2e0b1d,seed=01~a.tar", "write 't@1f3a9c2e0b1d,seed=1'"),
        ("/t/gcp/imgs/t~a.tar", "write 'gs'"),
        ("/t/gs/imgs", "/t/provider/bucket/key"),
        ("/t/gs/imgs/", "/t/provider/bucket/key"),
        ("/t", "/t/provider/bucket/key"),
        ("/t/gs/im%2Fgs/t~a.tar", "bad bucket name"),
        ("/t/gs/%2e%2e/t~a.tar", "bad bucket name"),
        ("/t/gs/imgs/t~a%2.tar", "two hex digits"),
        ("/t/gs/imgs/t~a%ff.tar", "not valid UTF-8"),
        ("/t/gs/imgs/t~a%00.tar", "control characters"),
        ("/t/gs/imgs/t~dir%2Fa.tar", "/t/gs/imgs/dir/t~a.tar"),
    ],
)
def test_what_is_no_transformed_path_is_refused_with_the_reason(path: str, reason: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_transformed_path(path)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/o/gs/imgs", "/o/provider/bucket/key"),
        ("/o/gs/imgs/", "/o/provider/bucket/key"),
        ("/o/gcp/imgs/a", "in a path write 'gs'"),
        ("/o/ht/imgs/a", "in a path write 'http'"),
        ("/o/gs/../a", "bad bucket name"),
        ("/o/gs/IMGS/a", "bad bucket name"),
        ("/o/gs/imgs/%", "two hex digits"),
        ("/o/gs/imgs/" + "a" * 1025, "1025 bytes"),
    ],
)
def test_what_is_no_object_path_is_refused_with_the_reason(path: str, reason: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_object_path(path)
    assert reason in str(refused.value)


@pytest.mark.parametrize("key", ["../../etc/passwd", "a//b", "/a", "a/", "%2e%2e", "a%2Fb", "c:\\x", "é", "e\u0301"])
def test_a_key_keeps_every_character_of_its_path(key: str) -> None:
    ref = ObjectRef.parse(f"ais://imgs/{key}")
    assert parse_object_path(object_path(ref)).key == key


def test_a_segment_of_243_bytes_is_taken_and_one_of_244_is_not() -> None:
    spec = Spec.parse("t@1f3a9c2e0b1d")
    room = MAX_SEGMENT - len(f"{spec},k=0000~")
    fits, over = (ObjectRef.parse(f"gs://imgs/{'a' * size}") for size in (room, room + 1))
    assert parse_transformed_path(transformed_path(fits, spec)).ref == fits
    with pytest.raises(BadRequest, match="has 244 bytes"):
        transformed_path(over, spec)
    with pytest.raises(BadRequest, match="has 244 bytes"):
        parse_transformed_path(render_transformed(over, spec.with_options(k=folder_key(over))))


def test_a_bare_name_and_a_key_without_a_file_have_no_path() -> None:
    with pytest.raises(BadRequest, match="names no version"):
        transformed_path(ObjectRef.parse("gs://imgs/a.tar"), Spec("t"))
    with pytest.raises(BadRequest, match="no file name"):
        transformed_path(ObjectRef.parse("gs://imgs/dir/"), SPEC)
