"""Conditional requests of RFC 9110 §13, evaluated against one opened version of an object."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from typing import Literal

Verdict = Literal["proceed", "not_modified", "failed"]

_ETAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\U0010ffff]*)"\s*(?:,|$)')


@dataclass(frozen=True, slots=True)
class Conditions:
    """The preconditions of one request. ETags are without quotes; `"*"` stands for any."""

    if_match: tuple[str, ...] | None = None
    if_none_match: tuple[str, ...] | None = None
    if_modified_since: datetime | None = None
    if_unmodified_since: datetime | None = None
    if_range: str | datetime | None = None

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> "Conditions":
        """Read them from headers (a case-insensitive mapping). Malformed dates are ignored (RFC 9110 §13.1.3)."""
        if_range = headers.get("If-Range")
        return cls(
            if_match=_etags(headers.get("If-Match"), strong=True),
            if_none_match=_etags(headers.get("If-None-Match"), strong=False),
            if_modified_since=_date(headers.get("If-Modified-Since")),
            if_unmodified_since=_date(headers.get("If-Unmodified-Since")),
            if_range=None if if_range is None else _if_range(if_range),
        )

    def judge_read(self, etag: str | None, modified: float) -> Verdict:
        """The verdict for GET and HEAD on an existing object, in the order of RFC 9110 §13.2.2."""
        seconds = int(modified)
        if self.if_match is not None:
            if not _matches(self.if_match, etag):
                return "failed"
        elif self.if_unmodified_since is not None and seconds > self.if_unmodified_since.timestamp():
            return "failed"
        if self.if_none_match is not None:
            if _matches(self.if_none_match, etag):
                return "not_modified"
        elif self.if_modified_since is not None and seconds <= self.if_modified_since.timestamp():
            return "not_modified"
        return "proceed"

    def judge_write(self, etag: str | None, modified: float | None) -> Verdict:
        """The verdict for PUT and DELETE; `etag` and `modified` None: there is no such object."""
        exists = modified is not None
        if self.if_match is not None and not (exists and _matches(self.if_match, etag)):
            return "failed"
        if self.if_none_match is not None and exists and _matches(self.if_none_match, etag):
            return "failed"
        # A date beside an ETag is ignored (RFC 9110 §13.1.4).
        unmodified = self.if_unmodified_since if self.if_match is None else None
        if unmodified is not None and modified is not None and int(modified) > unmodified.timestamp():
            return "failed"
        return "proceed"

    def allows_range(self, etag: str | None, modified: float) -> bool:
        """Whether If-Range, if there is one, still holds (RFC 9110 §13.1.5); if not, the whole object is sent."""
        if self.if_range is None:
            return True
        if isinstance(self.if_range, datetime):
            return int(modified) == self.if_range.timestamp()
        return etag is not None and self.if_range == etag


def http_date(seconds: float) -> str:
    """IMF-fixdate of a Unix time, as in Last-Modified."""
    return format_datetime(datetime.fromtimestamp(int(seconds), UTC), usegmt=True)


def _matches(wanted: tuple[str, ...], etag: str | None) -> bool:
    return "*" in wanted or (etag is not None and etag in wanted)


def _etags(header: str | None, *, strong: bool) -> tuple[str, ...] | None:
    """ETags of a list header; weak ones never match where a strong comparison is asked for."""
    if header is None:
        return None
    if header.strip() == "*":
        return ("*",)
    # A quoted star is the name of a version that no object has, not the star that stands for any.
    return tuple(match[2] for match in _ETAG.finditer(header) if match[2] != "*" and not (strong and match[1]))


def _date(header: str | None) -> datetime | None:
    # A list of dates, as doubled headers make, is no date.
    if header is None or header.count(",") > 1:
        return None
    try:
        parsed = parsedate_to_datetime(header)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed


def _if_range(header: str) -> str | datetime:
    match = _ETAG.fullmatch(header)
    if match is not None:
        # A weak validator never allows a range; no stored ETag is spelled like this.
        return match[2] if not match[1] else "\x00weak"
    return _date(header) or "\x00malformed"
