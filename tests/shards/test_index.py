"""Samples found from headers."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import Sample, ShardIndex, TarError, split_name
from shardmill.shards.grouping import MAX_FIELDS
from tests.shards.archives import END, header, member, reader, simple_shard


def index_of(data: bytes) -> ShardIndex:
    return ShardIndex(reader(data), len(data))


def read_index(index: ShardIndex, step: int = 3) -> list[Sample]:
    samples = []
    while batch := index.advance(step):
        assert len(batch) <= step
        samples += batch
    return samples


def names_of(samples: list[Sample]) -> list[tuple[str, list[str]]]:
    return [(sample.key, [field.name for field in sample.fields]) for sample in samples]


def test_consecutive_members_with_one_key_are_a_sample() -> None:
    data = simple_shard([("d/1", {"cls": b"1", "seg.png": b"p"}), ("d/2", {"JPG": b"j"}), ("d/1", {"txt": b"again"})])
    index = index_of(data)

    samples = read_index(index)

    assert names_of(samples) == [("d/1", ["cls", "seg.png"]), ("d/2", ["jpg"]), ("d/1", ["txt"])]
    assert [sample.ordinal for sample in samples] == [0, 1, 2]
    field = samples[0].fields[1]
    assert data[field.member.offset : field.member.offset + field.member.size] == b"p"
    assert index.ended
    assert index.advance(1) == []


def test_members_without_a_key_do_not_end_a_sample() -> None:
    data = b"".join(member(name) for name in (b"1.jpg", b"README", b"__meta__", b"__meta__/9.jpg", b"1.cls")) + END

    assert names_of(read_index(index_of(data))) == [("1", ["jpg", "cls"])]


def test_a_sample_is_whole_only_when_the_next_key_has_been_seen() -> None:
    data = simple_shard([("1", {"a": b"", "b": b""}), ("2", {"a": b""}), ("3", {"a": b""})])
    seen = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal seen
        seen = max(seen, offset + length)
        return data[offset : offset + length]

    index = ShardIndex(read, len(data))

    assert names_of(index.advance(1)) == [("1", ["a", "b"])]
    assert seen == index.position == 3 * 512  # its own two headers and the next one
    assert not index.ended


def test_payloads_are_never_read(shard_path: Path) -> None:
    data = shard_path.read_bytes()
    touched = []

    def read(offset: int, length: int) -> bytes:
        touched.append((offset, offset + length))
        return data[offset : offset + length]

    samples = read_index(ShardIndex(read, len(data)), step=16)

    payloads = [(f.member.offset, f.member.offset + f.member.size) for sample in samples for f in sample.fields]
    assert payloads
    spans = sorted(
        [(start, stop, True) for start, stop in payloads if stop > start] + [(a, b, False) for a, b in touched]
    )
    assert all(left[1] <= right[0] for left, right in pairwise(spans) if left[2] != right[2])


def test_real_shards_group_as_their_names_say(shard_paths: list[Path]) -> None:
    for path in shard_paths:
        expected: list[tuple[str, list[str]]] = []
        with tarfile.open(path) as archive:
            for info in archive:
                split = split_name(info.name)
                assert split is not None
                if not expected or expected[-1][0] != split[0]:
                    expected.append((split[0], []))
                expected[-1][1].append(split[1])
        assert names_of(read_index(index_of(path.read_bytes()))) == expected


def test_samples_before_damage_are_handed_out_and_the_damage_stays() -> None:
    samples = [(str(ordinal), {"txt": b"x"}) for ordinal in range(5)]
    damaged = simple_shard(samples)[: 5 * 1024] + header(b"6.txt", checksum=b"1") + END
    index = index_of(damaged)

    # The fifth may have gone on, so it is not whole.
    assert names_of(index.advance(3)) == [("0", ["txt"]), ("1", ["txt"]), ("2", ["txt"])]
    assert names_of(index.advance(3)) == [("3", ["txt"])]
    for _ in range(2):
        with pytest.raises(TarError, match="bad checksum") as caught:
            index.advance(3)
        assert caught.value.offset == 5 * 1024
    assert not index.ended


def test_one_field_twice_in_a_sample_is_an_error() -> None:
    data = simple_shard([("0", {"a": b""}), ("1", {"jpg": b"", "JPG": b""})])

    index = index_of(data)

    assert names_of(index.advance(9)) == [("0", ["a"])]
    with pytest.raises(TarError, match="sample '1' has two fields 'jpg'"):
        index.advance(9)


@pytest.mark.parametrize("field", ["__key__", "__url__"])
def test_a_field_that_webdataset_keeps_for_itself_is_an_error(field: str) -> None:
    with pytest.raises(TarError, match=f"two fields '{field}'"):
        index_of(simple_shard([("1", {field: b"x"})])).advance(1)


def test_a_sample_marked_bad_is_dropped() -> None:
    data = simple_shard([("1", {"a": b"", "__bad__": b"1"}), ("2", {"a": b"", "__bad__": b""}), ("3", {"a": b""})])

    assert [(sample.key, sample.ordinal) for sample in read_index(index_of(data))] == [("2", 0), ("3", 1)]


def test_a_key_over_the_whole_shard_is_refused_before_memory_ends() -> None:
    blocks = {n: header(b"k.%d" % n) for n in range(MAX_FIELDS + 1)}
    index = ShardIndex(lambda offset, length: blocks[offset // 512][:length], (MAX_FIELDS + 3) * 512)

    with pytest.raises(TarError, match="more than 65536 fields"):
        index.advance(1)


def test_an_empty_archive_has_no_samples() -> None:
    index = index_of(bytes(10240))

    assert index.advance(5) == []
    assert index.ended
    assert index.warnings == []


def test_warnings_and_skipped_members_are_told() -> None:
    index = index_of(member(b"dir", kind=b"5") + member(b"1.txt", b"x"))

    assert names_of(read_index(index)) == [("1", ["txt"])]
    assert index.skipped == 1
    assert "no end marker" in index.warnings[0]


def test_a_failed_read_loses_nothing() -> None:
    data = simple_shard([(str(ordinal), {"a": b"x" * 700, "b": b""}) for ordinal in range(20)])
    available = 0

    def read(offset: int, length: int) -> bytes:
        if offset + length > available:
            raise BlockingIOError
        return data[offset : offset + length]

    index = ShardIndex(read, len(data))
    samples = []
    while not index.ended:
        try:
            samples += index.advance(4)
        except BlockingIOError:
            available += 900

    assert samples == read_index(index_of(data))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c.d"]), min_size=1, unique=True), max_size=12), st.integers(1, 5))
def test_every_sample_comes_out_once_in_order(shape: list[list[str]], step: int) -> None:
    samples = [(f"{ordinal:04d}", {name: name.encode() for name in fields}) for ordinal, fields in enumerate(shape)]
    data = simple_shard(samples)

    found = read_index(index_of(data), step)

    assert names_of(found) == [(key, list(fields)) for key, fields in samples]
    assert [sample.ordinal for sample in found] == list(range(len(samples)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert len(archive.getmembers()) == sum(len(sample.fields) for sample in found)
