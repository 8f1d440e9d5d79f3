"""Following a stream by its headers: where the sample in work began, however the stream is cut into pieces."""

import io
import random
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from shardmill.shards.framing import FramedField, end_padding, frame_into, framed_size
from shardmill.shards.payloads import BytesPayload
from shardmill.shards.tracking import SampleTracker


def build_shard(samples: list[tuple[int, str, list[bytes]]]) -> tuple[bytes, list[tuple[int, int]]]:
    """A framed shard of (ordinal, key, payloads), and (offset, ordinal) of each sample in it."""
    data = bytearray()
    starts = []
    for ordinal, key, payloads in samples:
        fields = [
            FramedField(f"{key}.f{number}", BytesPayload(payload), ordinal=None if number else ordinal)
            for number, payload in enumerate(payloads)
        ]
        piece = bytearray(framed_size(fields))
        frame_into(memoryview(piece), fields)
        starts.append((len(data), ordinal))
        data += piece
    return bytes(data + bytes(end_padding(len(data)))), starts


sample = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["a", "b" * 90, "ü" * 60]),
    st.lists(st.binary(max_size=1500), min_size=1, max_size=3),
)


@given(steps=st.lists(sample, min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_the_sample_in_work_is_known_at_every_cut(steps: list[tuple[int, str, list[bytes]]], seed: int) -> None:
    ordinal = 2**21 - 2  # so that the upper number is used too
    samples = []
    for number, (advance, key, payloads) in enumerate(steps):
        ordinal += advance
        samples.append((ordinal, f"{number}{key}", payloads))
    data, starts = build_shard(samples)
    order = random.Random(seed)
    tracker = SampleTracker()
    position = 0
    while position < len(data):
        size = order.choice([1, 100, 511, 512, 5000])
        tracker.feed(memoryview(data)[position : position + size])
        position = min(len(data), position + size)
        if tracker.ordinal is not None:
            # Of several outputs of one source sample it is the first one that counts.
            begun = [(start, number) for start, number in starts if number == tracker.ordinal]
            assert tracker.offset == begun[0][0]
            assert tracker.offset <= position
    assert tracker.ordinal == samples[-1][0]
    assert tracker.end is not None
    assert tracker.end + end_padding(tracker.end) == len(data)


def test_readers_pass_over_the_number() -> None:
    data, _ = build_shard([(5_000_000, "key", [b"payload"])])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.getmembers()[0]
        assert member.name == "key.f0"
        assert member.isreg()
        assert (member.devmajor << 21) + member.devminor == 5_000_000
        file = archive.extractfile(member)
        assert file is not None
        assert file.read() == b"payload"
