"""Pages of a listing: prefix, delimiter and resumption against a plain reading of the rule."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.meta import ListPage, ObjectMeta
from shardmill.storage.paging import Seek, list_page, successor


def meta_of(key: str) -> ObjectMeta:
    return ObjectMeta(key, 1, "e", "v", 0.0)


def seek_over(keys: list[str], *, gone: frozenset[str] = frozenset(), seeks: list[bytes] | None = None) -> Seek[bool]:
    ordered = sorted(key.encode() for key in keys)

    def seek(bound: bytes) -> Iterator[tuple[bytes, bool]]:
        if seeks is not None:
            seeks.append(bound)
        for key in ordered:
            if key >= bound:
                yield key, key.decode() in gone

    return seek


def entries_of(keys: list[str], prefix: str, delimiter: str, after: str) -> list[tuple[str, bool]]:
    """All entries by the rule: name and whether it is a rolled-up prefix, in order of their bytes."""
    found = set()
    for key in keys:
        if not key.startswith(prefix):
            continue
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        found.add((key, False) if cut < 0 else (key[: cut + len(delimiter)], True))
    return sorted(
        (entry for entry in found if not after or entry[0].encode() > after.encode()),
        key=lambda entry: entry[0].encode(),
    )


def entries_on(page: ListPage) -> list[tuple[str, bool]]:
    found = [(meta.key, False) for meta in page.objects] + [(name, True) for name in page.prefixes]
    return sorted(found, key=lambda entry: entry[0].encode())


def load(key: bytes, is_gone: bool) -> ObjectMeta | None:
    return None if is_gone else meta_of(key.decode())


ALPHABET = st.text(alphabet="ab/.é\U0001f642\uffff", min_size=1, max_size=6)


@given(
    keys=st.lists(ALPHABET, unique=True, max_size=25),
    prefix=st.just("") | st.text(alphabet="ab/é", max_size=2),
    delimiter=st.sampled_from(["", "/", "a", "//", "é", "."]),
    after=st.just("") | ALPHABET,
    limit=st.integers(1, 5),
)
def test_the_pages_together_are_the_rule(keys: list[str], prefix: str, delimiter: str, after: str, limit: int) -> None:
    expected = entries_of(keys, prefix, delimiter, after)
    found: list[tuple[str, bool]] = []
    at: str | None = after
    while at is not None:
        page = list_page(seek_over(keys), load, prefix=prefix, delimiter=delimiter, after=at, limit=limit)
        entries = entries_on(page)
        assert len(entries) <= limit
        assert page.next is None or (len(entries) == limit and page.next == entries[-1][0])
        found += entries
        at = page.next
    assert found == expected


def test_the_last_page_has_no_next_even_if_it_is_full() -> None:
    page = list_page(seek_over(["a", "b"]), load, prefix="", delimiter="", after="", limit=2)
    assert [meta.key for meta in page.objects] == ["a", "b"]
    assert page.next is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_of_nothing_is_empty(limit: int) -> None:
    assert list_page(seek_over(["a"]), load, prefix="", delimiter="", after="", limit=limit) == ListPage((), (), None)


def test_an_object_that_goes_while_it_is_listed_is_left_out() -> None:
    seek = seek_over(["a", "b", "c", "d"], gone=frozenset(["a", "b"]))
    page = list_page(seek, load, prefix="", delimiter="", after="", limit=1)
    assert ([meta.key for meta in page.objects], page.next) == (["c"], "c")
    assert (
        list_page(seek_over(["a"], gone=frozenset(["a"])), load, prefix="", delimiter="", after="", limit=1).next
        is None
    )


def test_a_rolled_up_subtree_is_skipped_by_one_seek() -> None:
    keys = [f"{folder}/{number:05d}" for folder in ("a", "b", "c") for number in range(20_000)]
    seeks: list[bytes] = []
    page = list_page(seek_over(keys, seeks=seeks), load, prefix="", delimiter="/", after="", limit=1000)
    assert page.prefixes == ("a/", "b/", "c/")
    assert seeks == [b"", b"a0", b"b0", b"c0"]


def test_a_page_after_a_prefix_does_not_give_it_again() -> None:
    keys = ["a/1", "a/2", "b"]
    page = list_page(seek_over(keys), load, prefix="", delimiter="/", after="a/", limit=10)
    assert (page.prefixes, [meta.key for meta in page.objects]) == ((), ["b"])


@given(st.binary(max_size=4), st.binary(max_size=5))
def test_the_successor_is_the_least_after_all_that_start_so(prefix: bytes, other: bytes) -> None:
    bound = successor(prefix)
    if bound is None:
        assert set(prefix) <= {0xFF}
        return
    assert prefix + b"\xff" * 8 < bound
    assert not (prefix <= other < bound) or other.startswith(prefix)
