"""WebDataset's `ten` format: arrays as aligned chunks.

A file is a row of chunks: the magic `~TenBin~`, the length as a native 64-bit integer, the bytes padded to 64. Each
array is a header chunk (64-bit words: data type, name, number of dimensions, dimensions) and a data chunk.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"~TenBin~"
ALIGNMENT = 64  # bytes
MAX_DIMENSIONS = 9  # what WebDataset writes

# WebDataset's own table misspells uint32, so no reader of it can take that type.
_CODES = {
    "float16": b"f2",
    "float32": b"f4",
    "float64": b"f8",
    "int8": b"i1",
    "int16": b"i2",
    "int32": b"i4",
    "int64": b"i8",
    "uint8": b"u1",
    "uint16": b"u2",
    "uint64": b"u8",
}
DTYPES = tuple(_CODES)


def dump_tensors(arrays: "Sequence[np.ndarray[Any, Any]]") -> bytes:
    """Encode arrays.

    Raises:
        ValueError: The format has no code for an array's data type, or the array has too many dimensions.
    """
    parts = []
    for array in arrays:
        code = _CODES.get(array.dtype.name)
        if code is None:
            raise ValueError(f"the ten format has no data type {array.dtype.name}; it has {', '.join(DTYPES)}")
        if array.ndim > MAX_DIMENSIONS:
            raise ValueError(f"the ten format has at most {MAX_DIMENSIONS} dimensions, not {array.ndim}")
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        header = struct.pack(f"@8s8sq{array.ndim}q", code, b"", array.ndim, *array.shape)
        for chunk in (header, native.tobytes()):
            parts += [MAGIC, struct.pack("@q", len(chunk)), chunk, bytes(-len(chunk) % ALIGNMENT)]
    return b"".join(parts)


def load_tensors(data: bytes) -> "list[np.ndarray[Any, Any]]":
    """Decode arrays; they share the memory of `data` and are read-only.

    Raises:
        ValueError: The bytes are not of the format.
    """
    import numpy as np

    names = {code: name for name, code in _CODES.items()}
    arrays = []
    chunks = _chunks(data)
    for header in chunks:
        body = next(chunks, None)
        if body is None:
            raise ValueError("ten data ends behind an array's header")
        if len(header) < 24:
            raise ValueError(f"ten header of {len(header)} bytes")
        code, _, count = struct.unpack_from("@8s8sq", header)
        name = names.get(code.rstrip(b"\0"))
        if name is None:
            raise ValueError(f"ten data type {code!r} is unknown")
        if not 0 <= count <= (len(header) - 24) // 8:
            raise ValueError(f"ten header with {count} dimensions in {len(header)} bytes")
        shape = struct.unpack_from(f"@{count}q", header, 24)
        arrays.append(np.frombuffer(body, dtype=name).reshape(shape))
    return arrays


def _chunks(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset < len(data):
        if data[offset : offset + 8] != MAGIC or offset + 16 > len(data):
            raise ValueError(f"ten data has no chunk at byte {offset}")
        (length,) = struct.unpack_from("@q", data, offset + 8)
        start = offset + 16
        if not 0 <= length <= len(data) - start:
            raise ValueError(f"ten chunk of {length} bytes at byte {offset}, {len(data) - start} are there")
        yield data[start : start + length]
        offset = start + length + -length % ALIGNMENT
