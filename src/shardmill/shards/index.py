"""A shard's samples in order, found from its headers alone.

A sample is handed out only when the next key or the end of the archive has been read, so it is always whole.
"""

from collections.abc import Callable

from shardmill.shards.grouping import Field, Sample, is_meta, split_name
from shardmill.shards.tar import Member, TarError, TarHeaders

MAX_FIELDS = 1 << 16  # of one sample; one key over a whole shard would otherwise be held in memory at once

# WebDataset keeps these in the sample itself, so a member of that name is a duplicate there.
_RESERVED = frozenset(("__key__", "__url__"))


class ShardIndex:
    """Reads headers no further than the samples asked for.

    An exception from `read` loses nothing: `advance` may be called again.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Args:
        read: Takes offset and length; returns up to that many bytes, fewer only at the end (like `os.pread`).
        size: Bytes of the whole shard.
        """
        self._headers = TarHeaders(read, size)
        self._ordinal = 0
        self._key: str | None = None
        self._fields: dict[str, Member] = {}
        self._whole: list[Sample] = []
        self._error: TarError | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether every sample has been handed out."""
        return self._ended and not self._whole

    @property
    def position(self) -> int:
        """Where the next header will be read."""
        return self._headers.position

    @property
    def skipped(self) -> int:
        """Members passed over because they are no regular files."""
        return self._headers.skipped

    @property
    def warnings(self) -> list[str]:
        """What is odd about the archive, though no sample is lost."""
        return self._headers.warnings

    def advance(self, limit: int) -> list[Sample]:
        """The next whole samples, at most `limit` (≥ 1); an empty list at the end.

        Raises:
            TarError: The shard is damaged. Samples that are whole before the damage have all been handed out.
        """
        while len(self._whole) < limit and not self._ended and self._error is None:
            try:
                self._step()
            except TarError as error:
                self._error = error
        taken, self._whole = self._whole[:limit], self._whole[limit:]
        if not taken and self._error is not None:
            raise self._error
        return taken

    def _step(self) -> None:
        member = self._headers.next_member()
        if member is None:
            self._finish_sample()
            self._ended = True
            return
        split = None if is_meta(member.name) else split_name(member.name)
        if split is None:
            return
        key, field = split
        if key != self._key:
            self._finish_sample()
            self._key = key
        if field in self._fields or field in _RESERVED:
            raise TarError(f"sample {key!r} has two fields {field!r}", member.header_offset)
        if len(self._fields) == MAX_FIELDS:
            raise TarError(f"sample {key!r} has more than {MAX_FIELDS} fields", member.header_offset)
        self._fields[field] = member

    def _finish_sample(self) -> None:
        if self._key is None:
            return
        key, fields, self._key, self._fields = self._key, self._fields, None, {}
        # WebDataset drops a sample whose field `__bad__` is not empty.
        if (bad := fields.get("__bad__")) is not None and bad.size:
            return
        self._whole.append(Sample(key, self._ordinal, tuple(Field(name, member) for name, member in fields.items())))
        self._ordinal += 1
