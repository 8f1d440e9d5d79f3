"""Objects that an origin said it has not: remembered for a moment, so that a misspelt list asks it once.

Nothing but "no such object" is remembered: an origin that cannot be reached, or refuses, may have it.
"""

from collections import OrderedDict

_KEPT = 10_000


class Absent:
    """Args:
    seconds: How long an answer is believed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, key: str, now: float) -> None:
        """It was not there at `now`, a monotonic time."""
        self._until[key] = now + self._seconds
        self._until.move_to_end(key)
        while len(self._until) > _KEPT:
            self._until.popitem(last=False)

    def has(self, key: str, now: float) -> bool:
        return self._until.get(key, 0.0) > now

    def forget(self, key: str) -> None:
        """It may be there now."""
        self._until.pop(key, None)
