"""Samples on their way into a batch: one column a field, and which rows belong to which place."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardmill.core.errors import BadShard
from shardmill.loader.columns import ArrayPool, Column
from shardmill.loader.stream import Arriving, SampleStream
from shardmill.shards.decoding import Decoder

if TYPE_CHECKING:
    import numpy as np

Batch = tuple[Any, ...]
"""One entry a field: an array with the samples in its first dimension, or a list where they do not stack."""


class Rows:
    """The samples of a window, by field; rows of one position belong together."""

    def __init__(self, fields: Sequence[str], size: int, pool: ArrayPool, decoder: str | None) -> None:
        self._names = [name.split(";") for name in fields]
        decode = Decoder("rgb8" if decoder == "pil" else decoder)
        self._columns = [Column(size, pool, decode) for _ in fields]
        self._rows: dict[int, list[int]] = {}
        self._position = 0
        self._key = ""
        self._count = 0
        self._have: list[str] = []

    def begin(self, position: int) -> None:
        self._position = position

    def key(self, key: str) -> None:
        self._key, self._have = key, []

    def read(self, stream: SampleStream, field: Arriving) -> None:
        self._have.append(field.field)
        for column, names in zip(self._columns, self._names, strict=True):
            if field.field in names and len(column) == self._count:
                column.read(stream, field)
                return

    def end(self) -> None:
        """The sample is whole: it must have every field."""
        for column, names in zip(self._columns, self._names, strict=True):
            if len(column) == self._count and "__key__" in names:
                column.add(self._key)
            elif len(column) == self._count:
                raise BadShard(
                    f"sample {self._key!r} has no field {';'.join(names)!r}; it has {', '.join(self._have) or 'none'}: "
                    "name what a batch is to have by fields="
                )
        self._rows.setdefault(self._position, []).append(self._count)
        self._count += 1

    def add(self, key: str, fields: "Mapping[str, bytes | np.ndarray[Any, Any]]") -> None:
        """A sample that is here already: payloads, or arrays that were decoded."""
        self.key(key)
        self._have = list(fields)
        for column, names in zip(self._columns, self._names, strict=True):
            name = next((name for name in names if name in fields), None)
            if name is not None:
                value = fields[name]
                column.add(column.decode(name, value) if isinstance(value, bytes) else value)
        self.end()

    def take(self, positions: Sequence[int]) -> Batch:
        rows = [row for position in positions for row in self._rows.get(position, ())]
        return tuple(column.take(rows) for column in self._columns)
