"""`/metrics`: read by Prometheus' own parser, and adding up."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shardmill.testing.node import running_node
from tests.server.wire import Wire, request, wait_for

SHARD = "imagenet-train-000000.tar"
FAIL_SOME = """
def transform(sample):
    number = KEYS.index(sample["__key__"])
    if number % 10 == 3:
        raise ValueError("three")
    return None if number % 10 == 4 else sample
"""


@pytest.fixture
def fresh(shards: Path) -> Iterator[Wire]:
    """A node that nobody has asked for anything but whether it is ready."""
    with running_node(
        "--bucket", f"gs://sharded-imagenet=dir:{shards}", "--bucket", "ais://pool", "--workers", "2"
    ) as node:
        yield Wire(node, (str(shards),))


def test_a_parser_reads_it_and_finds_the_names(wire: Wire) -> None:
    answer = wire.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    labels = {
        "shardmill_requests": {"route", "status"},
        "shardmill_bytes": {"route", "direction"},
        "shardmill_transform_samples": {"transform", "outcome"},
        "shardmill_runs": {"state"},
        "shardmill_workers": {"environment"},
        "shardmill_origin_bytes": {"bucket"},
        "shardmill_origin_requests": {"bucket", "status"},
    }
    assert labels.keys() <= families.keys()
    for name, expected in labels.items():
        family = families[name]
        assert family.documentation
        assert family.type == ("gauge" if name in ("shardmill_runs", "shardmill_workers") else "counter")
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                assert set(sample.labels) == expected
                assert sample.name == (name if family.type == "gauge" else f"{name}_total")


def test_requests_and_bytes_add_up(fresh: Wire, shards: Path) -> None:
    size = (shards / SHARD).stat().st_size
    put = fresh.put("/o/ais/pool/a", bytes(1000))
    assert put.status == 201
    for _ in range(3):
        fresh.get(f"/o/gs/sharded-imagenet/{SHARD}")
    fresh.get("/o/ais/pool/a", "Range: bytes=0-99")
    fresh.ask("HEAD", "/o/ais/pool/a")
    missing = fresh.get("/o/ais/pool/none")
    fresh.tell(b"nonsense\r\n\r\n")
    listing = fresh.get("/api/buckets")
    fresh.get("/nothing")
    wait_for(
        lambda: fresh.metrics().get('shardmill_requests_total{route="other",status="404"}') == 1, "the last is counted"
    )
    found = fresh.metrics()
    assert {
        name: value
        for name, value in found.items()
        if name.startswith("shardmill_requests_total") and "metrics" not in name
    } == {
        'shardmill_requests_total{route="readyz",status="200"}': 1,
        'shardmill_requests_total{route="o",status="201"}': 1,
        'shardmill_requests_total{route="o",status="200"}': 4,
        'shardmill_requests_total{route="o",status="206"}': 1,
        'shardmill_requests_total{route="o",status="404"}': 1,
        'shardmill_requests_total{route="other",status="400"}': 1,
        'shardmill_requests_total{route="other",status="404"}': 1,
        'shardmill_requests_total{route="api",status="200"}': 1,
    }
    assert found['shardmill_bytes_total{direction="in",route="o"}'] == 1000
    assert found['shardmill_bytes_total{direction="out",route="o"}'] == 3 * size + 100 + len(missing.body)
    assert found['shardmill_bytes_total{direction="out",route="api"}'] == len(listing.body)


def test_samples_and_runs_add_up(fresh: Wire, shards: Path) -> None:
    with tarfile.open(shards / SHARD) as archive:
        keys = list(dict.fromkeys(name.partition(".")[0] for name in archive.getnames()))
    uuid = fresh.register(f"KEYS = {keys!r}\n{FAIL_SOME}", "some")
    path = f"/t/gs/sharded-imagenet/{uuid},seed=1,errors=skip:1,count=20~{SHARD}"
    body = fresh.get(path).body
    wait_for(lambda: fresh.metrics()['shardmill_runs{state="running"}'] == 0, "the run has ended")
    found = fresh.metrics()
    for outcome, count in (("ok", 16), ("failed", 2), ("dropped", 2)):
        assert found[f'shardmill_transform_samples_total{{outcome="{outcome}",transform="some"}}'] == count
    assert found['shardmill_runs{state="ended"}'] == 1
    assert found['shardmill_workers{environment="default"}'] >= 1
    wait_for(
        lambda: fresh.metrics()['shardmill_bytes_total{direction="out",route="t"}'] == len(body),
        "its bytes are counted",
    )
    assert fresh.get(path).body == body
    assert fresh.metrics()['shardmill_transform_samples_total{outcome="ok",transform="some"}'] == 16


def test_labels_are_bounded(wire: Wire) -> None:
    """Whatever is asked for, no key, method or path becomes a label."""
    wire.get("/metrics")
    for number in range(20):
        wire.get(f"/o/ais/pool/label-{number}")
        wire.get(f"/label-{number}/x")
        wire.get(f"/t/ais/pool/label-{number}~x")
        wire.ask("PROPFIND", f"/label-{number}")
        wire.ask(f"LABEL{number}", "/o/ais/pool/a")
    text = wire.get("/metrics").body.decode()
    assert "abel" not in text.replace("labels", "")
    routes = {line.partition('route="')[2].partition('"')[0] for line in text.splitlines() if 'route="' in line}
    assert routes <= {"o", "t", "api", "healthz", "readyz", "metrics", "index", "other"}


def test_a_client_that_leaves_is_counted(wire: Wire) -> None:
    gone = 'shardmill_requests_total{route="o",status="gone"}'
    before = wire.metrics().get(gone, 0)
    with wire.connect() as peer:
        peer.send(request("PUT", "/o/ais/pool/gone", "Content-Length: 100000") + b"x")
        wait_for(lambda: bool(wire.temporary_files()), "the upload has begun")
    wait_for(lambda: wire.metrics().get(gone, 0) == before + 1, "it is counted")
