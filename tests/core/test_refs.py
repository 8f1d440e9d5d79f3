"""Names of buckets and objects: one spelling, refused with the rule that they break."""

import re
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.errors import BadRequest
from shardmill.core.refs import ALIASES, MAX_KEY, PROVIDERS, Bucket, ObjectRef, check_key, quote_key, unquote_path
from tests.core.names import buckets, keys, refs


@given(buckets)
def test_a_bucket_is_read_back_from_its_uri(bucket: Bucket) -> None:
    assert Bucket.parse(str(bucket)) == bucket
    assert Bucket.parse(f"{bucket}/") == bucket


@given(refs)
def test_an_object_is_read_back_from_its_uri(ref: ObjectRef) -> None:
    assert ObjectRef.parse(str(ref)) == ref


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_accepted_in_a_uri_and_named_where_it_is_not(alias: str) -> None:
    assert Bucket.parse(f"{alias}://name").provider == ALIASES[alias]
    with pytest.raises(BadRequest, match=f"write '{ALIASES[alias]}'"):
        Bucket.of(alias, "name")


def test_the_provider_http_is_written_ht_so_that_it_is_no_web_address() -> None:
    assert str(Bucket.of("http", "origin")) == "ht://origin"
    assert str(Bucket.parse("ht://origin")) == "ht://origin"


@pytest.mark.parametrize("provider", ["", "AIS", "ftp", "gs ", "file", "ais\n"])
def test_an_unknown_provider_is_refused_with_the_known_ones(provider: str) -> None:
    with pytest.raises(BadRequest, match=", ".join(PROVIDERS)):
        Bucket.of(provider, "name")


@pytest.mark.parametrize(
    ("uri", "meant"),
    [("imgs", "e.g. ais://imgs"), ("gs:/imgs", "gs://imgs"), ("gcp:imgs", "gcp://imgs"), ("", "e.g. ais://name")],
)
def test_a_bucket_without_a_provider_is_told_how_it_is_written(uri: str, meant: str) -> None:
    with pytest.raises(BadRequest, match=f"has no provider; write {meant}$"):
        Bucket.parse(uri)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "ab",
        "a" * 64,
        "Upper",
        "-a-",
        "abc-",
        ".abc",
        "a..b",
        "192.168.0.1",
        "xn--name",
        "na me",
        "na/me",
        "na\\me",
        "c:name",
        "..",
        "%2e%2e",
        "name\n",
        "näme",
        "٣٣٣",
    ],
)
def test_a_bad_bucket_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(BadRequest, match="3 to 63 of a-z"):
        Bucket.of("ais", name)


@pytest.mark.parametrize("name", ["abc", "a" * 63, "a.b_c-d", "1a1", "192.168.0.256.1"])
def test_a_good_bucket_name_is_taken(name: str) -> None:
    assert Bucket.of("ais", name).name == name


@pytest.mark.parametrize("uri", ["name", "ais:/name/key", "ais://name", "ais://name/", "", "://", "ais:///key"])
def test_what_is_no_object_uri_is_refused(uri: str) -> None:
    with pytest.raises(BadRequest):
        ObjectRef.parse(uri)


def test_a_bucket_without_a_provider_names_the_way_out() -> None:
    with pytest.raises(BadRequest, match="ais://photos"):
        Bucket.parse("photos")


def test_a_key_is_at_most_1024_bytes_of_utf8() -> None:
    assert check_key("a" * MAX_KEY) == "a" * MAX_KEY
    assert check_key("é" * (MAX_KEY // 2))
    for long in ("a" * (MAX_KEY + 1), "é" * (MAX_KEY // 2) + "a"):
        with pytest.raises(BadRequest, match="1025 bytes; at most 1024"):
            check_key(long)


@pytest.mark.parametrize(
    ("key", "rule"), [("", "empty"), ("a\0b", "control"), ("a\n", "control"), ("\x7f", "control"), ("\ud800", "UTF-8")]
)
def test_a_bad_key_is_refused_with_the_rule(key: str, rule: str) -> None:
    with pytest.raises(BadRequest, match=rule):
        check_key(key)


@pytest.mark.parametrize(
    "key", ["a//b", "/a", "a/", ".", "..", "../../etc/passwd", "\\", "e\u0301", "\u00e9", "🙂", "a%2Fb"]
)
def test_a_key_is_opaque_and_never_normalised(key: str) -> None:
    assert ObjectRef.parse(f"ais://name/{key}").key == key


@given(keys)
def test_a_quoted_key_is_read_back_and_never_holds_what_clients_expand(key: str) -> None:
    quoted = quote_key(key)
    assert unquote_path(quoted) == key == unquote(quoted, errors="strict")
    assert not set(quoted) & set("{}$;:%# ?&+") - {"%"}
    assert quoted.isascii()


@given(st.text(max_size=40))
def test_any_text_is_a_bucket_or_refused_and_nothing_else(text: str) -> None:
    try:
        bucket = Bucket.parse(text)
    except BadRequest:
        return
    assert Bucket.parse(str(bucket)) == bucket


@pytest.mark.parametrize("raw", ["%", "a%2", "a%zz", "%%41"])
def test_a_bad_escape_is_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="two hex digits"):
        unquote_path(raw)


@pytest.mark.parametrize("raw", ["%ff", "a%c3", "%ed%a0%80", "%c0%af"])
def test_escapes_that_are_not_utf8_are_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="not valid UTF-8"):
        unquote_path(raw)


def test_a_plus_is_a_plus() -> None:
    assert unquote_path("a+b%2Bc") == "a+b+c"


@given(st.binary(max_size=30))
def test_any_bytes_percent_encoded_are_decoded_or_refused(data: bytes) -> None:
    raw = quote(data)
    try:
        expected = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(BadRequest):
            unquote_path(raw)
    else:
        assert unquote_path(raw) == expected


def test_buckets_sort_and_compare_by_value() -> None:
    assert Bucket.of("ais", "abc") == Bucket.parse("ais://abc")
    assert sorted([Bucket.of("s3", "abc"), Bucket.of("ais", "xyz")])[0].provider == "ais"
    assert re.fullmatch(r"ais://abc/k", str(ObjectRef.of(Bucket.of("ais", "abc"), "k")))
