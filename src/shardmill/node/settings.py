"""The effective configuration as data, without what must not be shown."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from shardmill.config import SECTIONS, Config
from shardmill.core.values import Secret

_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")  # of a package index, in its URL


def masked_settings(config: Config) -> dict[str, object]:
    """Section → setting → value; buckets and environments as lists. Paths are text."""
    shown: dict[str, object] = {name: _table(getattr(config, name)) for name in SECTIONS}
    shown["buckets"] = [_table(item) for item in config.buckets]
    shown["environments"] = [_table(item) for item in config.environments]
    return shown


def _table(section: Any) -> dict[str, object]:
    return {item.name: _plain(getattr(section, item.name)) for item in fields(section)}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Secret):
        return "***" if value else ""
    if isinstance(value, str):
        return _CREDENTIALS.sub("***@", value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else str(value)
