"""A shard's samples in order, found from its headers alone.

A sample is handed out only when the next key or the end of the archive has been read, so it is always whole.
"""

from collections.abc import Callable

from shardmill.shards.grouping import Grouper, Sample
from shardmill.shards.tar import TarError, TarHeaders


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
        self._grouper = Grouper()
        self._error: TarError | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether every sample has been handed out."""
        return self._ended and not self._grouper.whole

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
        while len(self._grouper.whole) < limit and not self._ended and self._error is None:
            try:
                self._step()
            except TarError as error:
                self._error = error
        taken = self._grouper.take(limit)
        if not taken and self._error is not None:
            raise self._error
        return taken

    def _step(self) -> None:
        member = self._headers.next_member()
        if member is None:
            self._grouper.finish()
            self._ended = True
        else:
            self._grouper.add(member)
