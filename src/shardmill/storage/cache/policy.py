"""How a cache treats what it has."""

import time
from dataclasses import dataclass
from typing import Literal

Revalidate = Literal["always", "ttl", "never"]


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How a bucket's cache treats what it has."""

    revalidate: Revalidate = "ttl"
    """When the origin is asked whether a version is still current: at each opening, after `ttl`, or never."""
    ttl: float = 300.0
    """Seconds."""
    absent_seconds: float = 5.0
    """How long an object that was not there is not asked for again."""
    list_seconds: float = 10.0
    """How long a page of a listing is believed."""
    pin: bool = False
    """Nothing of it is evicted."""

    def is_current(self, asked: float, arrived: float) -> bool:
        """Whether what the origin told at `asked` does for who has come at `arrived`; monotonic times."""
        match self.revalidate:
            case "never":
                return True
            case "ttl":
                return time.monotonic() - asked < self.ttl
            case "always":
                return asked >= arrived
