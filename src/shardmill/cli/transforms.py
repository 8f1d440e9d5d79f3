"""Transforms of a node: `transform add add-command add-pipeline try replay ls show errors rm`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer

from shardmill.cli import results, trying
from shardmill.cli.locations import EndpointOption, EpochOption, Options, SeedOption, complete_name, connect, locate
from shardmill.cli.objects import read_samples
from shardmill.cli.output import (
    JsonOption,
    count_text,
    print_document,
    print_json,
    print_table,
    say,
    size_text,
    time_text,
)
from shardmill.client.shards import describe_sample, read_stream
from shardmill.core.api import Kind, ProbeReport, TransformDetails, TransformInfo, TransformStatistics
from shardmill.core.errors import BadRequest, MemberNotFound, TransformFailed
from shardmill.core.specs import Spec
from shardmill.notebook import check_drawing

_SHOWN = 2  # transforms of an environment in the table of environments

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Register functions, try them, see how they fare.")

app.add_typer(results.app, name="results")

environments = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Environments that transforms run in.")
app.add_typer(environments, name="env")


def _check_file(target: str) -> str:
    file, colon, _ = target.rpartition(":")
    if colon and file and not Path(file).is_file():
        raise BadRequest(f"{file}: no such file; what is wanted is FILE.py:FUNC")
    return target


FunctionArgument = Annotated[
    str, typer.Argument(metavar="FILE.py:FUNC", help="The file is not run here.", callback=_check_file)
]
NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME[@DIGEST]", help="Without a digest: its newest version.", autocompletion=complete_name),
]
DecoderOption = Annotated[
    str | None, typer.Option(metavar="SPEC", help="As WebDataset's decode: pil (default), rgb, …; none: bytes.")
]
FieldsOption = Annotated[str | None, typer.Option(metavar="F,F", help="Decode only these fields.")]
EnvOption = Annotated[str | None, typer.Option(metavar="NAME", help="Environment of the node; default: one that fits.")]
KindOption = Annotated[
    str | None, typer.Option(metavar="KIND", help="sample (default), bytes or stream: what it takes and gives.")
]
ProbeOption = Annotated[
    str | None, typer.Option(metavar="URI", help="A shard to try a few samples of, or an object to try whole.")
]
PackageOption = Annotated[
    list[str] | None,
    typer.Option("--package", metavar="REQUIREMENT", help="Build an environment with it; may be given repeatedly."),
]
ArgsOption = Annotated[str | None, typer.Option("--args", metavar="JSON", help="Keyword arguments of the function.")]


@app.command()
def add(
    function: FunctionArgument,
    name: Annotated[str, typer.Option(metavar="N", help="Default: the function's own.")] = "",
    kind: KindOption = None,
    by_path: Annotated[bool, typer.Option("--by-path", help="Of kind bytes: give it the path of a file.")] = False,
    decoder: DecoderOption = "pil",
    fields: FieldsOption = None,
    args: ArgsOption = None,
    package: PackageOption = None,
    env: EnvOption = None,
    probe: ProbeOption = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Decode pyd and pth fields.")] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Register a function, and print its uuid for URLs."""
    info = connect(endpoint).transforms.add(
        function,
        name,
        kind=cast(Kind | None, kind),
        by_path=True if by_path else None,
        decoder=None if decoder == "none" else decoder,
        fields=_field_names(fields),
        args=parse_arguments(args),
        packages=package or (),
        env=env,
        probe=probe,
        allow_pickle=allow_pickle,
        progress=say,
    )
    _print_registered(info, json=json)


@app.command("add-command")
def add_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="To register it under.")],
    argv: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="Behind --; may have {key} {name} {path} {seed}.")
    ],
    args: Annotated[
        str | None, typer.Option("--args", metavar="JSON", help="What other {names} of the command stand for.")
    ] = None,
    env: EnvOption = None,
    probe: ProbeOption = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Register a command line that takes whole objects.

    It gets an object on its standard input, or as {path}, and gives the output on its standard output. The uuid for
    URLs is printed.
    """
    info = connect(endpoint).transforms.add_command(
        argv, name, args=parse_arguments(args), env=env, probe=probe, progress=say
    )
    _print_registered(info, json=json)


@app.command("add-pipeline")
def add_pipeline(
    name: Annotated[str, typer.Argument(metavar="NAME", help="To register it under.")],
    parts: Annotated[
        list[str],
        typer.Argument(metavar="NAME[@DIGEST]...", help="Registered, in order.", autocompletion=complete_name),
    ],
    probe: ProbeOption = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Register functions that follow one another.

    They run in one worker; the uuid for URLs is printed. A part without a digest is the newest version of its name, now
    and for good.
    """
    transforms = connect(endpoint).transforms
    uuids = [part if "@" in part else transforms.get(part).transform.uuid for part in parts]
    _print_registered(transforms.add_pipeline(uuids, name, probe=probe, progress=say), json=json)


