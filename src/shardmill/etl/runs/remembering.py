"""Failures that the same input would give again: they are told again for a while, instead of being computed again."""

import time
from collections.abc import Callable

from shardmill.core.errors import ShardmillError

REMEMBERED_SECONDS = 30.0

_REMEMBERED = 1000  # failures


class RememberedFailures:
    """The newest failure of each key.

    Args:
        link: Told that a request is answered by another request's failure.
    """

    def __init__(self, link: Callable[[str, str], None]) -> None:
        self._link = link
        self._failed: dict[str, tuple[float, ShardmillError, str]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._failed

    def raise_known(self, key: str, request_id: str) -> None:
        """Raise again what failed a moment ago, if it did."""
        known = self._failed.get(key)
        if known is None:
            return
        until, error, first_request = known
        if time.monotonic() > until:
            del self._failed[key]
            return
        self._link(request_id, first_request)
        raise type(error)(error.message, traceback=error.traceback)

    def remember(self, key: str, error: ShardmillError, request_id: str) -> None:
        now = time.monotonic()
        for old in [old for old, (until, _, _) in self._failed.items() if until < now]:
            del self._failed[old]
        if len(self._failed) < _REMEMBERED:
            self._failed[key] = (now + REMEMBERED_SECONDS, error, request_id)
