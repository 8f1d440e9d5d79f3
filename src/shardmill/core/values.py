"""Values of settings: sizes, durations and secrets, and how they are written. Their parsers raise ValueError."""

import re
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Size(int):
    """Bytes; written as a number or with a unit, e.g. `64MiB`, `1GB`."""


class Seconds(float):
    """A duration; written as a number of seconds or with a unit, e.g. `500ms`, `5m`."""


class Secret(str):
    """Text that is shown nowhere."""

    def __repr__(self) -> str:
        return "'***'" if self else "''"


def parse_size(value: Any) -> Size:
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("is not a size such as 64MiB or 1000000")
    return Size(float(match[1]) * _UNITS[(match[2] or "").lower()])


def parse_seconds(value: Any) -> Seconds:
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("is not a duration such as 30, 500ms or 5m")
    return Seconds(float(match[1]) * _SECONDS[match[2] or ""])


def parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("is not true or false")


def parse_int(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError("is not a whole number of at least 0")
    return int(value)
