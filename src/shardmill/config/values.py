"""Values of settings, from text or TOML."""

import types
import typing
from pathlib import Path
from typing import Any, Literal

from shardmill.config.machine import absolute
from shardmill.core.values import Seconds, Secret, Size, parse_bool, parse_int, parse_seconds, parse_size


def parse_value(kind: Any, value: Any) -> Any:
    """A setting's value from text or TOML.

    Raises:
        ValueError: It is not of that kind; the message says what is.
    """
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"is not one of {', '.join(typing.get_args(kind))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return parse_value(next(arg for arg in typing.get_args(kind) if arg is not type(None)), value)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError("is not a list of names")
        return tuple(item.strip() for item in items if item.strip())
    return _PARSERS[kind](value)


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not text")
    return value


def _parse_path(value: Any) -> Path:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError("is not a path")
    return absolute(value)


_PARSERS: dict[Any, Any] = {
    Size: parse_size,
    Seconds: parse_seconds,
    bool: parse_bool,
    int: parse_int,
    str: _parse_text,
    Secret: lambda value: Secret(_parse_text(value)),
    Path: _parse_path,
}
