"""`/metrics` in the Prometheus text format.

Labels are bounded: faces, names of transforms and environments, never keys.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardmill.core.api import Stage, TransformStatistics
from shardmill.core.jobs import JobState
from shardmill.core.sources import ResultStatistics
from shardmill.jobs.registry import Jobs
from shardmill.node.cache import Cache
from shardmill.node.transforms import Transforms
from shardmill.server.calls import Call
from shardmill.server.front.desk import Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Name, what it is, field of `core.api.CacheBucket`.
_CACHE_GAUGES = (
    ("shardmill_cache_objects", "Objects of which something is cached.", "objects"),
    ("shardmill_cache_bytes", "Disk that cached objects of a bucket take.", "bytes"),
    ("shardmill_cache_fills", "Objects that arrive.", "filling"),
)
_CACHE_COUNTERS = (
    ("shardmill_cache_served_bytes", "Bytes of cached buckets for readers, transforms included.", "served"),
    ("shardmill_cache_passed", "Readings that were not kept, for want of room.", "passed"),
    ("shardmill_cache_revalidated", "Versions that the origin was asked about, and still had.", "revalidated"),
    ("shardmill_cache_evicted", "Objects that left for others.", "evicted"),
    ("shardmill_cache_repaired_blocks", "Blocks found damaged on the disk, and fetched again.", "repaired"),
    ("shardmill_origin_bytes", "Bytes fetched from origins.", "fetched"),
    ("shardmill_origin_written_bytes", "Bytes put into origins.", "written"),
    ("shardmill_origin_fetches", "Readings of origins.", "fetches"),
    ("shardmill_origin_first_byte_seconds", "Until the heads of their answers, all together.", "fetch_seconds"),
)


class Metrics:
    """Counters of the server, and a look at the engine's when they are asked for."""

    def __init__(self, transforms: Transforms, cache: Cache, jobs: Jobs) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "shardmill_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._bytes = Counter(
            "shardmill_bytes", "Body bytes received and sent.", ["route", "direction"], registry=self._registry
        )
        self._registry.register(_EngineCollector(transforms))
        self._registry.register(_CacheCollector(cache))
        self._registry.register(_JobCollector(jobs))
        self._going_on: dict[str, _Counted] = {}
        self.front = {"o": Tally(), "t": Tally()}
        """What was answered by the front, by route."""

    def begin(self, call: Call) -> None:
        """A request is in work; `end` follows."""
        self._going_on[call.id] = _Counted(call)

    def end(self, call: Call, status: str, *, sent: int) -> None:
        """It is done; status `cut` is an answer that failed after its head."""
        self._requests.labels(call.route, status).inc()
        self._count_bytes(self._going_on.pop(call.id), sent)

    def refuse(self, status: str) -> None:
        """What was no request was answered."""
        self._requests.labels("other", status).inc()

    def render(self) -> bytes:
        # An answer may take an hour: what it has sent until now counts now.
        for counted in self._going_on.values():
            self._count_bytes(counted, counted.call.sent)
        for route, tally in self.front.items():
            statuses, sent, received = tally.take()
            for status, count in statuses.items():
                self._requests.labels(route, status).inc(count)
            if sent:
                self._bytes.labels(route, "out").inc(sent)
            if received:
                self._bytes.labels(route, "in").inc(received)
        return generate_latest(self._registry)

    def _count_bytes(self, counted: "_Counted", sent: int) -> None:
        call = counted.call
        if call.received > counted.received:
            self._bytes.labels(call.route, "in").inc(call.received - counted.received)
        if sent > counted.sent:
            self._bytes.labels(call.route, "out").inc(sent - counted.sent)
        counted.received, counted.sent = call.received, max(sent, counted.sent)


@dataclass(slots=True)
class _Counted:
    """A request in work, and what of its bytes is counted."""

    call: Call
    received: int = 0
    sent: int = 0


class _EngineCollector(Collector):
    def __init__(self, transforms: Transforms) -> None:
        self._transforms = transforms

    def collect(self) -> Iterator[Metric]:
        statistics = self._transforms.statistics()
        samples = CounterMetricFamily(
            "shardmill_transform_samples", "Samples by outcome.", labels=["transform", "outcome"]
        )
        for name, totals in statistics.transforms.items():
            samples.add_metric([name, "ok"], totals.samples)
            samples.add_metric([name, "failed"], totals.failures)
            samples.add_metric([name, "dropped"], totals.dropped)
        yield samples
        yield from _of_stages(statistics.transforms)
        runs = GaugeMetricFamily("shardmill_runs", "Runs going on, and ended since the start.", labels=["state"])
        for state, count in statistics.runs.items():
            runs.add_metric([state], count)
        yield runs
        workers = GaugeMetricFamily("shardmill_workers", "Worker processes.", labels=["environment"])
        for environment, count in statistics.workers.items():
            workers.add_metric([environment], count)
        yield workers
        yield GaugeMetricFamily("shardmill_workers_busy", "Workers at work.", statistics.busy)
        reads = CounterMetricFamily(
            "shardmill_transformed_reads",
            "Readers of transformed objects, by what they were given.",
            labels=["outcome"],
        )
        for outcome, count in statistics.reads.items():
            reads.add_metric([outcome], count)
        yield reads
        if statistics.results is not None:
            yield from _of_results(statistics.results)


