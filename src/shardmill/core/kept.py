"""What is kept open of an object, so that reading it again costs no call to find it."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from shardmill.core.errors import ObjectNotFound
from shardmill.core.sources import Source


class Kept:
    """A version of an object with its descriptor, or that there is no object; of use while `is_current`.

    Args:
        source: The opened object; closed here. None: there is no object.
        absent: What to say then.
        is_ready: Whether bytes [start, stop) can be read as they are; once they can, they always can. None: there are
            none.
        is_there: Looks whether the object is still the one that was opened; None: whoever changes it says so.
        on_read: Told of bytes [start, stop) that a reader is given; none, where only the head is asked for.
        hold: Told 1 when somebody begins to read beyond the current step of the loop, and -1 when nobody does any more.
    """

    __slots__ = ("_hold", "_leases", "absent", "is_current", "is_ready", "is_there", "is_used", "on_read", "source")

    def __init__(
        self,
        source: Source | None,
        *,
        absent: ObjectNotFound | None = None,
        is_ready: Callable[[int, int], bool] | None = None,
        is_there: Callable[[], bool] | None = None,
        on_read: Callable[[int, int], None] | None = None,
        hold: Callable[[int], None] | None = None,
    ) -> None:
        self.source = source
        self.absent = absent
        self.is_ready = is_ready
        self.is_there = is_there
        self.on_read = on_read
        self.is_current = True
        """False: it was changed or left; who has no lease may not touch the descriptor any more."""
        self.is_used = True
        """It was asked for since somebody last looked."""
        self._hold = hold
        self._leases = 0

    def lease(self) -> None:
        """Hold the descriptor beyond the current step of the loop."""
        if self._hold is not None and not self._leases:
            self._hold(1)
        self._leases += 1

    def release(self) -> None:
        self._leases -= 1
        if self._hold is not None and not self._leases:
            self._hold(-1)
        self._close_unused()

    def leave(self) -> None:
        """It is not current any more."""
        self.is_current = False
        self._close_unused()

    def _close_unused(self) -> None:
        if not self._leases and not self.is_current and self.source is not None:
            self.source.close()


@runtime_checkable
class KeepObject(Protocol):
    """A store that keeps objects open."""

    is_keeping: bool
    """False: not this one."""

    def kept(self, key: str) -> Kept | None:
        """What is kept of a key; None: nothing, so it has to be opened."""
        ...

    async def keep(self, key: str) -> Kept | None:
        """Open an object to be kept, or remember that there is none; None: it is being changed just now."""
        ...


class KeepResult(Protocol):
    """Where results can be kept open."""

    async def keep_open(self, key: str) -> Kept | None:
        """A finished result; it may be removed while nobody reads it. None: there is none. The caller lets it leave."""
        ...
