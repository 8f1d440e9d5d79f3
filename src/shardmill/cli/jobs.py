"""Offline jobs: `job ls show wait cancel`, and what `cp --transform` begins and watches."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, TypedDict

import typer

from shardmill.cli.locations import EndpointOption, connect
from shardmill.cli.output import JsonOption, count_text, print_json, print_table, say, size_text, time_text
from shardmill.cli.results import age_text
from shardmill.client import Client, JobFailed, NodeUnreachable
from shardmill.core.jobs import JobDetails, JobInfo, JobKind, JobPlan

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See, await and cancel offline jobs of the node.")

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id.")]


class Chosen(TypedDict, total=False):
    """Which objects a job is about, as the client's methods take it: one of these."""

    template: str
    names: list[str]
    prefix: str


_MOVED: dict[JobKind, str] = {"transform": "stored", "prefetch": "fetched", "evict": "freed"}
SHOWN = 20  # failures that are printed of each sort; --json has more


@app.command("ls")
def list_jobs(json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """List the jobs that the node knows, the newest first."""
    jobs = connect(endpoint).jobs.list()
    if json:
        for job in jobs:
            print_json(job)
        return
    now = time.time()
    rows = [
        (
            job.id,
            job.state,
            f"{job.done}/{job.total}",
            str(job.failed or ""),
            f"{size_text(int(job.rate))}/s" if job.rate else "",
            _left(job),
            age_text(now - job.created),
            job.request.transform or "",
            job.request.label,
        )
        for job in jobs
    ]
    headings = ("job", "state", "objects", "failed", "rate", "left", "age", "spec", "from and to")
    print_table(headings, rows, right=(2, 3, 4, 5, 6))
    if not jobs:
        say("no jobs; begin one with: shardmill cp --transform NAME SOURCE TARGET")


@app.command()
def show(job: JobArgument, json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """Show how a job stands, and what failed."""
    details = connect(endpoint).jobs.get(job)
    if json:
        print_json(details)
        return
    info = details.job
    facts = {
        "job": info.id,
        "state": info.state + (f": {info.error}" if info.error else ""),
        "kind": info.request.kind,
        "spec": info.request.transform,
        "from": f"{info.request.source}/{_selection(info)}",
        "to": f"{info.request.destination}/{info.request.rename}" if info.request.destination is not None else None,
        "manifest": info.manifest,
        "objects": f"{info.done} of {info.total}, {info.found} found done, {info.failed} failed",
        "samples": f"{info.samples}, {info.failures} left out" if info.request.kind == "transform" else None,
        "sources": f"{size_text(info.bytes_done)} of {size_text(info.bytes)}, {size_text(int(info.rate))}/s",
        _MOVED[info.request.kind]: size_text(info.bytes_out),
        "created": time_text(info.created),
        "started": time_text(info.started or 0),
        "ended": time_text(info.ended or 0),
        "left": _left(info),
    }
    for name, value in facts.items():
        if value:
            print(f"{name + ':':10} {value}")
    for running in details.running:
        print(f"{'working:':10} {running.object} {running.done:.0%}")
    _print_failed_objects(details, print)
    for failed in details.samples[:SHOWN]:
        print(f"left out: {failed.object}: {failed.message}")
    if info.failures > SHOWN:
        say(f"{info.failures - SHOWN} samples are not shown; --json has more, the manifest all")


@app.command()
def wait(
    job: JobArgument,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after these; status 1.")] = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Wait for the end of a job; status 1 unless it ended well."""
    watch(connect(endpoint), job, timeout=timeout, json=json)


@app.command()
def cancel(job: JobArgument, json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """End a job; what it has done stays, and the same command goes on with it."""
    info = connect(endpoint).jobs.cancel(job)
    if json:
        print_json(info)
        return
    say(f"job {info.id} is {info.state}; {info.done} of {info.total} objects are done")


def watch(client: Client, job: str, *, timeout: float | None = None, json: bool) -> None:
    """Wait for a job, with a bar on a terminal; exits with status 1 unless it ended well."""
    try:
        with _bar() as advance:
            details = client.jobs.wait(job, timeout=timeout, progress=advance)
    except JobFailed as failed:
        if json:
            print_json(failed.details)
        say(f"shardmill: {failed}")
        if not json:
            _print_failed_objects(failed.details, say)
        say("what is done stays; the same command goes on with it")
        raise typer.Exit(1) from None
    except NodeUnreachable:
        say(f"the node is gone; job {job} goes on when it is started again")
        raise
    except KeyboardInterrupt:
        say(f"job {job} goes on without you; shardmill job wait {job} watches it, shardmill job cancel {job} ends it")
        raise
    if json:
        print_json(details)
    else:
        say(_summary(details.job))


def print_cache_plan(plan: JobPlan, verb: str, *, json: bool) -> None:
    """What a job would do that fetches, or evicts."""
    if json:
        print_json(plan)
        return
    for planned in plan.objects:
        print(f"{planned.object}{'  (done)' if planned.done else ''}")
    say(
        f"job {plan.id} would {verb} {plan.total - plan.done} of {plan.total} objects{_not_shown(plan)}; "
        f"{size_text(plan.left)}"
    )


def print_plan(plan: JobPlan, *, json: bool) -> None:
    """What a job would do."""
    if json:
        print_json(plan)
        return
    for planned in plan.objects:
        print(f"{planned.object} -> {planned.target}{'  (done)' if planned.done else ''}")
    say(
        f"job {plan.id} would make {plan.total - plan.done} of {plan.total} objects{_not_shown(plan)}; all have "
        f"{size_text(plan.bytes)}"
    )


def _not_shown(plan: JobPlan) -> str:
    return f", {plan.total - len(plan.objects)} not shown" if plan.total > len(plan.objects) else ""


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[JobDetails], None] | None]:
    """A bar on a terminal's standard error; nothing anywhere else."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("waiting", total=None, rate="", left="")

        def advance(details: JobDetails) -> None:
            job = details.job
            failed = f", {job.failed} failed" if job.failed else ""
            words = f"{job.state} {job.done}/{job.total}{failed}" if job.total else job.state
            rate = f"{size_text(int(job.rate))}/s" if job.rate else ""
            left = _left(job)
            bars.update(
                task,
                description=words,
                completed=job.bytes_done,
                total=job.bytes or None,
                rate=rate,
                left=f"{left} left" if left else "",
            )

        yield advance


def _summary(job: JobInfo) -> str:
    made = job.done - job.found
    if job.request.kind == "evict":
        return f"evicted {count_text(made, 'object')}, {size_text(job.bytes_out)} given back"
    seconds = max((job.ended or time.time()) - (job.started or job.created), 1e-9)
    found = f", {job.found} were done before" if job.found else ""
    left_out = (
        f"; {job.failures} of {job.samples + job.failures} samples were left out (shardmill job show {job.id})"
        if job.failures
        else ""
    )
    noun = "object" if made == 1 else "objects"
    rate = f" ({size_text(int(job.rate))}/s)" if made else ""
    if job.request.kind == "prefetch":
        return f"fetched {size_text(job.bytes_out)} of {made} {noun} in {seconds:.1f} s{found}"
    return f"made {made} {noun} in {seconds:.1f} s{rate}{found}{left_out}; {job.manifest}"


def _print_failed_objects(details: JobDetails, write: Callable[[str], None]) -> None:
    for failure in details.objects[:SHOWN]:
        write(f"failed: {failure.object}: {failure.message}")
        # One is enough to see what is wrong; as a rule they are all alike.
        if failure.traceback and failure is details.objects[0]:
            write(failure.traceback.rstrip())
    if details.job.failed > SHOWN:
        write(f"{details.job.failed - SHOWN} objects are not shown; --json has more, the manifest all")


def _selection(job: JobInfo) -> str:
    request = job.request
    if request.names is not None:
        return request.names[0] if job.total == 1 else f"({job.total} names)"
    return request.template if request.template is not None else f"{request.prefix}*"


def _left(job: JobInfo) -> str:
    if job.time_left is None:
        return ""
    seconds = int(job.time_left + 0.999)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
