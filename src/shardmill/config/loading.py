"""One configuration from file, environment and flags; the only place that reads the environment."""

import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shardmill.config.checks import check, checked_buckets, checked_environments
from shardmill.config.machine import absolute, default_data
from shardmill.config.settings import (
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
from shardmill.core.values import Secret


class ConfigError(ValueError):
    """Everything that is wrong with the settings, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def load_config(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
    buckets: Sequence[str] = (),
    environments: Sequence[str] = (),
) -> Config:
    """Merge file, environment and flags into one checked configuration.

    Args:
        file: TOML file, or None.
        environ: Variables to read `SHARDMILL_<SECTION>_<NAME>` from; default: the process's.
        flags: Section → setting → value (text or typed); None values are not given.
        buckets: `URI[=BACKING]` of `--bucket` flags, added to (and overriding) the file's.
        environments: `NAME=PYTHON` of `--env` flags.

    Raises:
        ConfigError: With every problem found, one line each.
    """
    problems: list[str] = []
    document = _read_file(file, problems)
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, settings in SECTIONS.items():
        table = document.pop(name, {})
        if not isinstance(table, dict):
            problems.append(f"{file}: [{name}] is not a table")
            continue
        _merge(sections[name], settings, table, f"{file}: {name}.", problems)
    bucket_tables = _tables(document.pop("bucket", []), BucketSettings, f"{file}: bucket", problems)
    environment_tables = _tables(document.pop("env", []), EnvironmentSettings, f"{file}: env", problems)
    problems += [f"{file}: unknown section {name!r}; known: {', '.join(SECTIONS)}, bucket, env" for name in document]

    variables = os.environ if environ is None else environ
    for name, settings in SECTIONS.items():
        prefix = f"SHARDMILL_{name.upper()}_"
        table = {key.removeprefix(prefix).lower(): value for key, value in variables.items() if key.startswith(prefix)}
        _merge(sections[name], settings, table, prefix, problems, upper=True)
    for name, given in (flags or {}).items():
        table = {key: value for key, value in given.items() if value is not None}
        _merge(sections[name], SECTIONS[name], table, "--", problems)

    bucket_tables += [_parse_bucket(text) for text in buckets]
    environment_tables += [found for text in environments if (found := _parse_environment(text, problems))]
    config = Config(
        server=ServerSettings(**sections["server"]),
        storage=StorageSettings(**sections["storage"]),
        transforms=TransformSettings(**sections["transforms"]),
        results=ResultSettings(**sections["results"]),
        packages=PackageSettings(**sections["packages"]),
        origins=OriginSettings(**sections["origins"]),
        cache=CacheSettings(**sections["cache"]),
        jobs=JobSettings(**sections["jobs"]),
        buckets=checked_buckets(bucket_tables, problems),
        environments=checked_environments(environment_tables, problems),
    )
    if config.server.data == Path():
        config = replace(config, server=replace(config.server, data=default_data()))
    if not config.transforms.command_path:
        config = replace(config, transforms=replace(config.transforms, command_path=variables.get("PATH", "")))
    check(config, problems)
    if problems:
        raise ConfigError(problems)
    return config


def _read_file(file: Path | None, problems: list[str]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        problems.append(f"{file}: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{file}: {error}")
    return {}


def _merge(
    into: dict[str, Any],
    settings: type,
    table: Mapping[str, Any],
    where: str,
    problems: list[str],
    *,
    upper: bool = False,
) -> None:
    kinds = typing.get_type_hints(settings)
    known = {item.name for item in fields(settings)}
    for name, value in table.items():
        label = where + (name.upper() if upper else name.replace("_", "-") if where == "--" else name)
        if name not in known:
            problems.append(f"{label}: unknown setting; known: {', '.join(sorted(known))}")
            continue
        try:
            into[name] = parse_value(kinds[name], value)
        except (ValueError, TypeError) as error:
            shown = "the value" if kinds[name] is Secret else repr(value)
            problems.append(f"{label}: {shown} {error}")


def _tables(tables: Any, settings: type, where: str, problems: list[str]) -> list[Any]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.append(f"{where}: write it as [[{where.rpartition(' ')[2]}]]")
        return []
    parsed = []
    for number, table in enumerate(tables, 1):
        values: dict[str, Any] = {}
        _merge(values, settings, table, f"{where} {number}: ", problems)
        parsed.append(settings(**values))
    return parsed


def _parse_bucket(text: str) -> BucketSettings:
    uri, _, backing = text.partition("=")
    return BucketSettings(uri, backing)


def _parse_environment(text: str, problems: list[str]) -> EnvironmentSettings | None:
    name, equals, python = text.partition("=")
    if not equals or not python:
        problems.append(f"--env {text!r}: write NAME=/path/to/python")
        return None
    return EnvironmentSettings(name, absolute(python))
