"""Samples of a shard as they arrive, with payloads read straight into memory of the caller's choice."""

from collections.abc import Iterator
from dataclasses import dataclass

from shardmill.client.reading import ObjectReader
from shardmill.core.errors import BadShard
from shardmill.shards.grouping import is_meta, split_name
from shardmill.shards.tar import TarError, TarHeaders
from shardmill.shards.tracking import ordinal_of

_SKIP = 1 << 20


@dataclass(frozen=True, slots=True)
class Arriving:
    """One field whose payload is next in the stream."""

    ordinal: int
    """Source sample it comes from."""
    sample: int
    """Number of its sample in this stream, counted from 0."""
    key: str
    field: str
    size: int


class SampleStream:
    """Reads one open shard. For each field that `fields` gives, `read` or `read_into` may be called once.

    Args:
        reader: Closed by the caller.
        first: Ordinal of the first sample, where the shard's own headers do not say it.
        is_made: It is a transformed shard, whose headers say which source sample each comes from.
    """

    def __init__(self, reader: ObjectReader, *, first: int, is_made: bool) -> None:
        self._reader = reader
        self._first = first
        self._is_made = is_made
        self._position = 0
        self._block = b""
        self._payload = 0

    def fields(self) -> Iterator[Arriving]:
        """Every field of every sample, in order.

        Raises:
            BadShard: The stream is no shard.
            TransformFailed, TruncatedBody: It was cut, and could not be continued.
        """
        headers = TarHeaders(self._read_at, None)
        key, sample, ordinal = "", -1, self._first - 1
        try:
            while (member := headers.next_member()) is not None:
                parts = None if is_meta(member.name) else split_name(member.name)
                if parts is None:
                    continue
                given = ordinal_of(self._block) if self._is_made else None
                if given is not None or (not self._is_made and parts[0] != key) or sample < 0:
                    key, sample = parts[0], sample + 1
                    ordinal = ordinal + 1 if given is None else given
                self._payload = member.offset
                yield Arriving(ordinal, sample, parts[0], parts[1], member.size)
            self._drain()
        except TarError as error:
            raise BadShard(f"{self._reader.meta.key}: {error}") from None
        if headers.warnings:
            raise BadShard(f"{self._reader.meta.key}: {headers.warnings[0]}; it may have been cut")

    def read(self, field: Arriving) -> bytes:
        """The payload."""
        data = bytearray(field.size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """The next bytes of the payload."""
        self._skip_to(self._payload)
        if self._reader.fill(view) < len(view):
            raise TarError("truncated in a payload", self._position)
        self._position += len(view)
        self._payload = self._position

    def _read_at(self, offset: int, length: int) -> bytes:
        self._skip_to(offset)
        data = bytearray(length)
        count = self._reader.fill(memoryview(data))
        self._position += count
        self._block = bytes(data[:count])
        return self._block

    def _skip_to(self, offset: int) -> None:
        while self._position < offset:
            waste = memoryview(bytearray(min(offset - self._position, _SKIP)))
            count = self._reader.fill(waste)
            if not count:
                raise TarError(f"truncated: {offset - self._position} bytes are missing", self._position)
            self._position += count

    def _drain(self) -> None:
        """Read what is left, so that a cut behind the last member is heard as well."""
        while self._reader.fill(memoryview(bytearray(_SKIP))):
            pass
