"""What may be given out of an output of unknown form: wherever it stops, no reader takes it for the whole."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.etl.runs.holding import HOLD, MAX_HELD, Holding
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content


def pieces_of(data: bytes, order: random.Random, largest: int) -> list[bytes]:
    pieces, position = [], 0
    while position < len(data):
        size = order.randint(1, largest)
        pieces.append(data[position : position + size])
        position += size
    return pieces


def safes_of(pieces: list[bytes]) -> list[int]:
    holding = Holding()
    return [holding.feed(piece) for piece in pieces]


def archive_of(form: int, sizes: list[int | None], *, long_names: bool = False) -> bytes:
    """A tar of files of these sizes; None is a directory, a negative one a symbolic link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number, size in enumerate(sizes):
            name = f"{number:04d}" + ("x" * 150 if long_names else "") + ".bin"
            member = tarfile.TarInfo(name)
            if size is None:
                member.type = tarfile.DIRTYPE
            elif size < 0:
                member.type, member.linkname = tarfile.SYMTYPE, "0000"
            else:
                member.size = size
            # tarfile takes zeros for the archive's end in some places.
            archive.addfile(member, io.BytesIO(b"p" * member.size))
    return stream.getvalue()


FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
SIZES = st.lists(st.sampled_from([None, -1, 0, 1, 2, 511, 512, 513, 3000]), max_size=12)


@given(st.sampled_from(FORMS), SIZES, st.booleans(), st.integers(0, 1000), st.sampled_from([7, 100, 512, 5000]))
@settings(deadline=None)
def test_of_a_tar_nothing_is_given_out_that_ends_between_members(
    form: int, sizes: list[int | None], long_names: bool, order: int, largest: int
) -> None:
    data = archive_of(form, sizes, long_names=long_names and form != tarfile.USTAR_FORMAT)
    safes = safes_of(pieces_of(data, random.Random(order), largest))
    assert safes == sorted(safes)
    assert all(safe <= len(data) for safe in safes)
    for safe in set(safes) - {0}:
        assert not tarfile_is_content(data[:safe]), f"it takes {safe} bytes of {sizes} for whole"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        stops = [member.offset_data + member.size for member in archive if member.isreg() and member.size]
    assert safes[-1] == max(stops, default=1) - 1


def test_gnu_tar_hears_every_stop_too() -> None:
    data = archive_of(tarfile.PAX_FORMAT, [3, 0, None, 1, 700, 0, 0, 2000, -1])
    for safe in set(safes_of(pieces_of(data, random.Random(1), 400))) - {0}:
        assert not gnu_tar_is_content(data[:safe])


def test_large_payloads_pass_without_being_kept() -> None:
    holding = Holding()
    data = archive_of(tarfile.PAX_FORMAT, [20 << 20])
    assert holding.feed(data[: 1 << 20]) == 1 << 20
    assert holding.feed(data[1 << 20 : 10 << 20]) == 10 << 20
    assert len(holding._kept) == 0


COMPRESSED: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "gzip": (gzip.compress, gzip.decompress),
    "bzip2": (bz2.compress, bz2.decompress),
    "xz": (lzma.compress, lzma.decompress),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_data_stops_inside_its_frame(name: str) -> None:
    compress, decompress = COMPRESSED[name]
    data = compress(random.Random(3).randbytes(2 * HOLD))
    safes = safes_of(pieces_of(data, random.Random(2), 100_000))
    assert safes[-1] > HOLD // 2
    for safe in set(safes) - {0}:
        with pytest.raises((EOFError, ValueError, lzma.LZMAError)):
            decompress(data[:safe])


def test_an_archive_of_another_kind_stops_before_its_directory() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", random.Random(4).randbytes(3 * HOLD))
    for safe in set(safes_of(pieces_of(stream.getvalue(), random.Random(2), 100_000))) - {0}:
        assert not zipfile.is_zipfile(io.BytesIO(stream.getvalue()[:safe]))


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=20))
@settings(deadline=None)
def test_of_anything_else_the_newest_bytes_are_held_back_and_a_stop_is_odd(sizes: list[int]) -> None:
    holding = Holding()
    for size in sizes:
        safe = holding.feed(b"\xff" * size)
        assert safe == 0 or (safe % 2 == 1 and HOLD <= holding.size - safe <= HOLD + 1)


def test_small_output_is_held_back_as_a_whole() -> None:
    assert safes_of([b"x" * 1000, b"y" * (HOLD - 1000)]) == [0, 0]


def test_what_follows_the_end_of_an_archive_is_bounded() -> None:
    data = archive_of(tarfile.PAX_FORMAT, [1000])
    holding = Holding()
    before = holding.feed(data)
    assert holding.feed(bytes(MAX_HELD - len(data))) == before
    assert holding.feed(bytes(1 << 20)) > MAX_HELD


def test_headers_without_end_are_bounded() -> None:
    block = archive_of(tarfile.USTAR_FORMAT, [None])[:512]
    holding = Holding()
    while holding.size <= MAX_HELD:
        assert holding.safe == 0
        holding.feed(block * 100)
    assert holding.safe > 0
    assert len(holding._kept) == 0


def test_a_tar_that_breaks_off_into_something_else_is_held_back_like_that() -> None:
    data = archive_of(tarfile.USTAR_FORMAT, [1000])[:1536]
    holding = Holding()
    assert holding.feed(data) == 512 + 999
    assert holding.feed(b"\xff" * (2 * HOLD)) == 1536 + HOLD - 1
