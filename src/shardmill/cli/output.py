"""How commands speak: tables or JSON lines on standard output, words and progress on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

import msgspec
import typer

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]

Advance = Callable[[int], None]
"""Called with the bytes that have just gone through."""


def say(text: str) -> None:
    """Words, to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:  # whatever msgspec can encode
    """One line of JSON, to standard output."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_document(value: Any) -> None:  # whatever msgspec can encode
    """JSON for reading, to standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell; without headings when there is no row.

    Args:
        headings: Of the columns.
        rows: Cells.
        right: Columns that are aligned to the right.
    """
    if not rows:
        return
    lines = [[heading.upper() for heading in headings], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def size_text(size: int) -> str:
    """Bytes for people: `512 B`, `1.5 MiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def count_text(count: int, noun: str) -> str:
    """`1 object`, `2 objects`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def time_text(seconds: float) -> str:
    """Local time to the second; empty for 0."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


@contextlib.contextmanager
def progress(label: str, total: int | None, *, shown: bool = True) -> Iterator[Advance]:
    """A bar of bytes on a terminal's standard error; nothing anywhere else.

    Args:
        label: What is going on.
        total: Bytes in all, if known.
        shown: False: none, even on a terminal.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)


def summary(verb: str, objects: int, size: int, began: float) -> str:
    """`got 6 objects, 12.0 MiB in 0.1 s (120.0 MiB/s)`."""
    seconds = max(time.monotonic() - began, 1e-9)
    speed = f"{size_text(int(size / seconds))}/s"
    return f"{verb} {count_text(objects, 'object')}, {size_text(size)} in {seconds:.1f} s ({speed})"