class _CacheCollector(Collector):
    """Of stores behind buckets; a node whose buckets are all on its own disk has none to count."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        found = self._cache.statistics()
        yield GaugeMetricFamily("shardmill_cache_used_bytes", "Disk that cached objects take.", found.used)
        yield GaugeMetricFamily("shardmill_cache_high_bytes", "Disk that they never take more of.", found.high)
        for name, help, attribute in _CACHE_GAUGES:
            gauge = GaugeMetricFamily(name, help, labels=["bucket"])
            for bucket in found.buckets:
                gauge.add_metric([bucket.bucket], getattr(bucket, attribute))
            yield gauge
        for name, help, attribute in _CACHE_COUNTERS:
            counter = CounterMetricFamily(name, help, labels=["bucket"])
            for bucket in found.buckets:
                counter.add_metric([bucket.bucket], getattr(bucket, attribute))
            yield counter
        reads = CounterMetricFamily(
            "shardmill_cache_reads", "Readings: hit if all was on the disk.", labels=["bucket", "outcome"]
        )
        requests = CounterMetricFamily(
            "shardmill_origin_requests", "Calls of origins by how they ended.", labels=["bucket", "status"]
        )
        for bucket in found.buckets:
            reads.add_metric([bucket.bucket, "hit"], bucket.hits)
            reads.add_metric([bucket.bucket, "miss"], bucket.misses)
            for status, count in bucket.requests.items():
                requests.add_metric([bucket.bucket, status], count)
        yield reads
        yield requests


class _JobCollector(Collector):
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        statistics = self._jobs.statistics()
        states = GaugeMetricFamily("shardmill_jobs", "Jobs that are known.", labels=["state"])
        for state in get_args(JobState):
            states.add_metric([state], statistics.jobs.get(state, 0))
        yield states
        objects = CounterMetricFamily(
            "shardmill_job_objects",
            "Objects of jobs: made, found done from before, or failed.",
            labels=["kind", "outcome"],
        )
        for (kind, outcome), count in statistics.objects.items():
            objects.add_metric([kind, outcome], count)
        yield objects
        stored = CounterMetricFamily("shardmill_job_bytes", "Bytes that jobs have stored.", labels=["kind"])
        for kind, size in statistics.bytes_out.items():
            stored.add_metric([kind], size)
        yield stored


def _of_stages(transforms: Mapping[str, TransformStatistics]) -> Iterator[Metric]:
    seconds = CounterMetricFamily(
        "shardmill_transform_seconds",
        "Where time goes: of workers in read, decode, user and encode; by the clock, of runs, in the others.",
        labels=["transform", "stage"],
    )
    holds_up = GaugeMetricFamily(
        "shardmill_transform_bottleneck",
        "Since the start: the stage that holds a transform up, and for which share of the time.",
        labels=["transform", "stage"],
    )
    for name, totals in transforms.items():
        for stage in get_args(Stage):
            seconds.add_metric([name, stage], getattr(totals, f"seconds_{stage}"))
        if totals.bottleneck is not None:
            holds_up.add_metric([name, totals.bottleneck.stage], totals.bottleneck.share)
    yield seconds
    yield holds_up


def _of_results(results: ResultStatistics) -> Iterator[Metric]:
    counts = GaugeMetricFamily("shardmill_results", "Kept results.", labels=["kind"])
    counts.add_metric(["kept"], results.count - results.scratch)
    counts.add_metric(["scratch"], results.scratch)
    yield counts
    sizes = GaugeMetricFamily("shardmill_results_bytes", "Disk that results take.", labels=["state"])
    sizes.add_metric(["finished"], results.kept)
    sizes.add_metric(["growing"], results.spooling)
    yield sizes
    yield GaugeMetricFamily("shardmill_results_capacity_bytes", "Disk that results may take.", results.capacity)
    yield CounterMetricFamily("shardmill_results_evicted", "Results that left for others.", results.evicted)
