"""Framing against tarfile and GNU tar, and the safe cut against readers that take a cut for the end."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import (
    END_OF_ARCHIVE,
    RECORD,
    BytesPayload,
    FramedField,
    TarError,
    end_padding,
    frame_into,
    framed_size,
    iter_stream,
    padding,
    tar_header,
)
from tests.shards.archives import members_of

OWNER = {"mode": 0o644, "uid": 1000, "gid": 100, "uname": "user", "gname": "users"}


def framed(samples: list[list[FramedField]]) -> tuple[bytes, list[int]]:
    """A shard without its end, and the absolute safe cut of each sample."""
    shard = b""
    cuts = []
    for fields in samples:
        buffer = bytearray(b"\xaa" * framed_size(fields))
        cuts.append(len(shard) + frame_into(memoryview(buffer), fields))
        shard += buffer
    return shard, cuts


def archive_of(fields: list[FramedField]) -> bytes:
    shard, _ = framed([fields])
    return shard + bytes(end_padding(len(shard)))


def as_tarfile_writes(name: str, size: int, **values: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("name", "size", "values"),
    [
        ("a.jpg", 0, {}),
        ("train/n01440764_10026.npy", 602_240, {"mtime": 1_593_100_000}),
        ("x" * 96 + ".jpg", 12, {}),
        ("x" * 97 + ".jpg", 12, {}),
        ("long/" * 60 + "a.jpg", 12, {"mtime": 5}),
        ("ä.txt", 3, {}),
        ("日本/" + "x" * 120 + ".txt", 3, {}),
        ("bytes-\udcff.txt", 3, {}),
        ("bytes-\udcff" + "x" * 200, 3, {"uname": "ü"}),
        ("a.bin", 8**11 - 1, {}),
        ("a.bin", 8**11, {}),
        ("a.bin", 1 << 50, {}),
        ("a.txt", 1, {"uid": 8**7, "gid": 8**7 - 1}),
        ("a.txt", 1, {"uid": 0, "gid": 3_000_000_000}),
        ("a.txt", 1, {"mtime": -1}),
        ("a.txt", 1, {"mtime": 8**11}),
        ("a.txt", 1, {"uname": "u" * 32, "gname": "g" * 33}),
        ("a.txt", 1, {"uname": "", "gname": "größe"}),
        ("a.txt", 1, {"mode": 0o100755}),
    ],
)
def test_headers_are_those_of_tarfile(name: str, size: int, values: dict[str, object]) -> None:
    given_values = {"mtime": 0, **OWNER, **values}

    block = tar_header(name, size, **given_values)  # type: ignore[arg-type]  # a table of mixed values

    assert block == as_tarfile_writes(name, size, **given_values)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150),
    st.integers(0, 1 << 40),
    st.integers(-(1 << 33), 1 << 36),
    st.text(st.characters(min_codepoint=32, max_codepoint=300), max_size=40),
)
def test_any_header_is_that_of_tarfile(name: str, size: int, mtime: int, uname: str) -> None:
    values = {**OWNER, "uname": uname}

    block = tar_header(name, size, mtime=mtime, **values)  # type: ignore[arg-type]  # a table of mixed values

    assert block == as_tarfile_writes(name, size, mtime=mtime, **values)


@pytest.mark.parametrize("name", ["", "a\0b.txt"])
def test_a_name_that_no_header_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        tar_header(name, 0, mtime=0, mode=0, uid=0, gid=0, uname="", gname="")


def test_values_of_the_source_member_are_kept_and_fractions_rounded() -> None:
    field = FramedField(
        "a.txt", BytesPayload(b"x"), mtime=1_700_000_000.6, mode=0o600, uid=7, gid=8, uname="u", gname="g"
    )

    [member] = members_of(archive_of([field]))

    assert (member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname) == (
        1_700_000_001,
        0o600,
        7,
        8,
        "u",
        "g",
    )


FIELDS = [
    ("0001.cls", b"7"),
    ("0001.txt", b""),
    ("0001.jpg", bytes(range(256)) * 9),
    ("ä/" + "d/" * 80 + "0002.json", b"{}" * 256),
]


def read_with_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    """Read as WebDataset does, as a stream."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
        for info in archive:
            file = archive.extractfile(info)
            assert file is not None
            found.append((info.name, file.read()))
    return found


def test_tarfile_reads_what_is_framed() -> None:
    data = archive_of([FramedField(name, BytesPayload(payload)) for name, payload in FIELDS])

    assert len(data) % RECORD == 0
    assert read_with_tarfile(data) == FIELDS


def test_gnu_tar_reads_what_is_framed(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(archive_of([FramedField(name, BytesPayload(payload)) for name, payload in FIELDS]))

    done = subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True, capture_output=True)

    assert done.stderr == b""
    assert [(tmp_path / name).read_bytes() for name, _ in FIELDS] == [payload for _, payload in FIELDS]


@given(st.integers(0, 1 << 40))
def test_padding_reaches_blocks_and_records(size: int) -> None:
    total = size + padding(size)

    assert 0 <= padding(size) < 512
    assert total % 512 == 0
    assert (total + end_padding(total)) % RECORD == 0
    assert len(END_OF_ARCHIVE) <= end_padding(total) < RECORD + len(END_OF_ARCHIVE)


def test_equal_arguments_give_equal_bytes() -> None:
    first = archive_of([FramedField(name, BytesPayload(payload)) for name, payload in FIELDS])
    second = archive_of([FramedField(name, BytesPayload(payload)) for name, payload in FIELDS])

    assert first == second


def test_every_byte_of_the_size_is_written() -> None:
    fields = [FramedField(name, BytesPayload(payload)) for name, payload in FIELDS]
    outputs = set()
    for filler in (b"\0", b"\xff"):
        buffer = bytearray(filler * framed_size(fields))
        frame_into(memoryview(buffer), fields)
        outputs.add(bytes(buffer))

    assert len(outputs) == 1


def test_the_cut_is_the_last_byte_of_the_last_payload_with_bytes() -> None:
    fields = [
        FramedField("1.a", BytesPayload(b"abc")),
        FramedField("1.b", BytesPayload(b"")),
        FramedField("1.c", BytesPayload(b"")),
    ]

    shard, [cut] = framed([fields])

    assert shard[512:515] == b"abc"
    assert cut == 514


def test_a_sample_without_bytes_is_held_back_whole() -> None:
    _, [cut] = framed([[FramedField("1.a", BytesPayload(b"")), FramedField("1.b", BytesPayload(b""))]])

    assert cut == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1100), min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_stream_that_stops_at_a_safe_cut_is_recognised_by_every_reader(sizes: list[list[int]]) -> None:
    samples = [
        [FramedField(f"{key}.{field}", BytesPayload(b"x" * size)) for field, size in enumerate(of_sample)]
        for key, of_sample in enumerate(sizes)
    ]
    shard, cuts = framed(samples)
    starts = {len(framed(samples[:number])[0]) for number in range(len(samples))}
    # A sample whose payloads are all empty moves nothing: its cut is its start, and the last cut before it counts.
    published = 0
    for cut in cuts:
        if cut in starts:
            continue
        assert cut > published
        published = cut
        stopped = shard[:published]
        with pytest.raises(TarError, match="truncated"):
            list(iter_stream(io.BytesIO(stopped), require_end=False))
        with pytest.raises(tarfile.ReadError):
            read_with_tarfile(stopped)
