"""Results that a node keeps: `transform results ls rm`."""

import time
from typing import Annotated

import typer

from shardmill.cli.locations import EndpointOption, complete_name, connect
from shardmill.cli.output import JsonOption, print_json, print_table, say, size_text
from shardmill.core.errors import BadRequest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See and remove finished transformed shards.")

NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME[@DIGEST]", help="Only of this transform.", autocompletion=complete_name)
]
BucketOption = Annotated[str | None, typer.Option(metavar="URI", help="Only of this bucket.")]
KeyOption = Annotated[str | None, typer.Option(metavar="KEY", help="Only of this object.")]

_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


@app.command("ls")
def list_results(
    name: NameArgument = None,
    bucket: BucketOption = None,
    key: KeyOption = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 1000,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """List the results that the node keeps, the last used first."""
    found = connect(endpoint).transforms.results(name, bucket=bucket, key=key, limit=limit)
    if json:
        for result in found.results:
            print_json(result)
        return
    now = time.time()
    rows = [
        (
            size_text(result.size),
            age_text(now - result.made),
            age_text(now - result.used),
            "scratch" if result.scratch else "",
            str(result.readers or ""),
            result.spec,
            f"{result.bucket}/{result.object}",
        )
        for result in found.results
    ]
    print_table(("size", "age", "used", "kept", "readers", "spec", "object"), rows, right=(0, 1, 2, 4))
    noun = "result" if found.total == 1 else "results"
    more = f", {found.total - len(rows)} not shown" if found.total > len(rows) else ""
    say(f"{found.total} {noun}{more}, {size_text(found.bytes)}; {size_text(found.used)} of {size_text(found.capacity)}")


@app.command()
def rm(
    name: NameArgument = None,
    bucket: BucketOption = None,
    key: KeyOption = None,
    everything: Annotated[bool, typer.Option("--all", help="All that the node keeps.")] = False,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Remove results.

    Who is reading one reads it to its end; the next reader has it made again.
    """
    if everything == any((name, bucket, key)):
        raise BadRequest("say which: NAME, --bucket or --key; or --all for all that the node keeps")
    removed = connect(endpoint).transforms.remove_results(name, bucket=bucket, key=key, everything=everything)
    if json:
        print_json(removed)
        return
    say(f"removed {removed.removed} result{'' if removed.removed == 1 else 's'}, {size_text(removed.bytes)}")


def age_text(seconds: float) -> str:
    """For people, in its largest unit: `3m`, `2d`; seconds below a minute."""
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"
