"""Trailers: whatever is wrong with an object's file is found, and never becomes another object."""

import os
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmill.core.errors import CorruptObject
from shardmill.storage import trailer as trailers
from shardmill.storage.trailer import BLOCK, Hasher, Trailer, pack, read_trailer

PAYLOAD = b"payload " * 100


def trailer_of(payload: bytes, *, user: dict[str, str] | None = None) -> Trailer:
    hasher = Hasher()
    hasher.update(payload)
    return Trailer("ais://b", "key", len(payload), hasher.checksum, hasher.blocks(), "v1", 1.5, user or {})


def read(path: Path, data: bytes) -> Trailer:
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_trailer(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "object"


@pytest.mark.parametrize("size", [0, 1, len(PAYLOAD), BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_trailer_is_read_back_from_behind_the_payload(path: Path, size: int) -> None:
    payload = bytes(size)
    trailer = trailer_of(payload, user={"name": "värde"})
    assert read(path, payload + pack(trailer)) == trailer
    assert len(trailer.blocks) == -(-size // BLOCK) * 8
    assert trailer.meta.size == size
    assert trailer.meta.etag == xxhash.xxh3_128_hexdigest(payload)
    assert trailer.meta.checksum == f"xxh3:{trailer.meta.etag}"
    assert trailer.meta.user == {"name": "värde"}


def test_a_trailer_longer_than_the_first_read_is_read_whole(path: Path) -> None:
    """Of an object of many blocks."""
    size = 2000 * BLOCK
    trailer = Trailer("ais://b", "key", size, "0" * 32, os.urandom(2000 * 8), "v1", 1.5, {})
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(pack(trailer))
    with path.open("rb") as file:
        assert read_trailer(file.fileno()) == trailer


def test_every_torn_file_is_corrupt(path: Path) -> None:
    data = PAYLOAD + pack(trailer_of(PAYLOAD))
    for size in range(len(data)):
        with pytest.raises(CorruptObject):
            read(path, data[:size])


def test_a_file_of_nothing_or_of_zeros_is_corrupt(path: Path) -> None:
    """As a power cut leaves them where names are written before bytes."""
    for data in (b"", bytes(31), bytes(4096), PAYLOAD):
        with pytest.raises(CorruptObject):
            read(path, data)


def test_every_flipped_bit_of_a_trailer_is_found(path: Path) -> None:
    """But those of the footer's spare field, which say nothing."""
    trailer = trailer_of(PAYLOAD)
    packed = pack(trailer)
    spare = range(len(packed) - 20, len(packed) - 16)
    for position in range(len(packed)):
        for bit in range(8):
            wrong = bytearray(packed)
            wrong[position] ^= 1 << bit
            if position in spare:
                assert read(path, PAYLOAD + wrong) == trailer
                continue
            with pytest.raises(CorruptObject):
                read(path, PAYLOAD + wrong)


def test_bytes_lost_or_added_before_the_trailer_are_found(path: Path) -> None:
    packed = pack(trailer_of(PAYLOAD))
    for payload in (PAYLOAD[:-1], PAYLOAD + b"x", b"", PAYLOAD + PAYLOAD):
        with pytest.raises(CorruptObject, match="another length"):
            read(path, payload + packed)


def test_bytes_behind_the_trailer_are_found(path: Path) -> None:
    with pytest.raises(CorruptObject):
        read(path, PAYLOAD + pack(trailer_of(PAYLOAD)) + b"\0")


def test_a_format_that_this_program_does_not_know_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trailers, "FORMAT", 2)
    data = PAYLOAD + pack(trailer_of(PAYLOAD))
    with pytest.raises(CorruptObject, match=r"has format 2; this program reads \(1,\)"):
        read(path, data)


def test_a_body_with_another_shape_is_corrupt(path: Path) -> None:
    for body in (b"", b"\xc1", msgspec.msgpack.encode([1, 2]), msgspec.msgpack.encode({"key": "k"})):
        digest = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
        footer = len(body).to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(4) + digest + b"shrdmill"
        with pytest.raises(CorruptObject, match="cannot be read"):
            read(path, PAYLOAD + body + footer)


def test_a_length_beyond_the_file_is_corrupt(path: Path) -> None:
    for length in (2**64 - 1, 2**40, len(PAYLOAD) + 1):
        with pytest.raises(CorruptObject):
            read(path, PAYLOAD + length.to_bytes(8, "little") + bytes([1, 0, 0, 0]) + bytes(12) + b"shrdmill")


def test_a_block_is_known_by_its_hash() -> None:
    payload = os.urandom(BLOCK + 100)
    trailer = trailer_of(payload)
    assert trailer.is_block_right(0, payload[:BLOCK])
    assert trailer.is_block_right(1, payload[BLOCK:])
    assert not trailer.is_block_right(1, payload[:BLOCK])
    assert not trailer.is_block_right(1, payload[BLOCK:-1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    pieces=st.lists(st.binary(max_size=300) | st.just(bytes(BLOCK // 2 + 7)), max_size=6),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
)
def test_hashes_do_not_depend_on_how_the_body_is_cut(pieces: list[bytes], kind: type) -> None:
    whole = b"".join(pieces)
    hasher = Hasher()
    for piece in pieces:
        hasher.update(kind(piece))
    assert hasher.size == len(whole)
    assert hasher.checksum == xxhash.xxh3_128_hexdigest(whole)
    expected = [xxhash.xxh3_64_intdigest(whole[at : at + BLOCK]) for at in range(0, len(whole), BLOCK)]
    assert hasher.blocks() == b"".join(digest.to_bytes(8, "little") for digest in expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_corrupt_or_a_trailer_of_that_length(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorruptObject):
        read(tmp_path / "any", data + b"shrdmill")
