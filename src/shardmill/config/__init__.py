"""Settings of a node: file (TOML) < environment `SHARDMILL_<SECTION>_<NAME>` < flags; all errors reported at once.

Each setting is declared once, with its unit, default and a sentence; documentation and `--help` are made from these.
Parts of the program receive values or a section, never read the environment themselves.
"""

from shardmill.config.checks import PACKAGES_PREFIX
from shardmill.config.loading import ConfigError, load_config
from shardmill.config.machine import available_cores, is_loopback
from shardmill.config.settings import (
    MIB,
    SECTIONS,
    BucketSettings,
    CacheSettings,
    Config,
    EnvironmentSettings,
    JobSettings,
    OriginSettings,
    PackageSettings,
    ResultSettings,
    ServerSettings,
    StorageSettings,
    TransformSettings,
)
from shardmill.config.values import parse_value

__all__ = [
    "MIB",
    "PACKAGES_PREFIX",
    "SECTIONS",
    "BucketSettings",
    "CacheSettings",
    "Config",
    "ConfigError",
    "EnvironmentSettings",
    "JobSettings",
    "OriginSettings",
    "PackageSettings",
    "ResultSettings",
    "ServerSettings",
    "StorageSettings",
    "TransformSettings",
    "available_cores",
    "is_loopback",
    "load_config",
    "parse_value",
]
