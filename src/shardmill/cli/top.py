"""`top`: what goes on at a node, now: runs, workers, results, rates, and what holds the runs up.

Rates are differences between two looks, so that they are of now and not of the whole life of a run.
"""

import contextlib
import importlib.util
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from shardmill.cli.locations import EndpointOption, connect
from shardmill.cli.metrics import Metrics
from shardmill.cli.output import JsonOption, print_json, print_table, size_text
from shardmill.client import Client
from shardmill.core.api import RunInfo, Runs, TransformStatistics
from shardmill.core.specs import Spec

if TYPE_CHECKING:
    from rich.console import Group

LEAST_SECONDS = 0.1  # between two looks
WIDE = 130  # columns of a terminal on which whole names have room

RUNS = ("run", "spec", "object", "readers", "done", "samples/s", "out/s", "held up by")
TRANSFORMS = ("transform", "samples", "failed", "samples/s", "since the start held up by")


class Look(msgspec.Struct, frozen=True):
    """What a node said at one time."""

    endpoint: str
    runs: Runs
    sent: float
    """Bytes of all answers since the start."""
    requests: float
    reads: dict[str, float]
    results: float
    results_bytes: float
    results_capacity: float

    @classmethod
    def at(cls, client: Client) -> "Look":
        metrics = Metrics.parse(client.metrics())
        return cls(
            client.endpoint,
            client.runs(),
            sent=metrics.total("shardmill_bytes_total", direction="out"),
            requests=metrics.total("shardmill_requests_total"),
            reads=metrics.by("shardmill_transformed_reads_total", "outcome"),
            results=metrics.total("shardmill_results"),
            results_bytes=metrics.total("shardmill_results_bytes"),
            results_capacity=metrics.total("shardmill_results_capacity_bytes"),
        )


class RunNow(msgspec.Struct, frozen=True):
    """One run between two looks."""

    run: RunInfo
    samples_per_second: float
    bytes_per_second: float
    """As its fastest reader took them."""


class TransformNow(msgspec.Struct, frozen=True):
    """One transform between two looks."""

    name: str
    statistics: TransformStatistics
    samples_per_second: float


class View(msgspec.Struct, frozen=True):
    """What is shown."""

    endpoint: str
    time: float
    lanes: int
    busy: int
    processes: int
    samples_per_second: float
    sent_per_second: float
    requests_per_second: float
    reads: dict[str, float]
    """Readers since the start, by what they were given."""
    results: int
    results_bytes: int
    results_capacity: int
    runs: list[RunNow]
    transforms: list[TransformNow]


