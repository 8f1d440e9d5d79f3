"""One field of many samples: an array where they have one shape, payloads read straight into it; else a list."""

import ast
import struct
import sys
from typing import Any

import numpy as np

from shardmill.loader.stream import Arriving, SampleStream
from shardmill.shards.decoding import Decoder

Array = np.ndarray[Any, Any]

_NPY_START = 10  # bytes: magic, version, length of the header
_MAX_HEADER = 1 << 16


class ArrayPool:
    """Buffers of batches, used again once nobody holds what was given out.

    Fresh memory of a batch costs more than reading it does: each page is faulted in on its first touch.
    """

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._arrays: list[Array] = []

    def take(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
        """An array with undefined content."""
        for array, references in zip(self._arrays, _count_references(self._arrays), strict=True):
            # Whoever still has the batch, or a view of it, has a reference to its buffer.
            if array.shape == shape and array.dtype == dtype and references <= _OWN_REFERENCES:
                return array
        array = np.empty(shape, dtype)
        self._arrays.append(array)
        if len(self._arrays) > self._limit:
            self._arrays.pop(0)
        return array


def _count_references(arrays: list[Array]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


# Of an array that only a list holds. Measured, as interpreters differ in what they count.
_OWN_REFERENCES = _count_references([np.empty(1)])[0]


class Column:
    """Values of one field, row by row.

    Args:
        rows: Expected; more are possible.
    """

    def __init__(self, rows: int, pool: ArrayPool, decoder: Decoder) -> None:
        self._rows = rows
        self._pool = pool
        self._decoder = decoder
        self._buffer: Array | None = None
        self._values: list[Any] = []

    def __len__(self) -> int:
        return len(self._values)

    def read(self, stream: SampleStream, field: Arriving) -> None:
        """Take the payload that is next in the stream as the next row."""
        if field.field.rpartition(".")[2] == "npy" and field.size > _NPY_START:
            self._read_npy(stream, field)
        else:
            self.add(self._decoder.decode(field.field, stream.read(field)))

    def decode(self, name: str, data: bytes) -> Any:
        """A field's value."""
        return self._decoder.decode(name, data)

    def add(self, value: Any) -> None:
        """Take a value as the next row."""
        if (
            isinstance(value, np.ndarray)
            and value.dtype != object
            and (slot := self._slot(value.shape, value.dtype)) is not None
        ):
            slot[...] = value
            value = slot
        self._values.append(value)

    def take(self, rows: list[int]) -> Any:
        """The values of some rows, in the order given: an array where they stack, else a list."""
        values = [self._values[row] for row in rows]
        if self._buffer is not None and all(
            isinstance(value, np.ndarray) and value.base is self._buffer for value in values
        ):
            first = rows[0] if rows else 0
            if rows == list(range(first, first + len(rows))):
                return self._buffer[first : first + len(rows)]
            chosen = self._pool.take((len(rows), *self._buffer.shape[1:]), self._buffer.dtype)
            # Any other mode than `clip` would copy once more.
            return np.take(self._buffer, rows, axis=0, out=chosen, mode="clip")
        if values and all(isinstance(value, np.ndarray) for value in values):
            alike = {(value.shape, value.dtype) for value in values}
            return np.stack(values) if len(alike) == 1 else values
        if values and all(type(value) is int for value in values):
            return np.array(values, np.int64)
        if values and all(type(value) is float for value in values):
            return np.array(values, np.float64)
        return values

    def _read_npy(self, stream: SampleStream, field: Arriving) -> None:
        head = bytearray(_NPY_START)
        stream.read_into(memoryview(head))
        parsed = _parse_start(head)
        if parsed is None:
            rest = bytearray(field.size - _NPY_START)
            stream.read_into(memoryview(rest))
            self.add(self._decoder.decode(field.field, bytes(head + rest)))
            return
        header = bytearray(parsed)
        stream.read_into(memoryview(header))
        shape, dtype, is_fortran = _parse_header(bytes(header))
        slot = None if is_fortran or dtype.hasobject else self._slot(shape, dtype)
        if slot is None or slot.nbytes != field.size - _NPY_START - parsed:
            rest = bytearray(field.size - _NPY_START - parsed)
            stream.read_into(memoryview(rest))
            self.add(self._decoder.decode(field.field, bytes(head + header + rest)))
            return
        if slot.nbytes:
            stream.read_into(slot.reshape(-1).view(np.uint8).data)
        self._values.append(slot)

    def _slot(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array | None:
        """The next row of the buffer, if the value fits there."""
        row = len(self._values)
        if self._buffer is None and not row:
            self._buffer = self._pool.take((max(self._rows, 1), *shape), dtype)
        buffer = self._buffer
        if buffer is None or buffer.shape[1:] != shape or buffer.dtype != dtype or row >= len(buffer):
            return None
        return buffer[row, ...]


def _parse_start(head: bytearray) -> int | None:
    """Bytes of the header that follows, or None for what numpy itself has to look at."""
    if head[:6] != b"\x93NUMPY" or head[6] != 1:
        return None
    return int(struct.unpack("<H", head[8:10])[0])


_parsed: dict[bytes, tuple[tuple[int, ...], "np.dtype[Any]", bool]] = {}


def _parse_header(header: bytes) -> tuple[tuple[int, ...], "np.dtype[Any]", bool]:
    """Shape, type and order; the samples of a batch nearly always have one header, so it is parsed once."""
    known = _parsed.get(header)
    if known is None:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        known = (tuple(fields["shape"]), np.dtype(fields["descr"]), bool(fields["fortran_order"]))
        if len(_parsed) > 1000:
            _parsed.clear()
        _parsed[header] = known
    return known
