"""Encoded field values that know their size and write themselves into memory that someone else owns.

An array so reaches its place in the outgoing shard with one copy, or none before it.
"""

import io
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

MAX_INTERLEAVED = 16  # channels; beyond it the generic copy wins
MAX_CACHED_HEADERS = 1024  # one a dtype and shape; pictures of free sizes have many

# Kinds whose npy header follows from dtype and shape alone: numbers, strings, times; not records or objects.
_PLAIN_KINDS = frozenset("biufcSUmM")

_headers: "dict[tuple[np.dtype[Any], tuple[int, ...], bool], bytes]" = {}


class Payload(Protocol):
    """The bytes of one field."""

    @property
    def size(self) -> int: ...

    def write_into(self, view: memoryview) -> None:
        """Fill a writable view of exactly `size` bytes."""
        ...


class BytesPayload:
    """Bytes that are there already."""

    __slots__ = ("_data", "size")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        if isinstance(data, memoryview) and (data.ndim != 1 or data.itemsize != 1 or not data.contiguous):
            data = data.tobytes()
        self._data = data
        self.size = len(data)

    def write_into(self, view: memoryview) -> None:
        view[:] = self._data


class NpyPayload:
    """An array as `numpy.save` writes it, byte for byte, from its cached header and its own memory."""

    __slots__ = ("_array", "_header", "_is_fortran", "size")

    def __init__(self, array: "np.ndarray[Any, Any]") -> None:
        """Args:
        array: Any array but records and objects (see `npy_payload`); must not change until it is written.
        """
        flags = array.flags
        self._array = array
        self._is_fortran = flags.f_contiguous and not flags.c_contiguous
        self._header = _npy_header(array, self._is_fortran)
        self.size = len(self._header) + array.nbytes

    @property
    def array(self) -> "np.ndarray[Any, Any]":
        """What will be written."""
        return self._array

    def write_into(self, view: memoryview) -> None:
        start = len(self._header)
        view[:start] = self._header
        if not self._array.nbytes:
            return
        array = self._array.T if self._is_fortran else self._array
        if array.flags.c_contiguous:
            view[start:] = array.reshape(-1).view("u1").data
        else:
            _copy_strided(array, view[start:])


def npy_payload(array: "np.ndarray[Any, Any] | np.generic") -> Payload:
    """The npy form of anything that numpy's writer takes; objects are pickled, as it does."""
    import numpy as np

    if type(array) is np.ndarray and array.dtype.kind in _PLAIN_KINDS and array.dtype.metadata is None:
        return NpyPayload(array)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)  # type: ignore[arg-type]  # scalars have all it uses
    return BytesPayload(stream.getbuffer())


def _npy_header(array: "np.ndarray[Any, Any]", is_fortran: bool) -> bytes:
    identity = (array.dtype, array.shape, is_fortran)
    header = _headers.get(identity)
    if header is None:
        import numpy as np

        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        header = stream.getvalue()
        if len(_headers) >= MAX_CACHED_HEADERS:
            _headers.clear()
        _headers[identity] = header
    return header


def _copy_strided(array: "np.ndarray[Any, Any]", view: memoryview) -> None:
    """Copy into C order.

    Pictures are often channel planes seen as interleaved (`chw.transpose(1, 2, 0)`), or mirrored. numpy's copy of those
    costs ten plain ones, because its inner loop runs over three channels; one pass a channel costs a third of that.
    """
    import numpy as np

    target = np.frombuffer(view, dtype=array.dtype).reshape(array.shape)
    channels = array.shape[-1]
    has_whole_rows = array.strides[-2:] == (channels * array.itemsize, array.itemsize)
    if array.ndim >= 2 and channels <= MAX_INTERLEAVED and not has_whole_rows:
        for channel in range(channels):
            target[..., channel] = array[..., channel]
    else:
        np.copyto(target, array)
