"""What an origin says of an object, and what version that makes it."""

import os
from dataclasses import dataclass

from shardmill.core.origins import OriginFacts
from shardmill.storage.cache.record import CacheRecord


@dataclass(frozen=True, slots=True)
class Known:
    """What the origin said of a key."""

    record: CacheRecord
    facts: OriginFacts
    is_versioned: bool
    asked: float
    """Monotonic time at which it was asked."""


def facts_version(facts: OriginFacts) -> tuple[str, bool]:
    """The source version that is given to what was read now; False: it is of this one read only."""
    if facts.validator == "none":
        return f"{facts.version}:{os.urandom(8).hex()}", False
    return facts.version, True


def facts_of(record: CacheRecord) -> OriginFacts:
    """What an origin had said of a version, as far as it was kept."""
    return OriginFacts(record.key, record.size, record.etag, record.modified, record.content_type, record.user)
