"""A node seen from outside: `status doctor config`."""

import importlib.util
import math
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import typer

from shardmill import __version__
from shardmill.cli.locations import EndpointOption, connect
from shardmill.cli.metrics import Metrics
from shardmill.cli.output import JsonOption, count_text, print_document, print_json, print_table, say, size_text
from shardmill.client import Client, NodeUnreachable
from shardmill.core.api import CacheBucket, ConfigInfo, TransformStatistics
from shardmill.core.errors import ShardmillError

LOW_DISK = 0.05  # of the file system's size free; below, results begin to leave
LACKING = {
    "file_system_scope": "this version has none; functions read what the node's user may read",
    "system_call_filter": "this version has none; functions may make any system call but opening sockets",
    "trace_scope": "it takes Landlock (Linux 5.19)",
    "signal_scope": "it takes Landlock (Linux 6.12)",
    "read_only_files": "it takes Landlock (Linux 6.2)",
}
"""Why a layer of isolation is not there, and what that leaves open."""
CLOCK_SKEW = 5.0  # seconds; signed URLs and Last-Modified go wrong beyond


def status(json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """Show a node's buckets, transforms, environments and runs."""
    client = connect(endpoint)
    settings = client.config()
    now = client.runs()
    facts: dict[str, Any] = {
        "endpoint": client.endpoint,
        "version": settings.version,
        "workers": settings.workers,
        "buckets": client.buckets(),
        "cache": client.cache(),
        "transforms": client.transforms.list(),
        "environments": settings.environments,
        "runs": Metrics.parse(client.metrics()).by("shardmill_runs", "state"),
        "going_on": now.runs,
        "totals": now.transforms,
    }
    if json:
        print_document(facts)
        return
    print(f"{client.endpoint}  shardmill {settings.version}  {settings.workers} workers")
    runs = ", ".join(f"{int(value)} {label}" for label, value in facts["runs"].items() if value)
    print(f"runs: {runs or 'none'}")
    sections: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
        (
            ("bucket", "backing", "access"),
            [(item.uri, item.backing, "read-write" if item.writable else "read-only") for item in facts["buckets"]],
        ),
        (
            (
                "cached",
                "objects",
                "on disk",
                "hits",
                "misses",
                "served",
                "fetched",
                "arriving",
                "evicted",
                "first byte",
            ),
            [_cache_row(item) for item in facts["cache"].buckets],
        ),
        (
            ("transform", "environment", "decoder", "from", "held up by"),
            [
                (
                    item.uuid,
                    item.environment,
                    item.decoder or "-",
                    item.label,
                    _bottleneck(now.transforms.get(item.name)),
                )
                for item in facts["transforms"]
            ],
        ),
        (
            ("run", "spec", "object", "readers", "done", "samples/s", "held up by"),
            [
                (
                    item.id,
                    item.spec,
                    f"{item.bucket}/{item.object}",
                    str(item.readers),
                    f"{item.done:.0%}",
                    f"{item.rate:.1f}",
                    _bottleneck(item.statistics),
                )
                for item in now.runs
            ],
        ),
        (
            ("environment", "state", "python", "packages", "size", "interpreter"),
            [
                (
                    item.name,
                    item.state,
                    item.python or "-",
                    "-" if item.distributions is None else str(item.distributions),
                    "-" if item.bytes is None else size_text(item.bytes),
                    item.interpreter,
                )
                for item in settings.environments
            ],
        ),
    ]
    for headings, rows in sections:
        if rows:
            print()
            print_table(headings, rows)


def _cache_row(cached: CacheBucket) -> tuple[str, ...]:
    waited = f"{cached.fetch_seconds / cached.fetches * 1000:.0f} ms" if cached.fetches else "-"
    counts = (cached.filling, cached.evicted)
    return (
        cached.bucket,
        str(cached.objects),
        size_text(cached.bytes),
        str(cached.hits),
        str(cached.misses),
        size_text(cached.served),
        size_text(cached.fetched),
        *map(str, counts),
        waited,
    )


