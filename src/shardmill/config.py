"""Settings of a node: file (TOML) < environment `SHARDMILL_<SECTION>_<NAME>` < flags; all errors reported at once.

Each setting is declared once, with its unit, default and a sentence; documentation and `--help` are made from these.
Parts of the program receive values or a section, never read the environment themselves.
"""

import ipaddress
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from shardmill.core.errors import BadRequest
from shardmill.core.refs import ALIASES, Bucket
from shardmill.core.values import Seconds, Secret, Size, parse_bool, parse_int, parse_seconds, parse_size

MIB = 1 << 20

PACKAGES_PREFIX = "packages-"  # of the names of environments that the node builds itself

_ENVIRONMENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class ConfigError(ValueError):
    """Everything that is wrong with the settings, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def _setting(default: Any, doc: str, *, least: int = 0) -> Any:
    return field(default=default, metadata={"doc": doc, "least": least})


def _absolute(path: str | Path) -> Path:
    """With `~` as the user's home; that of a user who has none stays as it is, and does not exist."""
    return Path(os.path.expanduser(path)).absolute()


def _default_data() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "shardmill"


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by a cgroup's CPU quota; at least 1."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = _cgroup_cores()
    return max(1, int(min(cores, quota) if quota else cores))


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        return quota_us / int((base / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`[server]`: where the node listens and how long it waits for peers."""

    listen: str = _setting("127.0.0.1:51080", "Address and port; port 0 takes a free one.")
    data: Path = _setting(Path(), "Data directory; default `$XDG_DATA_HOME/shardmill`.")
    hosts: tuple[str, ...] = _setting((), "Further host names that requests may carry, beside loopback.")
    tls_cert: Path | None = _setting(None, "Certificate chain (PEM).")
    tls_key: Path | None = _setting(None, "Private key (PEM) of the certificate.")
    insecure_no_auth: bool = _setting(False, "Listen on other than loopback without credentials.")
    drain: Seconds = _setting(Seconds(30), "Seconds that answers may still take after SIGTERM.")
    header_timeout: Seconds = _setting(Seconds(20), "Seconds for a request's head to arrive.")
    idle_timeout: Seconds = _setting(Seconds(75), "Seconds that an idle connection is kept.")
    body_timeout: Seconds = _setting(Seconds(60), "Seconds without a byte of an upload before 408.")
    send_timeout: Seconds = _setting(Seconds(300), "Seconds a reader may take no byte before its answer is cut.")
    max_connections: int = _setting(4096, "Open connections; further ones are closed.", least=1)
    front: Literal["on", "off"] = _setting("on", "Plain reads are answered without aiohttp; the answers are the same.")
    near_send_buffer: Size = _setting(Size(256 << 10), "Send buffer for bodies to peers within 1 ms; 0: the kernel's.")
    log_level: str = _setting("info", "debug, info, warning or error.")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]") or "127.0.0.1", int(port)


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """`[storage]`: the node's own disk."""

    max_object: Size = _setting(Size(1 << 40), "Largest object accepted, bytes.")
    threads: int = _setting(16, "Threads for disk calls.", least=1)
    durability: Literal["power", "kill"] = _setting(
        "power", "What a stored object survives: a power cut, or a kill only."
    )
    links: Literal["refuse", "follow"] = _setting("refuse", "Symbolic links in directory buckets.")
    member_indexes: Size = _setting(
        Size(1 << 30), "Disk that indexes of the members of shards may take, bytes; the least used leave first."
    )


@dataclass(frozen=True, slots=True)
class TransformSettings:
    """`[transforms]`: worker processes and the bounds of a run."""

    workers: int = _setting(0, "Samples in work at once; 0: the cores this process may use.")
    sample_timeout: Seconds = _setting(Seconds(60), "Seconds one sample may take.")
    object_timeout: Seconds = _setting(
        Seconds(3600), "Seconds of work one object may take; waiting for a reader not counted."
    )
    load_timeout: Seconds = _setting(Seconds(60), "Seconds for imports and for loading a function.")
    memory: Size = _setting(Size(4 << 30), "Memory of one worker process, bytes.")
    run_window: Size = _setting(Size(32 * MIB), "Bytes that a run may be ahead of its reader.")
    node_window: Size = _setting(Size(512 * MIB), "Bytes that all runs together may be ahead.")
    max_sample: Size = _setting(Size(1 << 30), "Largest output of one sample, bytes.")
    max_fan_out: int = _setting(100_000, "Most samples that one sample may become.")
    max_object_output: Size = _setting(
        Size(64 << 30), "Largest output of one object, of the kinds that work on whole objects, bytes."
    )
    max_print: Size = _setting(Size(16 * MIB), "Most bytes a function may print per batch of samples.")
    max_runs: int = _setting(256, "Runs at once; beyond, 503.", least=1)
    look_ahead: int = _setting(1, "Shards of an announced list that are begun before they are asked for; 0: none.")
    idle_workers: Seconds = _setting(Seconds(60), "Seconds that an idle worker process is kept.")
    max_code: Size = _setting(Size(64 * MIB), "Largest function that can be registered, bytes.")
    command_path: str = _setting(
        "", "Where commands of kind `command` are looked up, like `PATH`; default: the node's own `PATH`."
    )

    @property
    def commands(self) -> str:
        """Where commands are looked up."""
        return self.command_path or os.defpath

    @property
    def worker_count(self) -> int:
        return self.workers or available_cores()


@dataclass(frozen=True, slots=True)
class ResultSettings:
    """`[results]`: finished transformed shards, kept for whoever reads them next."""

    mode: Literal["on", "off"] = _setting("on", "`off`: transformed shards are streamed only, each reader its own run.")
    capacity: Size = _setting(Size(10 << 30), "Disk that results may take, bytes; the least used leave first.")
    most: int = _setting(
        100_000, "Results kept at most, whatever their size: each takes about 1.3 KB of memory.", least=1
    )
    scratch: Seconds = _setting(Seconds(600), "Seconds that a result of one epoch is kept after its last reader.")
    spool_window: Size = _setting(Size(64 * MIB), "Bytes that a run may be ahead of its fastest reader on disk.")


@dataclass(frozen=True, slots=True)
class PackageSettings:
    """`[packages]`: environments that are built for transforms registered with `packages=`."""

    policy: Literal["any", "allow-list", "off"] = _setting(
        "any", "What may be asked for: any distribution that the indexes have, those of `allow`, or none."
    )
    allow: tuple[str, ...] = _setting((), "Names of distributions; what they depend on comes along.")
    index_url: str = _setting("", "Package index; default: the one that uv is configured for.")
    extra_index_urls: tuple[str, ...] = _setting((), "Further indexes, asked first.")
    find_links: tuple[str, ...] = _setting((), "Directories, or URLs of pages, with further wheels.")
    no_index: bool = _setting(False, "Ask no index: take what `find_links` has.")
    allow_builds: bool = _setting(False, "Build what has no wheel, which runs its code with the node's rights.")
    capacity: Size = _setting(
        Size(20 << 30), "Disk that environments and downloads may take, bytes; what no version uses leaves first."
    )
    timeout: Seconds = _setting(Seconds(1800), "Seconds that one environment may take to be built.", least=1)

    @property
    def wheel_places(self) -> tuple[str, ...]:
        """`find_links` with whole paths."""
        return tuple(place if "://" in place else str(_absolute(place)) for place in self.find_links)


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """`[origins]`: how long remote stores are waited for, and how often they are asked again."""

    connect_timeout: Seconds = _setting(Seconds(5), "Seconds for a connection to come about.")
    idle_timeout: Seconds = _setting(Seconds(20), "Seconds without a byte before a request counts as broken.")
    retries: int = _setting(4, "Times that a request is tried again, and a broken body resumed without progress.")
    backoff: Seconds = _setting(Seconds(0.2), "Seconds before the first further try; twice as long before each next.")
    max_backoff: Seconds = _setting(Seconds(5), "Longest wait between tries.")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """`[cache]`: objects of remote buckets on the node's disk."""

    capacity: Size = _setting(Size(0), "Disk that they may take, bytes; 0: what the file system has.")
    high: int = _setting(90, "Percent of the capacity that is never passed.", least=1)
    low: int = _setting(80, "Percent of the capacity down to which objects leave, the least used first.", least=1)
    absent: Seconds = _setting(Seconds(5), "Seconds that an object which a store has not is not asked for again.")
    listing: Seconds = _setting(Seconds(10), "Seconds that a page of a listing is kept.")
    look_ahead: int = _setting(2, "Objects of an announced list fetched ahead of the one that is read; 0: none.")


@dataclass(frozen=True, slots=True)
class JobSettings:
    """`[jobs]`: offline work from bucket to bucket."""

    at_once: int = _setting(2, "Jobs at work at once; others wait.", least=1)
    shards: int = _setting(
        0, "Objects of one job in work at once; 0: two shards, or of whole objects one more than there are workers."
    )


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """`[[bucket]]`: one bucket and what is behind it."""

    uri: str = _setting("", "`provider://name`.")
    backing: str = _setting(
        "",
        "`pool`, `dir:PATH` (read-only), `dir-rw:PATH`, or the URL of a remote store (`s3://name`, `gs://name`, "
        "`az://name`, `https://host/path`); default: `pool` for ais, else the store that the URI names.",
    )
    prefix: str = _setting(
        "", "Remote: what all keys of the store start with that are this bucket's; left out of its own."
    )
    writable: bool | None = _setting(None, "Whether it can be written to; default: not to remote stores nor `dir:`.")
    durability: Literal["", "power", "kill"] = _setting("", "What its objects survive; default: that of `[storage]`.")
    endpoint: str = _setting("", "Remote: URL of the service, for stores other than the provider's own.")
    region: str = _setting("", "S3: region; default: that of the profile or environment, else `us-east-1`.")
    anonymous: bool = _setting(False, "Remote: sign nothing, for public buckets.")
    profile: str = _setting("", "S3: name of a profile in the credentials file.")
    credentials_file: Path | None = _setting(
        None, "S3: credentials file in place of `~/.aws/credentials`; GCS: key file of a service account or user."
    )
    access_key_id: str = _setting("", "S3: name of the access key.")
    secret_access_key: Secret = _setting(Secret(), "S3: the access key.")
    session_token: Secret = _setting(Secret(), "S3: token of a temporary access key.")
    account: str = _setting("", "Azure: storage account; default: `AZURE_STORAGE_ACCOUNT_NAME`.")
    account_key: Secret = _setting(Secret(), "Azure: access key of the account.")
    sas_token: Secret = _setting(Secret(), "Azure: shared access signature.")
    token: Secret = _setting(Secret(), "GCS, HTTP: bearer token.")
    use_metadata: bool | None = _setting(
        None, "Remote: ask the machine's metadata service for credentials; default: on machines of that very cloud."
    )
    requester_pays: bool = _setting(False, "S3: pay for requests to buckets of others.")
    allow_private: bool = _setting(False, "HTTP: follow redirects to private and loopback addresses.")
    revalidate: Literal["always", "ttl", "never"] = _setting(
        "ttl",
        "Remote: when the store is asked whether a cached version is current: at each opening, after `ttl`, never.",
    )
    ttl: Seconds = _setting(Seconds(300), "Remote: seconds that a version counts as current without asking.")
    pin: bool = _setting(False, "Remote: evict nothing of it from the cache.")

    @property
    def bucket(self) -> Bucket:
        return Bucket.parse(self.uri)

    @property
    def directory(self) -> Path | None:
        """The directory behind it, if it is one."""
        kind, _, path = self.backing.partition(":")
        return _absolute(path) if kind in ("dir", "dir-rw") else None

    @property
    def is_remote(self) -> bool:
        """Whether a remote store is behind it; `backing` is then its URL."""
        return "://" in self.backing

    @property
    def is_writable(self) -> bool:
        if self.writable is not None:
            return self.writable
        return not self.is_remote and not self.backing.startswith("dir:")


@dataclass(frozen=True, slots=True)
class EnvironmentSettings:
    """`[[env]]`: an interpreter in which transforms may run."""

    name: str = _setting("", "Its name; `default` is the node's own interpreter.")
    python: Path = _setting(Path(), "Path of the interpreter.")


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a node."""

    server: ServerSettings = ServerSettings()
    storage: StorageSettings = StorageSettings()
    transforms: TransformSettings = TransformSettings()
    results: ResultSettings = ResultSettings()
    packages: PackageSettings = PackageSettings()
    origins: OriginSettings = OriginSettings()
    cache: CacheSettings = CacheSettings()
    jobs: JobSettings = JobSettings()
    buckets: tuple[BucketSettings, ...] = ()
    environments: tuple[EnvironmentSettings, ...] = ()


SECTIONS: dict[str, type] = {
    "server": ServerSettings,
    "storage": StorageSettings,
    "transforms": TransformSettings,
    "results": ResultSettings,
    "packages": PackageSettings,
    "origins": OriginSettings,
    "cache": CacheSettings,
    "jobs": JobSettings,
}


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
        buckets=_checked_buckets(bucket_tables, problems),
        environments=_checked_environments(environment_tables, problems),
    )
    if config.server.data == Path():
        config = replace(config, server=replace(config.server, data=_default_data()))
    if not config.transforms.command_path:
        config = replace(config, transforms=replace(config.transforms, command_path=variables.get("PATH", "")))
    _check(config, problems)
    if problems:
        raise ConfigError(problems)
    return config


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
    return _absolute(value)


_PARSERS: dict[Any, Any] = {
    Size: parse_size,
    Seconds: parse_seconds,
    bool: parse_bool,
    int: parse_int,
    str: _parse_text,
    Secret: lambda value: Secret(_parse_text(value)),
    Path: _parse_path,
}


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
    return EnvironmentSettings(name, _absolute(python))


def _checked_buckets(tables: Sequence[BucketSettings], problems: list[str]) -> tuple[BucketSettings, ...]:
    """The buckets by URI, a later one in place of an earlier."""
    checked: dict[Bucket, BucketSettings] = {}
    for table in tables:
        try:
            bucket = Bucket.parse(table.uri)
        except BadRequest as error:
            problems.append(f"bucket {table.uri!r}: {error}")
            continue
        named = {"ais": "pool", "http": ""}.get(bucket.provider, str(bucket))
        settings = replace(table, uri=str(bucket), backing=table.backing or named)
        problems += [f"bucket {bucket}: {problem}" for problem in _bucket_problems(bucket, settings)]
        checked[bucket] = settings
    return tuple(checked.values())


def _bucket_problems(bucket: Bucket, settings: BucketSettings) -> list[str]:
    backing = settings.backing
    if not backing:
        return [f"which web server? give its URL: {bucket}=https://HOST/PATH"]
    if settings.is_remote:
        return _remote_problems(settings)
    given = [name for name in _REMOTE_ONLY if getattr(settings, name)]
    if given:
        return [f"{', '.join(given)}: only remote stores have these"]
    if backing in ("dir:", "dir-rw:"):
        return [f"{backing!r} names no directory; write {backing}PATH"]
    if settings.directory is not None:
        return [] if settings.directory.is_dir() else [f"{settings.directory} is not a directory"]
    if backing != "pool":
        return [f"unknown backing {backing!r}; write pool, dir:PATH, dir-rw:PATH or a URL"]
    return []


_ANY_BACKING = ("uri", "backing", "writable", "revalidate", "ttl")
_REMOTE_ONLY = tuple(item.name for item in fields(BucketSettings) if item.name not in _ANY_BACKING)


def _remote_problems(settings: BucketSettings) -> list[str]:
    """What is wrong with the settings of a bucket that has a remote store behind it."""
    scheme, _, rest = settings.backing.partition("://")
    provider = ALIASES.get(scheme, scheme)
    if provider == "https" or (provider == "http" and scheme == "http"):
        return [] if rest.partition("/")[0] else [f"{settings.backing!r} names no host"]
    problems = []
    if provider not in ("s3", "gs", "az"):
        problems.append(f"unknown backing {settings.backing!r}; write s3://, gs://, az:// or https://HOST/PATH")
    elif "/" in rest.removesuffix("/"):
        problems.append(f"{settings.backing!r} has a path; name it as prefix")
    if bool(settings.access_key_id) != bool(settings.secret_access_key):
        problems.append("access_key_id and secret_access_key go together")
    if settings.anonymous and any((settings.access_key_id, settings.account_key, settings.sas_token, settings.token)):
        problems.append("anonymous and credentials exclude each other")
    if settings.endpoint and not re.match(r"https?://[^/]", settings.endpoint):
        problems.append(f"endpoint {settings.endpoint!r} is not a URL such as https://HOST")
    if settings.credentials_file is not None and not settings.credentials_file.is_file():
        problems.append(f"credentials_file {settings.credentials_file} does not exist")
    return problems


def _checked_environments(
    tables: Sequence[EnvironmentSettings], problems: list[str]
) -> tuple[EnvironmentSettings, ...]:
    checked: dict[str, EnvironmentSettings] = {}
    for table in tables:
        if not _ENVIRONMENT_NAME.fullmatch(table.name):
            problems.append(f"environment {table.name!r}: bad name")
        elif table.name.startswith(PACKAGES_PREFIX):
            problems.append(f"environment {table.name!r}: {PACKAGES_PREFIX}… are those that the node builds itself")
        elif not os.access(table.python, os.X_OK) or table.python.is_dir():
            problems.append(f"environment {table.name!r}: {table.python} is not an interpreter that can be run")
        checked[table.name] = table
    return tuple(checked.values())


def _check(config: Config, problems: list[str]) -> None:
    for name, settings in SECTIONS.items():
        section = getattr(config, name)
        problems += [
            f"{name}.{item.name} {getattr(section, item.name)}: at least {item.metadata['least']} is needed"
            for item in fields(settings)
            if item.metadata["least"] and getattr(section, item.name) < item.metadata["least"]
        ]
    server = config.server
    try:
        host, port = server.address
        if not 0 <= port <= 65535:
            raise ValueError
        if not is_loopback(host) and not server.insecure_no_auth:
            problems.append(
                f"listen {server.listen!r}: who reaches it could run code on this machine; listen on 127.0.0.1, "
                "or say --insecure-no-auth if the network is trusted"
            )
    except ValueError:
        problems.append(f"listen {server.listen!r}: write HOST:PORT")
    if (server.tls_cert is None) != (server.tls_key is None):
        problems.append("tls: --tls-cert and --tls-key go together")
    problems += [
        f"tls: {path} does not exist" for path in (server.tls_cert, server.tls_key) if path and not path.exists()
    ]
    problems += _package_problems(config.packages)
    if not config.cache.low <= config.cache.high <= 100:
        problems.append(
            f"cache: low {config.cache.low} and high {config.cache.high} are not in order, or over 100 percent"
        )
    if server.log_level not in ("debug", "info", "warning", "error"):
        problems.append(f"log_level {server.log_level!r} is not one of debug, info, warning, error")


def _package_problems(packages: PackageSettings) -> list[str]:
    problems = []
    if (packages.policy == "allow-list") != bool(packages.allow):
        problems.append('packages: policy = "allow-list" and the names in allow go together')
    if packages.no_index and not packages.find_links:
        problems.append("packages: no_index leaves nothing but find_links, and that is empty")
    problems += [
        f"packages.find_links {place}: is neither a URL nor a directory"
        for place in packages.wheel_places
        if "://" not in place and not Path(place).is_dir()
    ]
    return problems


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
