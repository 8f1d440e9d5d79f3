"""Samples of a shard that is being read: grouped, and described for people."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from shardmill.client.reading import ObjectReader
from shardmill.shards.grouping import is_meta, split_name
from shardmill.shards.tar import iter_stream

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")


@dataclass(frozen=True, slots=True)
class StreamedSample:
    """One sample with all its bytes."""

    key: str
    fields: dict[str, bytes]
    """By name, in the shard's order."""

    @property
    def size(self) -> int:
        """Bytes of all fields."""
        return sum(map(len, self.fields.values()))


def read_stream(reader: ObjectReader) -> Iterator[StreamedSample]:
    """Samples of an open shard as they arrive; the caller closes the reader, at any time.

    Raises:
        TarError: The stream is no shard.
        TransformFailed, TruncatedBody: It was cut.
    """
    key: str | None = None
    fields: dict[str, bytes] = {}
    for member, payload in iter_stream(cast(BinaryIO, reader)):
        parts = None if is_meta(member.name) else split_name(member.name)
        if parts is None:
            continue
        if parts[0] != key:
            if key is not None and fields:
                yield StreamedSample(key, fields)
            key, fields = parts[0], {}
        fields[parts[1]] = payload
    if key is not None and fields:
        yield StreamedSample(key, fields)


def describe_sample(sample: StreamedSample) -> list[str]:
    """The key, then a line a field: name, size, and what can be told of its content."""
    width = max(len(name) for name in sample.fields)
    return [sample.key] + [
        f"  {name:{width}}  {len(payload):>10}  {describe_field(name, payload)}".rstrip()
        for name, payload in sample.fields.items()
    ]


def describe_field(name: str, payload: bytes) -> str:
    """`224x224x3 float32`, `500x375 RGB`, or short text as it is; empty if nothing can be told."""
    kind = name.rpartition(".")[2]
    if kind == "npy":
        return _describe_array(payload)
    if kind in PICTURES:
        return _describe_picture(payload)
    if len(payload) <= 40:
        text = payload.decode("utf-8", "replace")
        return text if text.isprintable() else ""
    return ""


def _describe_array(payload: bytes) -> str:
    import numpy as np

    try:
        array = np.load(io.BytesIO(payload), allow_pickle=False)
    except ValueError:
        return "not a plain array"
    shape = "x".join(map(str, array.shape)) or "scalar"
    return f"{shape} {array.dtype}"


def _describe_picture(payload: bytes) -> str:
    try:
        import PIL.Image
    except ImportError:
        return ""  # the bare client has no Pillow, and needs none
    try:
        with PIL.Image.open(io.BytesIO(payload)) as picture:
            return f"{picture.width}x{picture.height} {picture.mode}"
    except OSError:
        return "not a picture that can be opened"
