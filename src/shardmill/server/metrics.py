"""`/metrics` in the Prometheus text format.

Labels are bounded: faces, names of transforms and environments, never keys.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardmill.core.sources import ResultStatistics
from shardmill.node.transforms import Transforms

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of the server, and a look at the engine's when they are asked for."""

    def __init__(self, transforms: Transforms) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "shardmill_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._bytes = Counter(
            "shardmill_bytes", "Body bytes received and sent.", ["route", "direction"], registry=self._registry
        )
        self._registry.register(_EngineCollector(transforms))
        # Of stores that are fetched from; a node whose buckets are its own disk has none to count.
        Counter("shardmill_origin_bytes", "Bytes fetched from origins.", ["bucket"], registry=self._registry)
        Counter("shardmill_origin_requests", "Answers of origins.", ["bucket", "status"], registry=self._registry)

    def count(self, route: str, status: str, *, received: int, sent: int) -> None:
        """One request is done; status `cut` is an answer that failed after its head."""
        self._requests.labels(route, status).inc()
        if received:
            self._bytes.labels(route, "in").inc(received)
        if sent:
            self._bytes.labels(route, "out").inc(sent)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, transforms: Transforms) -> None:
        self._transforms = transforms

    def collect(self) -> Iterator[Metric]:
        statistics = self._transforms.statistics()
        samples = CounterMetricFamily(
            "shardmill_transform_samples", "Samples by outcome.", labels=["transform", "outcome"]
        )
        for (name, outcome), count in statistics.outcomes.items():
            samples.add_metric([name, outcome], count)
        yield samples
        runs = GaugeMetricFamily("shardmill_runs", "Runs going on, and ended since the start.", labels=["state"])
        for state, count in statistics.runs.items():
            runs.add_metric([state], count)
        yield runs
        workers = GaugeMetricFamily("shardmill_workers", "Worker processes.", labels=["environment"])
        for environment, count in statistics.workers.items():
            workers.add_metric([environment], count)
        yield workers
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
