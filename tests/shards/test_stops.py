"""Cutting a tar stream by where it may stop, judged by the readers that would be fooled."""

import io
import itertools
import mmap
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import FramedField, end_padding, frame_into, framed_size
from shardmill.shards.payloads import BytesPayload
from shardmill.shards.stops import WHOLE, Stretch, Stretches
from tests.etl.judges import tarfile_is_content

NAMES = st.sampled_from(["0001.cls", "0001.jpg", "a/b.txt", "ä" * 40 + ".npy", "k" * 150 + ".json"])
SIZES = st.sampled_from([0, 1, 2, 511, 512, 513, 2047, 2048, 2049, 2050, 9000, 40_000])


def framed(members: list[tuple[str, int]]) -> bytes:
    data = framed_samples([[FramedField(name, BytesPayload(b"\x01" * size)) for name, size in members]])
    return data + bytes(end_padding(len(data)))


def framed_samples(samples: list[list[FramedField]]) -> bytes:
    """Without an end."""
    data = bytearray()
    for fields in samples:
        piece = bytearray(framed_size(fields))
        frame_into(memoryview(piece), fields)
        data += piece
    return bytes(data)


def stretches(data: bytes, steps: list[int]) -> list[Stretch]:
    """Fed in parts of these sizes, over and over."""
    cutter, found, position, turn = Stretches(), [], 0, 0
    while position < len(data):
        step = steps[turn % len(steps)]
        found += [Stretch(bytes(piece.data), piece.is_whole) for piece in cutter.feed(data[position : position + step])]
        position, turn = position + step, turn + 1
    return [*found, *cutter.finish()]


@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, SIZES), max_size=12), st.lists(st.integers(1, 20_000), min_size=1, max_size=4))
def test_the_stretches_are_the_stream(members: list[tuple[str, int]], steps: list[int]) -> None:
    data = framed(members)
    assert b"".join(bytes(piece.data) for piece in stretches(data, steps)) == data


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, SIZES), min_size=1, max_size=8), st.data())
def test_no_allowed_stop_before_the_last_payload_looks_complete(
    members: list[tuple[str, int]], choices: st.DataObject
) -> None:
    data = framed(members)
    # Once the last payload is out whole, nothing is missing but the end marker.
    last = max((offset + size for offset, size in payloads(data) if size), default=0)
    stops, position = [], 0
    for piece in stretches(data, [len(data)]):
        stops += [position, position + len(piece.data)]
        if not piece.is_whole and len(piece.data) > 1:
            stops.append(position + choices.draw(st.integers(1, len(piece.data) - 1)))
        position += len(piece.data)
    for stop in sorted(set(stops)):
        if 0 < stop < last:
            assert not tarfile_is_content(data[:stop]), stop


def test_nothing_is_held_that_a_reader_may_have_already() -> None:
    """What a run has ready ends before a payload's last byte, and all of it goes out."""
    data = framed([(f"{ordinal:04d}.txt", 10) for ordinal in range(20)])
    for offset, size in payloads(data):
        cut = offset + size - 1
        assert sum(len(piece.data) for piece in Stretches().feed(data[:cut])) == cut


def test_what_only_goes_on_with_a_sample_is_not_urgent() -> None:
    """The end of a large payload and the header behind it complete nothing that a reader could use."""
    size = 9000
    samples = [
        [
            FramedField(f"{key}.npy", BytesPayload(b"\x01" * size), ordinal=key),
            FramedField(f"{key}.cls", BytesPayload(b"12")),
        ]
        for key in range(2)
    ]
    cutter = Stretches()
    # As a run publishes them: each sample up to the last byte of its last payload, which goes with the next.
    first, second = framed_samples(samples[:1]), framed_samples(samples)
    for data in (first[: -512 + 1], second[len(first) - 512 + 1 : -512 + 1]):
        assert [piece.is_urgent for piece in cutter.feed(data) if piece.is_whole] == [True, False]


def test_where_headers_do_not_say_where_samples_begin_all_is_urgent() -> None:
    data = framed([("0001.npy", 9000), ("0001.cls", 2), ("0002.npy", 9000), ("0002.cls", 2)])
    assert all(piece.is_urgent for piece in Stretches().feed(data))


def payloads(data: bytes) -> list[tuple[int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member.offset_data, member.size) for member in archive]


def test_gnu_tar_complains_at_every_allowed_stop() -> None:
    data = framed([("0001.cls", 1), ("0001.jpg", 9000), ("0002.cls", 2), ("0002.jpg", 700), ("0003.cls", 3000)])
    last = max(offset + size for offset, size in payloads(data))
    position = 0
    for piece in stretches(data, [len(data)]):
        for stop in {position, position + (0 if piece.is_whole else len(piece.data) // 2), position + len(piece.data)}:
            if 0 < stop < last:
                judged = subprocess.run(["tar", "-tf", "-"], input=data[:stop], capture_output=True)
                assert judged.returncode == 2, (stop, judged.stderr)
        position += len(piece.data)


@pytest.mark.parametrize("size", [1, 511, 900, 2000, 2049, 5000])
def test_whole_stretches_are_short(size: int) -> None:
    data = framed([(f"{ordinal:04d}.txt", size) for ordinal in range(100)])
    for limit in (WHOLE, 40_000):
        cutter = Stretches()
        cutter.limit = limit
        assert max(len(piece.data) for piece in cutter.feed(data) if piece.is_whole) <= limit


@pytest.mark.parametrize(
    "data", [framed([("0001.cls", 0)] * 1000), b"".join(framed([("x" * 60_000 + ".cls", 0)])[:-1024] for _ in range(9))]
)
def test_members_without_payloads_are_not_held_without_bound(data: bytes) -> None:
    assert max(len(piece.data) for piece in stretches(data, [1 << 16])) < 1 << 18


def test_large_payloads_are_not_copied() -> None:
    view = memoryview(framed([("big.npy", 1 << 20)]))
    feeding = Stretches().feed(view)
    loose = next(piece for piece in feeding if not piece.is_whole)
    assert isinstance(loose.data, memoryview)
    assert loose.data.obj is view.obj


@pytest.mark.parametrize("taken", [1, 2, 3, 100])
def test_no_view_is_kept_once_it_is_closed(taken: int) -> None:
    """Whoever still refers to a stretch: the memory may be unmapped, and its descriptor with it."""
    data = framed([("small.txt", 10), ("big.npy", 1 << 20), ("other.npy", 1 << 20)])
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    view = memoryview(memory)
    feeding = Stretches().feed(view)
    kept = list(itertools.islice(feeding, taken))
    feeding.close()
    view.release()
    memory.close()
    assert kept


@pytest.mark.parametrize("data", [b"<html>" * 1000, bytes(5000), b"\xff" * 5000])
def test_what_is_no_tar_is_passed_on(data: bytes) -> None:
    assert b"".join(bytes(piece.data) for piece in stretches(data, [700])) == data