def _bottleneck(statistics: TransformStatistics | None) -> str:
    found = statistics.bottleneck if statistics is not None else None
    return f"{found.label} {found.share:.0%}" if found is not None else "-"


def config(endpoint: EndpointOption = None) -> None:
    """Print the node's effective settings, secrets masked."""
    print_document(connect(endpoint).config())


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `doctor` looked at."""

    verdict: Literal["ok", "note", "broken"]
    about: str
    text: str


def doctor(
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Check this client and its node.

    Exit status 1 if something is broken; notes are no failures.
    """
    findings = [*_examine_client(), *_examine_node(connect(endpoint))]
    if json:
        for finding in findings:
            print_json(finding)
    else:
        width = max(len(finding.about) for finding in findings)
        for finding in findings:
            print(f"{finding.verdict:6}  {finding.about:{width}}  {finding.text}")
    broken = sum(finding.verdict == "broken" for finding in findings)
    if broken:
        say(f"{count_text(broken, 'thing')} broken")
        raise typer.Exit(1)


def _examine_client() -> list[Finding]:
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding("ok" if sys.version_info >= (3, 11) else "broken", "python", python)]
    findings.append(Finding("ok", "client", f"shardmill {__version__}"))
    for library, purpose in (("xxhash", "checksums of uploads and downloads"), ("matplotlib", "pictures in notebooks")):
        if importlib.util.find_spec(library) is None:
            findings.append(Finding("note", library, f"not installed: {purpose} are left out"))
    return findings


def _examine_node(client: Client) -> list[Finding]:
    try:
        settings = client.config()
        skew = _clock_skew(client)
        buckets = client.buckets()
    except (ShardmillError, NodeUnreachable) as error:
        return [Finding("broken", "node", str(error))]
    same = settings.version == __version__
    findings = [
        Finding("ok", "node", f"{client.endpoint} answers"),
        Finding(
            "ok" if same else "note",
            "node version",
            f"shardmill {settings.version}" + ("" if same else f"; this client is {__version__}"),
        ),
        Finding(
            "ok" if abs(skew) < CLOCK_SKEW else "note",
            "clock",
            f"the node's is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this one"
            if skew
            else "the node's is this one's, to the second",
        ),
        Finding("ok" if buckets else "note", "buckets", f"{len(buckets)}" if buckets else "none; `shardmill mb`"),
    ]
    return findings + _examine_disk(settings) + _examine_environments(settings) + _examine_isolation(settings)


def _examine_disk(settings: ConfigInfo) -> list[Finding]:
    """The data directory's file system, where it can be seen from here."""
    server = settings.settings.get("server")
    data = server.get("data") if isinstance(server, dict) else None
    if not isinstance(data, str) or not Path(data).is_dir():
        return []
    usage = shutil.disk_usage(data)
    text = f"{size_text(usage.free)} of {size_text(usage.total)} free"
    return [Finding("ok" if usage.free > LOW_DISK * usage.total else "note", "disk", text)]


def _examine_environments(settings: ConfigInfo) -> list[Finding]:
    return [
        Finding(
            "broken" if item.state == "failed" else "ok",
            f"environment {item.name}",
            f"{item.state}, Python {item.python or 'not yet known'}" + (f": {item.error}" if item.error else ""),
        )
        for item in settings.environments
    ]


def _examine_isolation(settings: ConfigInfo) -> list[Finding]:
    """Layers around user code."""
    return [
        Finding(
            "ok" if active else "note",
            f"isolation {name}",
            "active" if active else f"not active: {LACKING.get(name, 'this kernel does not grant it')}",
        )
        for name, active in sorted(settings.isolation.items())
    ]


def _clock_skew(client: Client) -> float:
    """Seconds that the node's clock is ahead; to the second, as its Date header is, whose fraction is cut off."""
    date = client.probe().get("Date")
    ahead = 0.0 if date is None else parsedate_to_datetime(date).timestamp() - time.time()
    return math.ceil(ahead) if ahead < 0 else math.floor(ahead)