def top(
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=LEAST_SECONDS, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once, after one interval, and end.")] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Watch what a node does.

    Runs with their readers and rates, workers, results, and what holds each run up. On a terminal it is shown anew
    every interval, until q or Ctrl-C; elsewhere, and with --once, it is printed once.
    """
    client = connect(endpoint)
    if json:
        for view in _views(client, interval):
            print_json(view)
            sys.stdout.flush()
            if once:
                return
    elif once or not sys.stdout.isatty():
        print_view(next(_views(client, interval)))
    else:
        _watch(client, interval)


def compare(before: Look, now: Look) -> View:
    """What happened between two looks; what began after the first counts from its own start."""
    passed = max(now.runs.time - before.runs.time, 1e-9)
    old_runs = {run.id: run for run in before.runs.runs}
    old_transforms = before.runs.transforms
    runs = [_run_between(old_runs.get(run.id), run, now.runs.time, passed) for run in now.runs.runs]
    transforms = [
        TransformNow(name, totals, _gain(_samples(old_transforms.get(name)), _samples(totals), passed))
        for name, totals in sorted(now.runs.transforms.items())
    ]
    return View(
        endpoint=now.endpoint,
        time=now.runs.time,
        lanes=now.runs.lanes,
        busy=now.runs.busy,
        processes=sum(now.runs.workers.values()),
        samples_per_second=sum(item.samples_per_second for item in transforms),
        sent_per_second=_gain(before.sent, now.sent, passed),
        requests_per_second=_gain(before.requests, now.requests, passed),
        reads=now.reads,
        results=int(now.results),
        results_bytes=int(now.results_bytes),
        results_capacity=int(now.results_capacity),
        runs=runs,
        transforms=transforms,
    )


def _run_between(before: RunInfo | None, now: RunInfo, at: float, passed: float) -> RunNow:
    if before is None:
        passed = min(passed, max(at - now.started, 1e-9))
    samples, taken = (_samples(before.statistics), before.taken) if before is not None else (0, 0)
    return RunNow(now, _gain(samples, _samples(now.statistics), passed), _gain(taken, now.taken, passed))


def _samples(statistics: TransformStatistics | None) -> int:
    """Source samples, whatever became of them."""
    return statistics.samples + statistics.failures + statistics.dropped if statistics is not None else 0


def _gain(before: float, now: float, seconds: float) -> float:
    """A second; a node that was started anew counts from 0."""
    return (now - before if now >= before else now) / seconds


def _views(client: Client, interval: float) -> Iterator[View]:
    before = Look.at(client)
    while True:
        time.sleep(interval)
        now = Look.at(client)
        yield compare(before, now)
        before = now


def head_of(view: View) -> list[str]:
    """The lines above the tables."""
    clock = time.strftime("%H:%M:%S", time.localtime(view.time))
    reads = ", ".join(f"{count:.0f} {outcome}" for outcome, count in view.reads.items() if count)
    plural = "" if view.processes == 1 else "es"
    kept = f"{size_text(view.results_bytes)} of {size_text(view.results_capacity)}"
    return [
        f"{view.endpoint}  {clock}",
        f"workers  {view.busy} of {view.lanes} at work, {view.processes} process{plural}",
        f"rates    {view.samples_per_second:.1f} samples/s, {size_text(int(view.sent_per_second))}/s sent, "
        f"{view.requests_per_second:.1f} requests/s",
        f"results  {view.results}, {kept}; readers since the start: {reads or 'none'}"
        if view.results_capacity
        else "results  are not kept",
    ]


def run_cells(view: View, *, short: bool = False) -> list[tuple[str, ...]]:
    """Rows of the table of runs.

    Args:
        view: What is shown.
        short: Without digests and folders.
    """
    rows: list[tuple[str, ...]] = []
    for item in view.runs:
        run, held_up = item.run, item.run.statistics.bottleneck
        state = "" if run.state == "running" else f" {run.state}"
        rows.append(
            (
                run.id,
                str(replace(Spec.parse(run.spec), digest=None)) if short else run.spec,
                run.object.rpartition("/")[2] if short else f"{run.bucket}/{run.object}",
                "ahead" if run.ahead else str(run.readers),
                f"{run.done:.0%}{state}",
                f"{item.samples_per_second:.1f}",
                size_text(int(item.bytes_per_second)),
                f"{held_up.label} {held_up.share:.0%}" if held_up is not None else "",
            )
        )
    return rows


def transform_cells(view: View) -> list[tuple[str, ...]]:
    """Rows of the table of transforms."""
    return [
        (
            item.name,
            str(_samples(item.statistics)),
            str(item.statistics.failures),
            f"{item.samples_per_second:.1f}",
            item.statistics.bottleneck.text if item.statistics.bottleneck is not None else "",
        )
        for item in view.transforms
    ]


def _tables(view: View, *, short: bool = False) -> list[tuple[tuple[str, ...], list[tuple[str, ...]], tuple[int, ...]]]:
    """Headings, rows, and the columns that are aligned to the right."""
    return [(RUNS, run_cells(view, short=short), (3, 4, 5, 6)), (TRANSFORMS, transform_cells(view), (1, 2, 3))]


def print_view(view: View) -> None:
    """As text, to standard output."""
    print("\n".join(head_of(view)))
    for headings, rows, right in _tables(view):
        if rows:
            print()
            print_table(headings, rows, right=right)


def _watch(client: Client, interval: float) -> None:
    from rich.live import Live

    # Ctrl-C is how it is meant to end, wherever it comes.
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        before = Look.at(client)
        live.update(_drawn(compare(before, before), live.console.width), refresh=True)
        while not pressed(interval):
            now = Look.at(client)
            live.update(_drawn(compare(before, now), live.console.width), refresh=True)
            before = now


def _drawn(view: View, width: int) -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first, *lines = head_of(view)
    parts: list[Text | Table] = [Text.assemble((first, "bold"), ("  q ends it", "dim")), *map(Text, lines)]
    for headings, rows, right in _tables(view, short=width < WIDE):
        table = Table(box=None, pad_edge=False, header_style="reverse", expand=True)
        for column, heading in enumerate(headings):
            is_wide = heading in ("spec", "object", TRANSFORMS[-1])
            table.add_column(
                heading.upper(),
                justify="right" if column in right else "left",
                no_wrap=True,
                overflow="ellipsis",
                ratio=1 if is_wide else None,
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        parts += [Text(), table if rows else Text("no run goes on" if headings is RUNS else "", style="dim")]
    return Group(*parts)


@contextmanager
def _keys() -> "Iterator[_Pressed]":
    """Tells of a pressed q while it waits."""
    if not sys.stdin.isatty() or importlib.util.find_spec("termios") is None:
        yield _Pressed(None)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    settings = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield _Pressed(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)


class _Pressed:
    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __call__(self, seconds: float) -> bool:
        """Whether the end was asked for within that time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._descriptor is None:
                time.sleep(left)
            elif select.select([self._descriptor], [], [], left)[0] and sys.stdin.read(1) in ("q", "Q", ""):
                return True
        return False
