"""Fields as WebDataset 1.0.2 hands them to a training loop: `.decode(spec)`, without importing webdataset or torch.

Every field gives what it gives there: type, values, and bytes where there is no decoder. Two things are stricter: a
missing library is an error that names it, and what unpickles needs permission.
"""

import gzip
import io
import json
import pickle
from collections.abc import Callable, Collection
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from shardmill.shards.tensors import load_tensors

Kind = Literal["pil", "numpy", "torch"]

IMAGE_SPECS: dict[str, tuple[Kind, str, bool]] = {
    "pil": ("pil", "RGB", False),
    "pilrgb": ("pil", "RGB", False),
    "pilrgba": ("pil", "RGBA", False),
    "pill": ("pil", "L", False),
    "rgb": ("numpy", "RGB", True),
    "rgba": ("numpy", "RGBA", True),
    "l": ("numpy", "L", True),
    "rgb8": ("numpy", "RGB", False),
    "rgba8": ("numpy", "RGBA", False),
    "l8": ("numpy", "L", False),
    "torch": ("torch", "RGB", True),
    "torchrgb": ("torch", "RGB", True),
    "torchrgba": ("torch", "RGBA", True),
    "torchl": ("torch", "L", True),
    "torchrgb8": ("torch", "RGB", False),
    "torchrgba8": ("torch", "RGBA", False),
    "torchl8": ("torch", "L", False),
}
"""Spec → what holds the picture, its mode, and whether it is float32 in 0 … 1 (else uint8)."""

# Everything that Pillow can open by its name, as WebDataset froze it; even where Pillow then needs a helper.
_PICTURE_NAMES = """
    apng blp bmp bufr bw cur dcx dds dib emf eps fit fits flc fli ftc ftu gbr gif grib h5 hdf icb icns ico iim im
    j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpeg mpg msp pbm pcd pcx pgm png pnm ppm ps psd pxr ras rgb rgba sgi
    tga tif tiff vda vst webp wmf xbm xpm
"""
_PICTURES = frozenset(_PICTURE_NAMES.split())


class MissingDecoder(RuntimeError):
    """A field's decoder needs a library that this environment lacks."""

    def __init__(self, name: str, library: str) -> None:
        super().__init__(name, library)
        self.name = name
        self.library = library

    def __str__(self) -> str:
        return (
            f"decoding {self.name!r} needs {self.library}, which this environment lacks; install it there, "
            "or leave the field out with fields="
        )


class PickleRefused(PermissionError):
    """A field would be unpickled, which runs code of whoever wrote the shard."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"field {self.field!r} is a pickle, and unpickling runs code from the shard; allow it with allow_pickle"


class Decoder:
    """Decodes fields by their names."""

    def __init__(self, spec: str | None, fields: Collection[str] | None = None, allow_pickle: bool = False) -> None:
        """Args:
        spec: How pictures are decoded, one of `IMAGE_SPECS`. None: nothing is decoded at all.
        fields: Only these are decoded, others stay bytes. None: all.
        allow_pickle: Whether `pyd`, `pkl`, `pickle` and `pth` may be unpickled.

        Raises:
            ValueError: The spec is unknown.
        """
        if spec is not None and spec not in IMAGE_SPECS:
            raise ValueError(f"unknown decoder {spec!r}; known: {', '.join(sorted(IMAGE_SPECS))}")
        self._spec = spec
        self._fields = None if fields is None else frozenset(fields)
        self._allow_pickle = allow_pickle

    def decode(self, field: str, data: bytes) -> Any:  # what a field holds is its author's choice
        """One field's value.

        Raises:
            MissingDecoder: A library is not there.
            PickleRefused: The field is a pickle.
            Exception: Whatever the decoder raises for bytes it does not understand.
        """
        if self._spec is None:
            return data
        if field.startswith("__"):
            return _text_or_bytes(data)
        if self._fields is not None and field not in self._fields:
            return data
        if field == "gz" or field.endswith(".gz"):
            with gzip.open(io.BytesIO(data)) as stream:
                data = stream.read()
            field = field[:-3]
        extension = field.rpartition(".")[2]
        if extension.lower() in _PICTURES:
            return _decode_picture(self._spec, extension, data)
        if extension in _PICKLES:
            if not self._allow_pickle:
                raise PickleRefused(field)
            value = _PICKLES[extension](extension, data)
        elif extension in _DECODERS:
            value = _DECODERS[extension](extension, data)
        else:
            return data
        # A decoder that gives None has not decided in WebDataset's chain, and the bytes fall through: JSON's null.
        return data if value is None else value


def _text_or_bytes(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _converted(opened: Any, mode: str) -> Any:
    """`opened.convert(mode)`; of a picture that has the mode already the pixels are handed on instead of copied."""
    # Pillow has no public way to it; what makes all its results from pixels and the picture's properties is this.
    derive = getattr(opened, "_new", None)
    if opened.mode != mode or "transparency" in opened.info or derive is None:
        return opened.convert(mode)
    return derive(opened.im)


def _decode_picture(spec: str, name: str, data: bytes) -> Any:
    kind, mode, is_float = IMAGE_SPECS[spec]
    try:
        import PIL.Image
    except ModuleNotFoundError:
        raise MissingDecoder(name, "pillow") from None
    with io.BytesIO(data) as stream, PIL.Image.open(stream) as opened:
        opened.load()
        picture = _converted(opened, mode)
    if kind == "pil":
        return picture
    numpy = _library("numpy", name)
    array = numpy.asarray(picture)
    if is_float:
        array = array.astype(numpy.float32) / 255.0
    if kind == "numpy":
        return array
    torch = _library("torch", name)
    return torch.from_numpy((array if array.ndim == 2 else array.transpose(2, 0, 1)).copy())


def _library(library: str, name: str) -> ModuleType:
    """Import what the environment may lack."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        # A library that is there and misses one of its own is another trouble, shown as it is.
        if error.name != library:
            raise
        raise MissingDecoder(name, library) from None


def _decode_npy(name: str, data: bytes) -> Any:
    return _library("numpy", name).lib.format.read_array(io.BytesIO(data))


def _decode_npz(name: str, data: bytes) -> Any:
    with _library("numpy", name).load(io.BytesIO(data)) as arrays:
        return dict(arrays)


def _decode_tensors(name: str, data: bytes) -> Any:
    _library("numpy", name)
    return load_tensors(data)


def _decode_torch(name: str, data: bytes) -> Any:
    return _library("torch", name).load(io.BytesIO(data), weights_only=False, map_location="cpu")


def _table(*rows: tuple[str, Callable[[str, bytes], Any]]) -> dict[str, Callable[[str, bytes], Any]]:
    return {name: decode for names, decode in rows for name in names.split()}


# `class`, `count`, `msgpack` and `tenbin` are written by WebDataset's encoders but not read by its decoders.
_DECODERS = _table(
    ("txt text transcript", lambda _, data: data.decode("utf-8")),
    ("cls cls2 index inx id", lambda _, data: int(data)),
    ("json jsn", lambda _, data: json.loads(data)),
    ("ten tb", _decode_tensors),
    ("mp msg", lambda name, data: _library("msgpack", name).unpackb(data)),
    ("npy", _decode_npy),
    ("npz", _decode_npz),
    ("cbor", lambda name, data: _library("cbor", name).loads(data)),
)
_PICKLES = _table(
    ("pkl pickle pyd", lambda _, data: pickle.loads(data)),
    ("pth", _decode_torch),
)