@app.command("try")
def try_function(
    function: FunctionArgument,
    shard: Annotated[str, typer.Argument(metavar="SHARD", help="URI of a shard, or a local .tar.")],
    name: Annotated[str, typer.Option(metavar="N", help="Default: the function's own.")] = "",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="How many.")] = 8,
    picture: Annotated[
        str | None, typer.Option(metavar="OUT.png", help="Write pictures before and after; needs the extra notebook.")
    ] = None,
    decoder: DecoderOption = "pil",
    fields: FieldsOption = None,
    args: ArgsOption = None,
    package: PackageOption = None,
    env: EnvOption = None,
    seed: SeedOption = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Run a function on a shard's first samples.

    Shows what goes in, what comes out, what it costs, and whether running it in the store pays.
    """
    if picture is not None:
        check_drawing()
    with trying.shard_at(shard, endpoint) as location:
        info = location.client.transforms.add(
            function,
            name,
            decoder=None if decoder == "none" else decoder,
            fields=_field_names(fields),
            args=parse_arguments(args),
            packages=package or (),
            env=env,
            progress=say,
        )
        if info.kind != "sample":
            raise BadRequest(
                f"{info.name} is of kind {info.kind}, and try shows samples; register it with --probe {shard}, or read "
                f"an object through it: shardmill get {location} --transform {info.uuid}"
            )
        trial = trying.run_trial(location, info, samples=samples, seed=seed)
        if json:
            print_json(trial.report())
        else:
            trying.print_trial(trial)
        if picture is not None:
            trying.save_picture(trial, picture)
            say(f"pictures before and after: {picture}")


@app.command()
def replay(
    name: NameArgument,
    uri: Annotated[str, typer.Argument(metavar="URI", help="The shard.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The sample's key.")],
    seed: SeedOption = None,
    epoch: EpochOption = None,
    endpoint: EndpointOption = None,
) -> None:
    """Run one sample again, as it ran when it failed.

    It gets its recorded seed and its place in the shard; what the function raises is shown in full.
    """
    location = locate(uri, endpoint, Options(transform=name))
    assert location.transform is not None
    failures = location.client.transforms.errors(
        location.transform, bucket=str(location.ref.bucket), key=location.ref.key
    ).failures
    recorded = [item for item in failures if item.sample == key and item.ordinal is not None]
    if recorded:
        ordinal = recorded[-1].ordinal
        seed = seed if seed is not None else recorded[-1].seed
    else:
        say(f"no failure of {key} is recorded; looking for it in the shard")
        ordinal = next((sample.ordinal for sample in read_samples(location) if sample.key == key), None)
    if ordinal is None:
        raise MemberNotFound(f"{location} has no sample {key!r}; `shardmill ls --members {location}` shows them")
    spec = Spec.parse(location.transform).with_options(seed=seed, epoch=epoch, start=ordinal, count=1)
    say(f"sample {key} ({ordinal}) of {location} through {spec}")
    try:
        with location.handle.get(str(spec)) as reader:
            outputs = list(read_stream(reader))
            drawn = reader.seed
    except TransformFailed as error:
        raise TransformFailed(f"it fails: {error.message}", traceback=error.traceback) from error
    say(f"it succeeds with seed {drawn}; {count_text(len(outputs), 'sample')} came out")
    for output in outputs:
        print("\n".join(describe_sample(output)))


@app.command("ls")
def list_transforms(json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """List registered versions, oldest first."""
    infos = connect(endpoint).transforms.list()
    if json:
        for info in infos:
            print_json(info)
        return
    rows = [
        (info.uuid, info.kind, info.decoder or "-", info.environment, time_text(info.created), info.label or "-")
        for info in infos
    ]
    print_table(("transform", "kind", "decoder", "environment", "registered", "from"), rows)
    if not infos:
        say("no transforms; add one with: shardmill transform add FILE.py:FUNC")


@app.command()
def show(name: NameArgument, json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """Show a version and its statistics."""
    details = connect(endpoint).transforms.get(name)
    if json:
        print_document(details)
        return
    for fact, value in _facts(details):
        print(f"{fact + ':':13} {value}")


@app.command()
def errors(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME[@DIGEST]", help="Default: of all.", autocompletion=complete_name)
    ] = None,
    bucket: Annotated[str | None, typer.Option(metavar="URI", help="Only of this bucket.")] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Only of this shard or sample.")] = None,
    request: Annotated[str | None, typer.Option(metavar="ID", help="Only of this request.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="With tracebacks.")] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """List samples and runs that failed, oldest first."""
    transforms = connect(endpoint).transforms
    found = transforms.errors(name, bucket=bucket, key=key, request=request)
    if name is not None and not found.total:
        # A mistyped name has no failures either, which would be good news for the wrong transform.
        transforms.get(name)
    for failure in found.failures:
        if json:
            print_json(failure)
            continue
        is_named = failure.sample is None or failure.message.startswith("sample ")
        place = f"{failure.bucket}/{failure.object}" + ("" if is_named else f": sample {failure.sample!r}")
        print(f"{time_text(failure.time)}  {failure.transform}  {place}: {failure.message}")
        for text in (failure.traceback, failure.output) if verbose else ():
            if text:
                print("    " + text.rstrip().replace("\n", "\n    "))
    if not json:
        more = found.total - len(found.failures)
        say(count_text(found.total, "failure") + (f", {more} of them only counted" if more else ""))


@app.command()
def rm(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@DIGEST]", help="Without a digest: all its versions.", autocompletion=complete_name
        ),
    ],
    endpoint: EndpointOption = None,
) -> None:
    """Remove a version, or all of a name.

    Their URLs are 404 from then on.
    """
    connect(endpoint).transforms.remove(name)
    say(f"removed {name}")


def _print_registered(info: TransformInfo, *, json: bool) -> None:
    if json:
        print_json(info)
        return
    say(f"registered {info.name} from {info.label} for environment {info.environment}")
    if info.probe is not None:
        say(_probe_text(info.probe, info.kind))
    print(info.uuid)


@environments.command("ls")
def list_environments(json: JsonOption = False, endpoint: EndpointOption = None) -> None:
    """List environments.

    Those that the node was given come first, then those that it has built of packages.
    """
    infos = connect(endpoint).transforms.environments()
    if json:
        for info in infos:
            print_json(info)
        return
    rows = [
        (
            info.name,
            info.state,
            info.python or "-",
            "-" if info.distributions is None else str(info.distributions),
            "-" if info.bytes is None else size_text(info.bytes),
            time_text(info.used or 0) or "-",
            _few(info.transforms),
            info.interpreter if info.packages is None else ", ".join(info.packages),
        )
        for info in infos
    ]
    headings = ("environment", "state", "python", "packages", "size", "used", "transforms", "what")
    print_table(headings, rows, right=(3, 4))


@environments.command("rm")
def remove_environment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As env ls shows it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also when transforms run in it; they fail until registered again.")
    ] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Remove an environment that the node has built."""
    connect(endpoint).transforms.remove_environment(name, force=force)
    say(f"removed {name}")


