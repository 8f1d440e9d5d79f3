"""The tar reader against tarfile and GNU tar on good archives, and alone on bad ones."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import Member, TarError, TarHeaders, iter_stream, tar_header
from tests.shards.archives import (
    END,
    header,
    headers_of,
    member,
    members_of,
    pax,
    read_all,
    reader,
    record,
    simple_shard,
    tarfile_archive,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ODD_NAMES = [
    "plain.txt",
    "dir/with spaces/0001.seg.PNG",
    "x" * 96 + ".jpg",
    "deep/" * 18 + "0001.jpg",
    "/absolute.txt",
    "../up.txt",
    "ümlaut/日本.txt",
    "bytes-\udcff\udcfe.txt",
    "no extension",
    "line\nbreak.txt",
]


def as_tarfile_sees(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [
            (info.name, info.offset_data, info.size, info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname)
            for info in archive
            if info.isreg()
        ]


def as_we_see(members: list[Member]) -> list[tuple[object, ...]]:
    return [(m.name, m.offset, m.size, m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in members]


def odd_infos(form: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    infos = []
    names = ODD_NAMES if form == "ustar" else [*ODD_NAMES, "y" * 300 + ".jpg", "n" * 99 + "/" + "m" * 200 + ".jpg"]
    for ordinal, name in enumerate(names):
        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid = 0o640 + ordinal % 8, ordinal, 2000 + ordinal
        info.uname, info.gname = "näme" if form != "ustar" else "name", "g" * (31 if form == "pax" else 8)
        info.mtime = 1_700_000_000 + ordinal
        if form == "pax":
            info.mtime = 1_700_000_000.25 + ordinal
            info.pax_headers = {"comment": "anything = with\nlines"}
        if form != "ustar" and ordinal == 1:
            info.uid = 3_000_000_000
        infos.append((info, bytes([ordinal]) * (ordinal * 300)))
    return infos


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_tarfile_reads_as_tarfile_reads_it(form: str) -> None:
    data = tarfile_archive(odd_infos(form), FORMATS[form], errors="surrogateescape")
    headers = headers_of(data)

    members = read_all(headers)

    assert as_we_see(members) == as_tarfile_sees(data)
    assert headers.warnings == []


def test_global_pax_headers_hold_until_a_member_says_otherwise() -> None:
    own = tarfile.TarInfo("b.txt")
    own.pax_headers = {"gname": "own"}
    infos = [(tarfile.TarInfo("a.txt"), b"a"), (own, b"b"), (tarfile.TarInfo("c.txt"), b"c")]
    data = tarfile_archive(infos, tarfile.PAX_FORMAT, pax_headers={"gname": "all", "mtime": "17.5"})

    members = members_of(data)

    assert [(m.gname, m.mtime) for m in members] == [("all", 17.5), ("own", 17.5), ("all", 17.5)]
    assert as_we_see(members) == as_tarfile_sees(data)


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_every_format_of_gnu_tar_reads_as_tarfile_reads_it(form: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for ordinal, name in enumerate(["0001.jpg", "0001.cls", "sub/0002.jpg", "sub/ä.txt"]):
        (tree / name).write_bytes(os.urandom(700 * ordinal))
    if form not in ("v7", "ustar"):
        (tree / ("l" * 200 + ".txt")).write_bytes(b"long")
    (tree / "link").symlink_to("0001.jpg")
    os.link(tree / "0001.cls", tree / "hard")
    if form != "v7":
        os.mkfifo(tree / "pipe")
    target = tmp_path / "archive.tar"
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", target, "-C", tree, "."], check=True)
    data = target.read_bytes()
    headers = headers_of(data)

    members = read_all(headers)

    assert as_we_see(members) == as_tarfile_sees(data)
    assert headers.skipped == (4 if form == "v7" else 5)  # two directories, a symbolic and a hard link, a pipe
    assert headers.warnings == []


def test_real_shards_read_as_tarfile_reads_them(shard_path: Path) -> None:
    data = shard_path.read_bytes()

    assert as_we_see(members_of(data)) == as_tarfile_sees(data)


def test_a_base_256_size_is_read() -> None:
    payload = b"x" * 700
    data = header(b"a.txt", b"\x80" + (700).to_bytes(11, "big")) + payload + bytes(324) + END

    assert [(m.name, m.size) for m in members_of(data)] == [("a.txt", 700)]


def test_a_negative_base_256_time_is_read() -> None:
    data = header(b"a.txt", mtime=b"\xff" * 11 + b"\xfe") + END

    assert members_of(data)[0].mtime == -2


def test_the_pax_size_wins_over_the_headers() -> None:
    data = pax(record(b"size", b"600")) + header(b"a.txt", 0) + b"y" * 600 + bytes(424) + member(b"b.txt", b"b") + END

    assert [(m.name, m.size) for m in members_of(data)] == [("a.txt", 600), ("b.txt", 1)]


def test_a_signed_checksum_of_an_early_tar_is_accepted() -> None:
    block = header(b"\xe4.txt")
    total = int(block[148:154], 8) - 256
    data = block[:148] + b"%06o\0 " % total + block[156:] + END

    assert members_of(data)[0].name == "\udce4.txt"


def test_the_prefix_field_is_a_name_only_in_posix_headers() -> None:
    posix = header(b"a.txt", prefix=b"some/dir") + END
    gnu = header(b"a.txt", prefix=b"14000000000", magic=b"ustar  \0") + END

    assert members_of(posix)[0].name == "some/dir/a.txt"
    assert members_of(gnu)[0].name == "a.txt"


def test_a_shard_without_samples_is_an_archive() -> None:
    headers = headers_of(bytes(10240))

    assert headers.next_member() is None
    assert headers.ended
    assert headers.warnings == []


# Bad inputs, one by one.


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"\x1f\x8b\x08" + bytes(2000), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "zstd"),
        (b"BZh91AY" + bytes(2000), "bzip2"),
        (b"\xfd7zXZ\0" + bytes(2000), "xz"),
        (b"PK\x03\x04" + bytes(2000), "zip"),
        (b"\n<!DOCTYPE html><title>503</title>" + b" " * 600, "HTML"),
        (b"<html>404</html>", "HTML"),
        (b"just text\n", "only 10 bytes"),
        (b"just text\n" * 100, "no tar header"),
        (bytes(100), "only 100 bytes"),
        (b"\xa7" * 4096, "no tar header"),
    ],
    ids=["empty", "gzip", "zstd", "bzip2", "xz", "zip", "page", "short page", "short", "text", "zeros", "noise"],
)
def test_what_is_not_a_tar_says_what_it_is(data: bytes, said: str) -> None:
    with pytest.raises(TarError, match=f"not a tar shard.*{said}") as caught:
        members_of(data)
    assert caught.value.offset == 0
    with pytest.raises(TarError, match=f"not a tar shard.*{said}"):
        list(iter_stream(io.BytesIO(data)))


GOOD = member(b"000.txt", b"x" * 600)  # 1536 bytes

BAD_SECOND_MEMBERS = {
    "bad checksum": (header(b"b.txt", checksum=b"000000"), "bad checksum", 1536),
    "checksum not octal": (header(b"b.txt", checksum=b"99zz"), "checksum is .* not an octal", 1536 + 148),
    "flipped bit": (header(b"b.txt").replace(b"someone", b"somegne"), "bad checksum", 1536),
    "size not octal": (header(b"b.txt", b"12x4"), "size is .* not an octal", 1536 + 124),
    "size with a sign": (header(b"b.txt", b"-0000000001"), "size is .* not an octal", 1536 + 124),
    "size with underscore": (header(b"b.txt", b"1_0"), "size is .* not an octal", 1536 + 124),
    "size with digit 9": (header(b"b.txt", b"00000000009"), "size is .* not an octal", 1536 + 124),
    "negative base-256 size": (header(b"b.txt", b"\xff" * 12), "has the size -1", 1536),
    "8 EiB": (header(b"b.txt", b"\x80" + (1 << 63).to_bytes(11, "big")), "has 9223372036854775808 bytes", 1536),
    "larger than the rest": (header(b"b.txt", 5000) + bytes(2048), "has 5000 bytes, 3072 are there", 1536),
    "negative pax size": (pax(record(b"size", b"-5")) + header(b"b.txt"), "has the size -5", 1536 + 1024),
    "pax size not a number": (
        pax(record(b"size", b"0x10")) + header(b"b.txt"),
        "size is .* not a decimal",
        1536 + 1024,
    ),
    "pax size too large": (pax(record(b"size", b"99999999")) + header(b"b.txt"), "has 99999999 bytes", 1536 + 1024),
    "pax time not a number": (pax(record(b"mtime", b"nan")) + header(b"b.txt"), "mtime is 'nan'", 1536 + 1024),
    "pax owner not a number": (pax(record(b"uid", b"me")) + header(b"b.txt"), "uid is 'me'", 1536 + 1024),
    "global pax size": (pax(record(b"size", b"5"), kind=b"g") + header(b"b.txt"), "global pax header", 1536 + 512),
    "pax length too long": (pax(b"99 path=a\n") + header(b"b.txt"), "record whose length is wrong", 1536 + 512),
    "pax length too short": (pax(b"4 path=a\n") + header(b"b.txt"), "record whose length is wrong", 1536 + 512),
    "pax length zero": (pax(b"0 path=a\n") + header(b"b.txt"), "record whose length is wrong", 1536 + 512),
    "pax without length": (pax(b"path=a\n") + header(b"b.txt"), "record without its length", 1536 + 512),
    "pax of 2 MiB": (header(b"p", 2 << 20, kind=b"x"), "extension header of 2097152 bytes", 1536),
    "negative pax header": (header(b"p", b"\xff" * 12, kind=b"x"), "extension header of -1 bytes", 1536),
    "long name of 1 TiB": (
        header(b"l", b"\x80" + (1 << 40).to_bytes(11, "big"), kind=b"L"),
        "extension header of",
        1536,
    ),
    "chain of headers": (pax(record(b"comment", b"x")) * 17 + member(b"b.txt"), "more than 16 extension", 1536),
    "pax without a member": (pax(record(b"path", b"a.txt")), "extension header without a member", 1536),
    "sparse": (header(b"b.txt", kind=b"S"), "sparse", 1536),
    "pax sparse": (pax(record(b"GNU.sparse.major", b"1")) + header(b"b.txt"), "sparse", 1536 + 1024),
    "garbage": (b"\x01" * 1024, "checksum", 1536 + 148),
}


@pytest.mark.parametrize("case", BAD_SECOND_MEMBERS)
def test_damage_behind_a_member_is_named_with_its_byte(case: str) -> None:
    bad, said, offset = BAD_SECOND_MEMBERS[case]
    headers = headers_of(GOOD + bad + END)

    first = headers.next_member()

    assert first is not None
    assert first.name == "000.txt"
    with pytest.raises(TarError, match=said) as caught:
        headers.next_member()
    assert caught.value.offset == offset
    assert f"(at byte {offset})" in str(caught.value)


def test_a_huge_declared_header_is_not_allocated() -> None:
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return header(b"p", 1 << 32, kind=b"x")[offset : offset + length]

    with pytest.raises(TarError, match="extension header of"):
        TarHeaders(read, 1 << 40).next_member()
    assert max(asked) <= 512


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (1536 + 100, "truncated in a header: 100 of 512"),
        (1536 + 512 + 300, "truncated: member '001.txt' has 600 bytes, 300 are there"),
        (1536 + 512 + 600 + 10, "truncated in the padding behind member '001.txt'"),
    ],
)
def test_a_cut_is_noticed_in_header_payload_and_padding(kept: int, said: str) -> None:
    data = (GOOD + member(b"001.txt", b"y" * 600) + END)[:kept]
    headers = headers_of(data)

    assert headers.next_member() is not None
    with pytest.raises(TarError, match=said):
        headers.next_member()


def test_a_file_that_has_become_shorter_is_not_taken_for_a_complete_one() -> None:
    headers = TarHeaders(reader(GOOD), len(GOOD) + 5000)

    assert headers.next_member() is not None
    with pytest.raises(TarError, match="the bytes end here") as caught:
        headers.next_member()
    assert caught.value.offset == len(GOOD)


def test_a_missing_end_is_a_warning() -> None:
    headers = headers_of(GOOD)

    assert [m.name for m in read_all(headers)] == ["000.txt"]
    assert headers.warnings == ["the archive has no end marker (at byte 1536)"]


def test_a_lone_zero_block_is_a_warning() -> None:
    headers = headers_of(GOOD + bytes(512))

    assert [m.name for m in read_all(headers)] == ["000.txt"]
    assert headers.warnings == ["the archive has only one zero block at its end (at byte 1536)"]


@pytest.mark.parametrize("junk", [b"junk", member(b"after.txt", b"z") + END])
def test_what_follows_the_end_is_ignored_with_a_warning(junk: bytes) -> None:
    headers = headers_of(GOOD + END + junk)

    assert [m.name for m in read_all(headers)] == ["000.txt"]
    assert len(headers.warnings) == 1
    assert "not all zero" in headers.warnings[0]


def test_odd_names_are_kept_as_names() -> None:
    names = [b"/etc/passwd", b"../../x.txt", b"\xff\xfe.txt", b"", b"dup.txt", b"dup.txt", b"a\\b.txt"]
    data = b"".join(member(name, b"x") for name in names) + pax(record(b"path", b"nul\0.txt")) + member(b"n") + END

    found = [m.name for m in members_of(data)]

    assert found == [
        "/etc/passwd",
        "../../x.txt",
        "\udcff\udcfe.txt",
        "",
        "dup.txt",
        "dup.txt",
        "a\\b.txt",
        "nul\0.txt",
    ]


def test_everything_but_regular_files_is_skipped_and_counted() -> None:
    kinds = [b"1", b"2", b"3", b"4", b"5", b"6", b"V", b"Z"]
    data = b"".join(member(b"odd", b"data" if kind in (b"V", b"Z") else b"", kind) for kind in kinds)
    headers = headers_of(data + GOOD + END)

    assert [m.name for m in read_all(headers)] == ["000.txt"]
    assert headers.skipped == len(kinds)


def test_old_archives_name_directories_by_a_slash() -> None:
    headers = headers_of(header(b"dir/", kind=b"\0") + GOOD + END)

    assert [m.name for m in read_all(headers)] == ["000.txt"]
    assert headers.skipped == 1


def test_reading_resumes_after_a_read_that_failed() -> None:
    data = tarfile_archive(odd_infos("pax"), tarfile.PAX_FORMAT, errors="surrogateescape")
    available = 0

    def read(offset: int, length: int) -> bytes:
        if offset + length > available:
            raise BlockingIOError
        return data[offset : offset + length]

    headers = TarHeaders(read, len(data))
    members = []
    while not headers.ended:
        try:
            found = headers.next_member()
        except BlockingIOError:
            available += 100
        else:
            members += [found] if found else []

    assert members == members_of(data)


def test_a_short_read_is_completed() -> None:
    data = simple_shard([("a", {"txt": b"x" * 1000}), ("b", {"txt": b"y"})])

    headers = TarHeaders(lambda offset, length: data[offset : offset + min(length, 7)], len(data))

    assert read_all(headers) == members_of(data)


def test_many_tiny_members_are_read_in_bounded_memory() -> None:
    import tracemalloc

    count = 100_000
    common = {"mtime": 0, "mode": 0o444, "uid": 0, "gid": 0, "uname": "", "gname": ""}

    def read(offset: int, length: int) -> bytes:
        ordinal = offset // 512
        block = tar_header(f"{ordinal:08d}.cls", 0, **common) if ordinal < count else bytes(512)  # type: ignore[arg-type]
        return block[:length]

    headers = TarHeaders(read, count * 512 + 1024)
    tracemalloc.start()
    try:
        found = 0
        while headers.next_member() is not None:
            found += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert found == count
    assert peak < 200_000


# Cuts and noise.


def small_shard() -> bytes:
    infos = [
        (tarfile.TarInfo("a.txt"), b"alpha"),
        (tarfile.TarInfo("a.cls"), b""),
        (tarfile.TarInfo("b" * 120 + ".txt"), b"beta" * 150),
        (tarfile.TarInfo("c.txt"), b"x" * 512),
    ]
    return tarfile_archive(infos, tarfile.PAX_FORMAT)


def test_no_cut_gives_a_damaged_member_or_hides_a_missing_one() -> None:
    data = small_shard()
    whole = members_of(data)
    end = whole[-1].offset + 512
    for cut in range(end + 1024):
        headers = headers_of(data[:cut])
        found = []
        try:
            while (one := headers.next_member()) is not None:
                found.append(one)
        except TarError:
            assert found == whole[: len(found)]
            continue
        assert found == whole[: len(found)]
        assert headers.warnings, f"cut at {cut} looks complete"


def test_no_cut_of_a_stream_looks_complete() -> None:
    data = small_shard()
    whole = members_of(data)
    end = whole[-1].offset + 512
    for cut in range(end + 512):
        with pytest.raises(TarError):
            list(iter_stream(io.BytesIO(data[:cut])))
    assert [m for m, _ in iter_stream(io.BytesIO(data[: end + 512]))] == whole


def test_a_stream_without_an_end_is_accepted_on_request() -> None:
    assert [(m.name, data) for m, data in iter_stream(io.BytesIO(GOOD), require_end=False)] == [("000.txt", b"x" * 600)]
    with pytest.raises(TarError, match="without end-of-archive") as caught:
        list(iter_stream(io.BytesIO(GOOD)))
    assert caught.value.offset == 1536


def test_a_stream_that_comes_in_pieces_reads_as_the_file_does(shard_path: Path) -> None:
    data = shard_path.read_bytes()

    class Pieces(io.RawIOBase):
        def __init__(self) -> None:
            self.position = 0

        def read(self, size: int = -1) -> bytes:
            start = self.position
            self.position = min(start + min(size, 1000), len(data))
            return data[start : self.position]

    stream = Pieces()

    found = list(iter_stream(stream))  # type: ignore[arg-type]  # only read is called

    assert [m for m, _ in found] == members_of(data)
    assert all(payload == data[m.offset : m.offset + m.size] for m, payload in found)
    assert stream.position == len(data)


def test_a_stream_does_not_allocate_what_is_only_declared() -> None:
    block = header(b"big.txt", b"\x80" + (1 << 50).to_bytes(11, "big"))

    with pytest.raises(TarError, match="has 1125899906842624 bytes, 1000 arrived"):
        list(iter_stream(io.BytesIO(block + bytes(1000))))


def consume(data: bytes) -> None:
    """Read in both ways; only a TarError may come, and each step moves on."""
    reads = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        assert 0 <= offset <= len(data)
        return data[offset : offset + length]

    headers = TarHeaders(read, len(data))
    last = -1
    try:
        while (found := headers.next_member()) is not None:
            assert found.header_offset > last
            assert 0 <= found.offset <= found.offset + found.size <= len(data)
            last = found.header_offset
    except TarError as error:
        last = error.offset
    assert last <= len(data)
    assert reads <= len(data) // 512 + 20
    try:
        for _ in iter_stream(io.BytesIO(data)):
            pass
    except TarError:
        pass


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_a_tar_error(noise: bytes) -> None:
    consume(noise)
    consume(GOOD + noise)
    consume(member(b"././@PaxHeader", noise, b"x") + GOOD + END)
    consume(member(b"././@LongLink", noise, b"L") + GOOD + END)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_archive_is_read_or_refused(draw: st.DataObject) -> None:
    data = bytearray(small_shard())
    for _ in range(draw.draw(st.integers(1, 4))):
        position = draw.draw(st.integers(0, len(data) - 1))
        data[position] = draw.draw(st.integers(0, 255))
    # Half of the time the checksums are mended, so that the change gets past them.
    if draw.draw(st.booleans()):
        for start in range(0, len(data), 512):
            block = data[start : start + 512]
            if block[257:262] == b"ustar":
                data[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    consume(bytes(data))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=200),
            st.binary(max_size=1500),
        ),
        max_size=6,
    ),
    st.sampled_from(["gnu", "pax"]),
)
def test_any_name_and_payload_survive(entries: list[tuple[str, bytes]], form: str) -> None:
    data = tarfile_archive([(tarfile.TarInfo(name), payload) for name, payload in entries], FORMATS[form])

    members = members_of(data)

    assert [(m.name, data[m.offset : m.offset + m.size]) for m in members] == entries
    assert [(m.name, payload) for m, payload in iter_stream(io.BytesIO(data))] == entries


def test_a_tar_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TarError("bad", 7)))

    assert (str(error), error.offset) == ("bad (at byte 7)", 7)


def test_reader_of_the_tests_is_like_pread() -> None:
    assert reader(b"abc")(1, 9) == b"bc"
