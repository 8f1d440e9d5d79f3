"""Shards that are none, or stop being one, through a transform over HTTP: 422, or an answer that is visibly cut."""

import gzip
import http.client
import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.core.api import TransformInfo
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.etl.over_http import Answer, Served, serve
from tests.etl.support import IDENTITY, members
from tests.shards.archives import END, header, member, pax, record

MIB = 1 << 20


def sample(ordinal: int) -> bytes:
    """As a run gives it again: with its number in the first header."""
    first = header(b"%04d.cls" % ordinal, 1, devices=b"%07o\0%07o\0" % divmod(ordinal, 8**7))
    return first + b"7" + bytes(511) + member(b"%04d.txt" % ordinal, b"text of %d" % ordinal * 50)


# More than a run looks ahead, so that its first bytes are sent before the last ones are looked at.
GOOD = b"".join(map(sample, range(600)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def node(directory: Path) -> Iterator[Served]:
    with serve(directory, "--workers", "2", environ={"SHARDMILL_TRANSFORMS_MEMORY": "300MiB"}) as served:
        yield served


@pytest.fixture(scope="module")
def same(node: Served) -> TransformInfo:
    return node.register(IDENTITY, name="same")


@pytest.fixture(autouse=True)
def node_is_well(node: Served, same: TransformInfo, directory: Path) -> Iterator[None]:
    """The next request is served, whatever the last one was."""
    yield
    (directory / "well.tar").write_bytes(sample(1) + END)
    answer = node.get(same, "well.tar")
    assert (answer.status, len(members(answer.body))) == (200, 2)


def negative(size: int) -> bytes:
    """GNU's base-256 form."""
    return struct.pack(">iq", -1, size)


NOT_A_SHARD = {
    "empty": (b"", "it is empty"),
    "a few bytes": (b"0123456789", "only 10 bytes"),
    "text": (b"just text, " * 200, "no tar header"),
    "random": (bytes(range(256)) * 20, "no tar header"),
    "html": (b"<!DOCTYPE html><html><body>Not found</body></html>" * 30, "HTML"),
    "gzip": (gzip.compress(GOOD + END), "gzip-compressed"),
    "a gzip bomb": (gzip.compress(bytes(100 * MIB)), "gzip-compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(2000), "zstd-compressed"),
    "zip": (b"PK\x03\x04" + bytes(2000), "zip-compressed"),
    "an absurd extension header": (header(b"x", MIB * 2, kind=b"x") + bytes(3 * MIB), "extension header of"),
    "an extension header of 8 GiB": (header(b"x", b"77777777777", kind=b"L") + bytes(5000), "extension header of"),
    "a chain of extension headers": (pax(record(b"comment", b"x")) * 17 + sample(1) + END, "more than 16"),
    "a pax record of no length": (pax(b"x comment=y\n") + sample(1) + END, "pax record"),
    "a pax size that is negative": (pax(record(b"size", b"-5")) + sample(1) + END, "size -5"),
    "a pax size beyond the file": (pax(record(b"size", b"99999999999999")) + sample(1) + END, "truncated"),
    "a pax size that is no number": (pax(record(b"size", b"12x")) + sample(1) + END, "not a decimal number"),
    "a global pax size": (pax(record(b"size", b"1"), kind=b"g") + sample(1) + END, "every member's size"),
    "a sparse member": (header(b"0001.txt", 0, kind=b"S") + END, "sparse"),
    "a negative size": (header(b"0001.txt", negative(-512)) + sample(1) + END, "size -512"),
    "a size in words": (header(b"0001.txt", b"a lot") + sample(1) + END, "not an octal number"),
    "a size of 8 EiB": (header(b"0001.txt", b"\x80\0\0\0\x7f" + b"\xff" * 7) + sample(1) + END, "truncated"),
    "a size larger than the file": (header(b"0001.txt", 10_000) + b"x" * 5000, "truncated"),
    "one field twice": (member(b"a.txt", b"1") + member(b"a.txt", b"2") + END, "two fields 'txt'"),
}


@pytest.mark.parametrize("what", NOT_A_SHARD)
def test_what_is_no_shard_is_422_transformed_and_served_as_it_is(
    node: Served, same: TransformInfo, directory: Path, what: str
) -> None:
    data, message = NOT_A_SHARD[what]
    (directory / "bad.tar").write_bytes(data)
    for options in ("", ",errors=skip:1", ",start=1", ",count=5"):
        answer = node.get(same, "bad.tar", options)
        assert (answer.status, answer.error.code) == (422, "bad_shard"), answer.body
        assert message in answer.error.message
        assert answer.error.traceback is None
        assert str(directory) not in answer.error.message
    assert node.ask("GET", "/o/gs/shards/bad.tar").body == data


def corrupted(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


LAST = len(GOOD) - len(sample(599))
DAMAGED = {
    "truncated in a header": GOOD[: LAST + 100],
    "truncated behind a header": GOOD[: LAST + 512],
    "truncated in a payload": GOOD[: LAST + 512 + 512 + 512 + 300],
    "truncated in the padding": GOOD[:-3],
    "a bad checksum": corrupted(GOOD, LAST + 5) + END,
    "a size that passes the end": GOOD[:LAST] + header(b"0599.txt", 10 * MIB) + END,
    "zeros and then more of a header": GOOD + bytes(100) + b"x" * 300,
    "junk in the place of a header": GOOD[:LAST] + b"junk" * 128 + GOOD[LAST:] + END,
    "an extension header at the end": GOOD + pax(record(b"path", b"a.txt")) + END,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_shard_that_stops_being_one_is_cut_behind_what_was_good(
    node: Served, same: TransformInfo, directory: Path, what: str
) -> None:
    (directory / "bad.tar").write_bytes(DAMAGED[what])
    for options in ("", ",errors=skip:1"):
        with pytest.raises(http.client.IncompleteRead) as caught:
            node.get(same, "bad.tar", options)
        data = caught.value.partial
        # The last sample before the damage is not known to be whole, and the end of the one before is held back.
        assert GOOD.startswith(data)
        assert len(data) > LAST - 2 * len(sample(599)) - 1024
        assert not tarfile_is_content(data)
        assert not gnu_tar_is_content(data)
    known = node.failures(transform=f"same@{same.digest}", key="bad.tar").failures
    assert known[-1].sample is None
    assert "at byte" in known[-1].message
    # What is good by itself can be had.
    assert len(members(node.get(same, "bad.tar", ",count=500").body)) == 1000


def served(node: Served, same: TransformInfo, directory: Path, data: bytes, options: str = "") -> Answer:
    (directory / "odd.tar").write_bytes(data)
    return node.get(same, "odd.tar", options)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("no end marker", sample(1) + sample(2)),
        ("half an end marker", sample(1) + sample(2) + bytes(512)),
        ("junk behind the end", sample(1) + sample(2) + END + b"junk" * 1000),
        ("a second archive behind the end", sample(1) + sample(2) + END + sample(3) + END),
        (
            "an empty archive between",
            sample(1) + b"".join(header(b"dir/", kind=b"5") for _ in range(3)) + sample(2) + END,
        ),
    ],
)
def test_an_odd_end_loses_nothing(node: Served, same: TransformInfo, directory: Path, what: str, data: bytes) -> None:
    answer = served(node, same, directory, data)
    assert answer.status == 200, what
    assert members(answer.body) == members(sample(1) + sample(2) + END)


def test_names_are_never_paths(node: Served, same: TransformInfo, directory: Path) -> None:
    names = [
        b"/etc/absolute.txt",
        b"../../up.txt",
        b"./dot/./x.txt",
        b"caf\xe9.txt",
        b"\xe6\x97\xa5\xe6\x9c\xac.txt",
        b"line\nbreak.txt",
        b"C:\\windows.txt",
        b"n" * 96 + b".txt",
    ]
    data = b"".join(member(name, b"%d" % ordinal) for ordinal, name in enumerate(names)) + END
    found = members(served(node, same, directory, data).body)
    assert [name.encode("utf-8", "surrogateescape") for name in found] == names
    assert list(found.values()) == [b"%d" % ordinal for ordinal in range(len(names))]


def test_what_is_no_regular_file_is_passed_over(node: Served, same: TransformInfo, directory: Path) -> None:
    odd = b"".join(header(b"0005.%d" % kind, kind=b"%d" % kind) for kind in range(1, 7))
    data = sample(1) + odd + member(b"0006.Z", b"unknown kind", kind=b"Z") + sample(2) + END
    assert members(served(node, same, directory, data).body) == members(sample(1) + sample(2) + END)


def test_samples_are_grouped_as_webdataset_groups_them(node: Served, same: TransformInfo, directory: Path) -> None:
    listed = [
        "a.b/0001.jpg.extra",
        "a.b/0001.CLS",
        "noextension",
        "__meta__/x.txt",
        "0002.txt",
        "0003.txt",
        "0002.txt",
        ".hidden",
        "0004.seg.txt",
        "0004.txt",
    ]
    data = b"".join(member(name.encode(), b"1") for name in listed) + END
    answer = served(node, same, directory, data)
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as archive:
        names = archive.getnames()
    assert names == [
        "a.b/0001.cls",
        "a.b/0001.jpg.extra",
        "0002.txt",
        "0003.txt",
        "0002.txt",
        "0004.seg.txt",
        "0004.txt",
    ]


def test_a_shard_of_nothing_is_a_valid_empty_one(node: Served, same: TransformInfo, directory: Path) -> None:
    for data in (END, header(b"dir/", kind=b"5") + END, member(b"noextension", b"x") + END):
        answer = served(node, same, directory, data)
        assert answer.status == 200
        assert members(answer.body) == {}
        assert gnu_tar_is_content(answer.body)


def test_a_member_larger_than_a_workers_memory_fails_its_sample(
    node: Served, same: TransformInfo, directory: Path
) -> None:
    size = 1 << 30
    path = directory / "large.tar"
    with path.open("wb") as file:
        file.write(sample(1) + header(b"0002.bin", b"%011o\0" % size))
        file.seek(size, 1)
        file.write(sample(3) + END)
    answer = node.get(same, "large.tar", ",errors=skip:0.5")
    path.unlink()
    assert answer.status == 200, answer.body
    assert sorted(members(answer.body)) == ["0001.cls", "0001.txt", "0003.cls", "0003.txt"]
    (failure,) = node.failures(key="large.tar").failures
    assert (failure.sample, failure.message) == ("0002", f"sample '0002' of {size} bytes cannot be read: MemoryError")
