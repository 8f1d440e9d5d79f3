"""Payloads against what numpy writes."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.shards import BytesPayload, NpyPayload, Payload
from shardmill.shards.payloads import MAX_CACHED_HEADERS, _headers, npy_payload


def written(payload: Payload) -> bytes:
    buffer = bytearray(b"\xaa" * (payload.size + 2))
    with memoryview(buffer) as view, view[1:-1] as inner:
        payload.write_into(inner)
    assert buffer[:1] == buffer[-1:] == b"\xaa"
    return bytes(buffer[1:-1])


def saved(array: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("data", [b"", b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"abcdef")[::2]])
def test_bytes_of_every_kind_are_written(data: bytes) -> None:
    assert written(BytesPayload(data)) == bytes(data)


def test_a_view_of_wider_items_counts_in_bytes() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)

    assert written(BytesPayload(array.data)) == array.tobytes()


DTYPES = [
    "?",
    "b",
    "u1",
    "<i2",
    ">i2",
    "u4",
    "i8",
    "f2",
    "f4",
    ">f4",
    "f8",
    "g",
    "F",
    "D",
    "S3",
    "U2",
    ">U2",
    "S0",
    "M8[ns]",
    "m8[s]",
]
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "reversed": lambda a: a[::-1],
    "mirrored": lambda a: a[:, ::-1],
    "crop": lambda a: a[1:, 1:],
    "transposed": lambda a: a.transpose(2, 0, 1),
    "planes seen as pixels": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "channels reversed": lambda a: a[..., ::-1],
    "every second": lambda a: a[::2, ::2],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), "u1") if a.nbytes else a,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_written_as_numpy_writes_them(dtype: str, layout: str) -> None:
    base = np.arange(6 * 5 * 3).astype("u1").reshape(6, 5, 3)
    array = LAYOUTS[layout](base.astype(dtype) if np.dtype(dtype).kind != "m" else base.astype("i8").view("m8[s]"))

    payload = npy_payload(array)

    assert written(payload) == saved(array)
    assert written(payload) == saved(array)  # a payload may be written again


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5),
        np.array(7),
        np.array([]),
        np.zeros((0, 3, 4), "f4"),
        np.zeros((4, 0), "u1", order="F"),
        np.zeros((1, 1, 1), "f4").transpose(2, 1, 0),
        np.arange(5)[::2],
        np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array([None, {"a": 1}], dtype=object),
        np.array([("x",)], dtype=[("n" * 70_000, "U1")]),
        np.ma.masked_array([1, 2, 3], [False, True, False]),
        np.zeros((2,) * 12, "u1").transpose(),
        np.zeros((3, 40, 50, 2), "f4")[:, ::-1],
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 2.0")
def test_odd_arrays_are_written_as_numpy_writes_them(array: Any) -> None:
    assert written(npy_payload(array)) == saved(array)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
def test_any_view_is_written_as_numpy_writes_it(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(int(np.prod(shape)), dtype="<i4").reshape(shape)
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    array = array[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in range(array.ndim))]

    assert written(NpyPayload(array)) == saved(array)


def test_the_header_cache_is_bounded() -> None:
    for width in range(MAX_CACHED_HEADERS + 50):
        npy_payload(np.zeros((1, width), "u1"))

    assert len(_headers) <= MAX_CACHED_HEADERS


def test_nothing_keeps_the_destination_open() -> None:
    array = np.ones((3, 8, 8), "f4").transpose(1, 2, 0)
    payload = npy_payload(array)
    view = memoryview(bytearray(payload.size))

    payload.write_into(view)

    view.release()  # raises while an array still looks at it
