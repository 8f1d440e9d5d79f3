"""The index of a shard's members: against tarfile, and against everything that may have happened to its file."""

import io
import random
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.shards import BadIndex, IndexBuilder, MemberIndex, TarError
from shardmill.shards import members as members_module
from tests.shards.archives import END, member, reader, tarfile_archive

IDENTITY = b"ais://pool/a.tar version 1"


def build(data: bytes, identity: bytes = IDENTITY, step: int = 1000) -> MemberIndex:
    builder = IndexBuilder(reader(data), len(data))
    while builder.advance(step):
        pass
    return builder.finish(identity)


def archive(names: list[str], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Each member holds its place as text."""
    return tarfile_archive([(tarfile.TarInfo(name), b"%d" % place) for place, name in enumerate(names)], form)


def payload(index: MemberIndex, data: bytes, name: str) -> bytes | None:
    found = index.find(name.encode())
    return None if found is None else data[found.offset : found.offset + found.size]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_found_where_tarfile_finds_it(form: int) -> None:
    names = [f"{'d' * (place % 40)}/{place:06d}.jpg" for place in range(3000)]
    random.Random(7).shuffle(names)
    data = archive(names, form)
    index = build(data, step=7)
    assert [found.name.decode() for found in index.page(0, 10_000)] == names
    with tarfile.open(fileobj=io.BytesIO(data)) as judge:
        for info in judge:
            found = index.find(info.name.encode())
            assert found is not None
            assert (found.offset, found.size) == (info.offset_data, info.size)
    assert index.find(b"d/none") is None
    assert index.find(b"") is None


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_those_of_other_scripts_are_found(form: int) -> None:
    names = ["x" * 3000 + ".jpg", "x" * 3000 + ".cls", "Straße/ünï 1.txt", "日本語.json", "a b+c%20.txt"]
    data = archive(names, form)
    index = build(data)
    assert [payload(index, data, name) for name in names] == [b"%d" % place for place in range(5)]


@given(st.lists(st.text("ab./", min_size=1, max_size=5).filter(lambda name: name.strip("/")), max_size=30))
def test_of_equal_names_the_last_is_found_as_with_tarfile(names: list[str]) -> None:
    names = [name.rstrip("/") for name in names]
    data = archive(names)
    index = build(data)
    last = {name: b"%d" % place for place, name in enumerate(names)}
    assert {name: payload(index, data, name) for name in last} == last
    assert len(index) == len(names)


def test_names_that_are_sorted_in_several_calls_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "_RUN", 7)
    random_numbers = random.Random(3)
    names = [f"{random_numbers.randrange(60):02d}.txt" for _ in range(200)]
    data = archive(names)
    index = build(data)
    last = {name: b"%d" % place for place, name in enumerate(names)}
    assert {name: payload(index, data, name) for name in last} == last
    assert index.find(b"60.txt") is None


def test_an_archive_without_members_has_an_empty_index() -> None:
    index = build(END)
    assert (len(index), index.find(b"a"), index.page(0, 10)) == (0, None, [])
    assert len(MemberIndex.load(b"".join(index.dump()), IDENTITY)) == 0


def test_pages_are_of_the_shards_order_and_end_at_its_end() -> None:
    index = build(archive([f"{place}.txt" for place in (3, 1, 2)]))
    assert [found.name for found in index.page(1, 9)] == [b"1.txt", b"2.txt"]
    assert [found.ordinal for found in index.page(1, 2)] == [1]
    assert index.page(3, 9) == []


def test_what_was_written_is_read_back() -> None:
    data = archive([f"{place:03d}.txt" for place in range(100)])
    index = build(data)
    loaded = MemberIndex.load(b"".join(index.dump()), IDENTITY)
    assert loaded.page(0, 100) == index.page(0, 100)
    assert loaded.nbytes == sum(map(len, loaded.dump()))


def test_an_index_is_never_taken_for_other_bytes() -> None:
    file = b"".join(build(archive(["a.txt"])).dump())
    with pytest.raises(BadIndex, match="version"):
        MemberIndex.load(file, IDENTITY + b"1")


def test_a_file_with_one_bit_wrong_or_a_byte_too_few_is_none() -> None:
    file = b"".join(build(archive(["a.txt", "b.txt"])).dump())
    for place in range(len(file)):
        damaged = bytearray(file)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(BadIndex):
            MemberIndex.load(bytes(damaged), IDENTITY)
        with pytest.raises(BadIndex):
            MemberIndex.load(file[:place], IDENTITY)
    with pytest.raises(BadIndex):
        MemberIndex.load(file + b"\0", IDENTITY)


def test_a_damaged_shard_has_no_index() -> None:
    data = bytearray(archive([f"{place}.txt" for place in range(9)], tarfile.USTAR_FORMAT))
    data[4 * 1024] ^= 1
    with pytest.raises(TarError, match="checksum"):
        build(bytes(data))


def test_reading_goes_on_after_bytes_that_were_not_there_yet() -> None:
    data = archive([f"{'n' * 200}{place}.txt" for place in range(20)])
    there = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal there
        if offset + length > there:
            there = offset + length
            raise BlockingIOError
        return data[offset : offset + length]

    builder = IndexBuilder(read, len(data))
    while True:
        try:
            if not builder.advance(3):
                break
        except BlockingIOError:
            continue
    assert builder.finish(IDENTITY).page(0, 20) == build(data).page(0, 20)


def test_more_members_than_an_index_may_hold_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "MAX_BYTES", 1000)
    with pytest.raises(TarError, match="more than an index holds"):
        build(b"".join(member(b"%d.txt" % place) for place in range(100)) + END)


def test_a_name_that_is_no_utf8_is_kept_as_it_is() -> None:
    index = build(member(b"caf\xe9.txt", b"x") + END)
    assert index.find(b"caf\xe9.txt") is not None
