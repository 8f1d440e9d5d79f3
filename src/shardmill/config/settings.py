"""The settings themselves: a frozen class a section, each setting with its unit, default and a sentence."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shardmill.config.machine import absolute, available_cores
from shardmill.core.refs import Bucket
from shardmill.core.values import Seconds, Secret, Size

MIB = 1 << 20


def _setting(default: Any, doc: str, *, least: int = 0) -> Any:
    return field(default=default, metadata={"doc": doc, "least": least})


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
        return tuple(place if "://" in place else str(absolute(place)) for place in self.find_links)


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
    listing: Seconds = _setting(Seconds(10), "Seconds that a page of a listing is believed.")
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
        return absolute(path) if kind in ("dir", "dir-rw") else None

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
