"""Values as WebDataset 1.0.2's TarWriter writes them, chosen by the last part of a field's name.

The bytes are the same ones, with two exceptions that make equal samples equal bytes: gzip gets no time, and arrays
need not be contiguous.
"""

import gzip
import io
import json
import numbers
import operator
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

from shardmill.shards.payloads import BytesPayload, Payload, npy_payload
from shardmill.shards.tensors import dump_tensors


class EncodeError(TypeError):
    """A field's value cannot be written under the field's name."""

    def __init__(self, field: str, given: str, accepted: str) -> None:
        super().__init__(field, given, accepted)
        self.field = field
        self.given = given
        self.accepted = accepted

    def __str__(self) -> str:
        return f"field {self.field!r} is {self.given}; it takes {self.accepted}"


def encode(field: str, value: object) -> Payload:
    """The bytes of one field. bytes and str go as they are whatever the field is called; `.gz` at its end compresses.

    Raises:
        EncodeError: The value's type does not fit the field's name, or a library is missing.
        ValueError: The type fits, the value does not (a float picture outside 0 … 1).
    """
    name = field.removesuffix(".gz") if field != ".gz" else field
    payload = _encode_plain(field, name, value)
    if name == field:
        return payload
    data = bytearray(payload.size)
    payload.write_into(memoryview(data))
    return BytesPayload(gzip.compress(data, mtime=0))


def _encode_plain(field: str, name: str, value: Any) -> Payload:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return BytesPayload(value)
    if isinstance(value, str):
        return BytesPayload(value.encode("utf-8"))
    extension = name.rpartition(".")[2].lower()
    encoder = _ENCODERS.get(extension)
    if encoder is None:
        raise EncodeError(field, _type_name(value), f"only bytes or str, for {extension!r} has no encoder")
    try:
        return encoder(field, value)
    except ModuleNotFoundError as error:
        raise EncodeError(field, _type_name(value), f"bytes only, for this environment lacks {error.name}") from error


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _encode_number(field: str, value: Any) -> Payload:
    if isinstance(value, numbers.Number) or type(value).__module__ == "numpy":
        return BytesPayload(str(value).encode("ascii"))
    try:
        # Tensors with one integer in them; their str() is no number.
        return BytesPayload(b"%d" % operator.index(value))
    except TypeError:
        raise EncodeError(field, _type_name(value), "an integer, bytes or str") from None


def _refuse_text(field: str, value: Any) -> Payload:
    raise EncodeError(field, _type_name(value), "str or bytes")


def _encode_json(field: str, value: Any) -> Payload:
    try:
        return BytesPayload(json.dumps(value).encode("utf-8"))
    except TypeError as error:
        raise EncodeError(field, _type_name(value), f"what JSON can hold, bytes or str ({error})") from None


def _encode_pickle(_field: str, value: Any) -> Payload:
    return BytesPayload(pickle.dumps(value))


def _encode_torch(_field: str, value: Any) -> Payload:
    stream = io.BytesIO()
    import_module("torch").save(value, stream)
    return BytesPayload(stream.getbuffer())


def _encode_npy(field: str, value: Any) -> Payload:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)):
        return npy_payload(value)
    raise EncodeError(field, _type_name(value), f"a numpy array, bytes or str{_tensor_hint(value)}")


def _encode_npz(field: str, value: Any) -> Payload:
    import numpy as np

    accepted = "a dict of str to numpy array, bytes or str"
    if not isinstance(value, dict):
        raise EncodeError(field, _type_name(value), accepted)
    for key, array in value.items():
        if not isinstance(key, str) or not isinstance(array, np.ndarray):
            raise EncodeError(field, f"a dict with {_type_name(key)} → {_type_name(array)}", accepted)
    stream = io.BytesIO()
    np.savez_compressed(stream, **value)
    return BytesPayload(stream.getbuffer())


def _encode_tensors(field: str, value: Any) -> Payload:
    import numpy as np

    arrays = value if isinstance(value, list) else [value]
    for array in arrays:
        if not isinstance(array, np.ndarray):
            accepted = f"a numpy array or a list of them, bytes or str{_tensor_hint(array)}"
            raise EncodeError(
                field, _type_name(value) if array is value else f"a list with {_type_name(array)}", accepted
            )
    return BytesPayload(dump_tensors(arrays))


def _encode_msgpack(field: str, value: Any) -> Payload:
    msgpack = import_module("msgpack")
    try:
        return BytesPayload(msgpack.packb(value))
    except TypeError as error:
        raise EncodeError(field, _type_name(value), f"what MessagePack can hold, bytes or str ({error})") from None


def _encode_cbor(_field: str, value: Any) -> Payload:
    return BytesPayload(import_module("cbor").dumps(value))


def _picture_encoder(form: str) -> "_Encoder":
    """For a PIL image or an array: uint8, or float32 and float64 in 0 … 1, shape (height, width[, 1 or 3])."""
    options = {"quality": 100} if form in ("JPEG", "TIFF") else {}

    def encode_picture(field: str, value: Any) -> Payload:
        import PIL.Image

        picture = value if isinstance(value, PIL.Image.Image) else _picture_of(field, value)
        stream = io.BytesIO()
        picture.save(stream, format=form, **options)
        return BytesPayload(stream.getbuffer())

    return encode_picture


def _picture_of(field: str, value: Any) -> Any:
    import numpy as np
    import PIL.Image

    accepted = "a PIL image, a numpy array of shape (height, width) or (height, width, 1 or 3), bytes or str"
    if not isinstance(value, np.ndarray):
        raise EncodeError(field, _type_name(value), accepted + _tensor_hint(value))
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3)):
        raise EncodeError(field, f"an array of shape {value.shape}", accepted)
    if value.dtype in (np.float32, np.float64):
        low, high = float(value.min()), float(value.max())
        if not (low > -0.001 and high < 1.001):
            raise ValueError(f"field {field!r}: float pictures are in 0 … 1, not {low:g} … {high:g}")
        value = np.array(np.clip(value, 0.0, 1.0) * 255.0, "uint8")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    try:
        return PIL.Image.fromarray(value)
    except TypeError:
        raise EncodeError(field, f"an array of {value.dtype}", "uint8, or float32 and float64 in 0 … 1") from None


def _tensor_hint(value: Any) -> str:
    return "; call .numpy() on a tensor" if hasattr(value, "numpy") else ""


_Encoder = Callable[[str, Any], Payload]


def _table(*rows: tuple[str, _Encoder]) -> dict[str, _Encoder]:
    return {name: encoder for names, encoder in rows for name in names.split()}


_ENCODERS = _table(
    ("cls cls2 class count index inx id", _encode_number),
    ("txt text transcript html htm", _refuse_text),
    ("json jsn", _encode_json),
    ("pyd pickle pkl", _encode_pickle),
    ("pth", _encode_torch),
    ("npy", _encode_npy),
    ("npz", _encode_npz),
    ("ten tenbin tb", _encode_tensors),
    ("mp msgpack msg", _encode_msgpack),
    ("cbor", _encode_cbor),
    ("jpg jpeg img image", _picture_encoder("JPEG")),
    ("png", _picture_encoder("PNG")),
    # Pillow has one writer for the family, which looks at the picture's mode; WebDataset asks it for formats it lacks.
    ("pbm pgm ppm", _picture_encoder("PPM")),
    ("tif tiff", _picture_encoder("TIFF")),
)
