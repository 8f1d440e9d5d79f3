"""Whole shards written, and read back by other people's readers."""

import contextlib
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import EncodeError, ShardIndex, ShardWriter, TarError, iter_stream, member_name, member_order
from tests.shards.archives import members_of, reader

SAMPLES: list[dict[str, object]] = [
    {"__key__": "train/0001", "npy": np.ones((2, 3), "f4"), "cls": 3, "__url__": "x", "_meta": "dropped"},
    {"__key__": "train/0002", "json": {"a": 1}, "seg.png": b"raw", "bin": b""},
    {"__key__": "ä" * 80, "txt": "text"},
]


def written(samples: list[dict[str, object]]) -> bytes:
    stream = io.BytesIO()
    with ShardWriter(stream) as writer:
        for sample in samples:
            writer.write(sample)
    return stream.getvalue()


def test_samples_come_back_in_tarwriters_order() -> None:
    data = written(SAMPLES)

    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == [
            "train/0001.cls",
            "train/0001.npy",
            "train/0002.bin",
            "train/0002.json",
            "train/0002.seg.png",
            "ä" * 80 + ".txt",
        ]
    samples = ShardIndex(reader(data), len(data)).advance(9)
    assert [(sample.key, [field.name for field in sample.fields]) for sample in samples] == [
        ("train/0001", ["cls", "npy"]),
        ("train/0002", ["bin", "json", "seg.png"]),
        ("ä" * 80, ["txt"]),
    ]


def test_gnu_tar_lists_it_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(written(SAMPLES))

    done = subprocess.run(["tar", "-tf", path, "--quoting-style=literal"], check=True, capture_output=True, text=True)

    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 6


def test_the_same_samples_are_the_same_bytes() -> None:
    assert written(SAMPLES) == written(SAMPLES)
    [first, *_] = members_of(written(SAMPLES))
    assert (first.mtime, first.mode, first.uname, first.gname) == (0, 0o444, "bigdata", "bigdata")


def test_header_values_are_the_callers() -> None:
    stream = io.BytesIO()
    with ShardWriter(stream, mtime=77, mode=0o600, uid=1, gid=2, uname="u", gname="g") as writer:
        writer.write({"__key__": "a", "txt": b""})

    [member] = members_of(stream.getvalue())
    assert (member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname) == (
        77,
        0o600,
        1,
        2,
        "u",
        "g",
    )


def test_a_shard_is_whole_records() -> None:
    assert written([]) == bytes(10240)
    assert len(written(SAMPLES)) % 10240 == 0


def test_an_abandoned_shard_has_no_end() -> None:
    stream = io.BytesIO()
    with contextlib.suppress(KeyboardInterrupt), ShardWriter(stream) as writer:
        writer.write({"__key__": "a", "txt": b"x"})
        raise KeyboardInterrupt

    with pytest.raises(TarError, match="without end-of-archive"):
        list(iter_stream(io.BytesIO(stream.getvalue())))


def test_a_closed_shard_takes_no_more() -> None:
    stream = io.BytesIO()
    writer = ShardWriter(stream)
    writer.close()
    writer.close()

    assert stream.getvalue() == bytes(10240)
    with pytest.raises(ValueError, match="closed"):
        writer.write({"__key__": "a", "txt": b"x"})


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([{"txt": b""}], "needs a str as __key__"),
        ([{"__key__": 7, "txt": b""}], "needs a str as __key__"),
        ([{"__key__": "", "txt": b""}], "needs a str as __key__"),
        ([{"__key__": "a.b", "txt": b""}], "would not be read back as field 'txt' of sample 'a.b'"),
        ([{"__key__": "a", "x/y": b""}], "would not be read back"),
        ([{"__key__": "a\0", "x": b""}], "would not be read back"),
        ([{"__key__": "__a", "x__": b""}], "would not be read back"),
        ([{"__key__": "__a__/b", "x": b""}], "would not be read back"),
        ([{"__key__": "a", "x": b""}, {"__key__": "a", "y": b""}], "two adjacent samples have the key 'a'"),
        ([{"__key__": "a", "JPG": b"", "jpg": b""}], "differ only in case: JPG, jpg"),
    ],
)
def test_what_would_be_read_back_differently_is_refused(samples: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        written(samples)


def test_a_refused_sample_leaves_nothing_behind() -> None:
    stream = io.BytesIO()
    with ShardWriter(stream) as writer:
        with pytest.raises(EncodeError):
            writer.write({"__key__": "a", "cls": 1, "txt": 5})
        writer.write({"__key__": "a", "cls": 1})

    assert [member.name for member in members_of(stream.getvalue())] == ["a.cls"]


def test_fields_stand_sorted_without_underscored_ones() -> None:
    assert member_order(["jpg", "__key__", "cls", "_x", "JSON", ""]) == ["", "JSON", "cls", "jpg"]


@settings(max_examples=200, deadline=None)
@given(st.text("ab./_", min_size=1, max_size=6), st.text("ab./_", min_size=1, max_size=4))
def test_a_name_that_is_accepted_is_read_back(key: str, field: str) -> None:
    try:
        member_name(key, field)
    except ValueError:
        return
    if field.startswith("_"):
        return
    data = written([{"__key__": key, field: b"x"}])
    [sample] = ShardIndex(reader(data), len(data)).advance(2)

    assert (sample.key, [one.name for one in sample.fields]) == (key, [field])