def _few(names: Sequence[str]) -> str:
    """The newest of them; a table has no room for all."""
    more = len(names) - _SHOWN
    shown = ", ".join(reversed(names[-_SHOWN:])) or "-"
    return f"{shown} and {more} more" if more > 0 else shown


def _field_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """What `--args` says."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BadRequest(f"--args {text!r} is not a JSON object: {error}") from error


def _facts(details: TransformDetails) -> list[tuple[str, object]]:
    info, totals = details.transform, details.statistics
    facts: list[tuple[str, object]] = [
        ("uuid", info.uuid),
        ("digest", info.digest),
        ("from", info.label or "-"),
        ("registered", time_text(info.created)),
        ("kind", f"{info.kind} by path" if info.by_path else info.kind),
    ]
    if info.kind == "sample":
        facts.append(("decoder", info.decoder or "none"))
        facts.append(("fields", "all" if info.fields is None else ", ".join(info.fields)))
    facts.append(("environment", f"{info.environment}, Python {info.python}" if info.python else info.environment))
    facts.append(("imports", ", ".join(info.modules) or "-"))
    if info.packages:
        facts += [("packages", ", ".join(info.packages)), ("locked", ", ".join(info.locked))]
    if info.args is not None:
        facts.append(("arguments", msgspec.json.encode(info.args).decode()))
    if info.probe is not None:
        facts.append(("probe", _probe_text(info.probe, info.kind)))
    facts.append(("since start", _totals_text(totals, info.kind)))
    if totals.samples:
        facts.append(("worker", trying.costs_text(totals, "sample" if info.kind == "sample" else "object")))
    if totals.seconds:
        facts.append(("waited", _waits_text(totals)))
    if totals.bottleneck is not None:
        facts.append(("held up by", totals.bottleneck.text))
    return facts


def _waits_text(totals: TransformStatistics) -> str:
    """Seconds by the clock, summed over runs."""
    waits = {
        "the bucket": totals.seconds_fetch,
        "a worker": totals.seconds_wait,
        "readers": totals.seconds_send,
        "the results' disk": totals.seconds_keep,
    }
    parts = ", ".join(f"{seconds:.1f} for {what}" for what, seconds in waits.items())
    return f"of {totals.seconds:.1f} s that runs took: {parts}"


def _totals_text(totals: TransformStatistics, kind: Kind) -> str:
    samples = [count_text(totals.samples, "sample"), f"{totals.dropped} dropped"] if kind == "sample" else []
    counts = [count_text(totals.runs, "run"), *samples, count_text(totals.failures, "failure")]
    return f"{', '.join(counts)}, {size_text(totals.bytes_in)} in, {size_text(totals.bytes_out)} out"


def _probe_text(probe: ProbeReport, kind: Kind) -> str:
    tried = f"{probe.samples} samples tried" if kind == "sample" else "an object tried"
    each = f"{probe.seconds_per_sample * 1000:.1f} ms each"
    drawn = "draws no random numbers" if probe.deterministic else "draws random numbers"
    again = "the same bytes for the same seed" if probe.reproducible else "NOT the same bytes for the same seed"
    return f"{tried}, {each}: {drawn}, {again}"
