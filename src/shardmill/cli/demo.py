"""`demo`: the whole story on one machine, with a picture at the end.

A real node is started as a child process, and stopped again however the command ends.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from shardmill.cli.output import count_text, say, size_text
from shardmill.cli.plain_reading import PlainShard
from shardmill.cli.serve import check_server_is_installed
from shardmill.cli.trying import costs_text, difference
from shardmill.client import Client
from shardmill.client.shards import StreamedSample
from shardmill.core.api import TransformStatistics
from shardmill.core.errors import BadRequest
from shardmill.testing.node import NodeFailed, RunningNode, running_node

if TYPE_CHECKING:
    from shardmill.cli.contact_sheet import Row

BUCKET = "ais://demo"
TRANSFORM = Path(__file__).with_name("train_transform.py")
NAME = "imagenet-train"
ERRORS = "errors=skip:0.01"  # what WDTransform takes by itself: a bad picture is one bad picture
SEED = 1
MAX_SAMPLES = 480  # that are read of somebody's own shards
EPOCHS = 3  # draws of each picture on the sheet
ROWS = 12  # pictures on it
LOOKED_AT = 120  # samples among which they are chosen
PICTURE_FIELDS = ("jpg", "jpeg", "png", "webp")  # as the transform has them


@dataclass(frozen=True, slots=True)
class Stock:
    """Shards to be served."""

    directory: Path
    shards: list[str]
    classes: list[str]
    """Names by label; empty where they are not known."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How reading the transformed shards went."""

    samples: int
    seconds: float
    first_byte: float
    """Seconds from the first request to the first byte of its body."""
    received: int
    """Bytes."""
    costs: TransformStatistics


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the picture and the packed shards go.")] = Path(
        "demo-out"
    ),
    shards: Annotated[Path | None, typer.Option(metavar="DIR", help="Serve these shards instead.")] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pack these pictures instead; their directories are the classes.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the node running until Ctrl-C.")] = False,
) -> None:
    """Transform real photographs in a store, and draw them.

    A node of its own serves them; the picture shows them before and after. The photographs come with scikit-image,
    which the extra `demo` brings; nothing is downloaded.
    """
    check_server_is_installed()
    if shards is not None and images is not None:
        raise BadRequest("--shards and --images exclude each other")
    with _ended_by_signals():
        _make_writable(out)
        stock = _stock(out, shards, images)
        with running_node("--bucket", f"{BUCKET}=dir:{stock.directory.absolute()}") as node:
            with Client(node.endpoint) as client:
                _show(client, stock, out / "before-after.png")
            if keep:
                _keep_running(node, stock)
    if not keep:
        say("the node is stopped again; with --keep it stays, to be tried")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does; a second signal does not cut the tidying up short."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _is_heeded(number)]

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heeded(number: signal.Signals) -> bool:
    """Whether the signal ends this process; nohup and shells' background jobs have some of them ignored."""
    return signal.getsignal(number) != signal.SIG_IGN


def _make_writable(out: Path) -> None:
    """Fail before any work is done, not after it."""
    if out.exists() and not out.is_dir():
        raise BadRequest(f"--out {out} is a file; name a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadRequest(f"--out {out}: {error.strerror}; name a directory that can be written") from None


def _stock(out: Path, shards: Path | None, images: Path | None) -> Stock:
    if shards is not None:
        if not shards.is_dir():
            raise BadRequest(f"--shards {shards}: no such directory")
        names = sorted(path.name for path in shards.glob("*.tar"))
        if not names:
            raise BadRequest(f"--shards {shards}: no .tar files in it")
        return Stock(shards, names, [])
    from shardmill.cli import photographs

    began = time.monotonic()
    if images is None:
        packed = photographs.pack_photographs(out / "shards")
    else:
        packed = photographs.pack_pictures(images, out / "shards")
    classes = f"{len(packed.classes)} {'class' if len(packed.classes) == 1 else 'classes'}"
    say(
        f"packed {count_text(packed.pictures, 'picture')} of {classes} into {count_text(len(packed.shards), 'shard')} "
        f"in {time.monotonic() - began:.1f} s: {size_text(packed.size)} in {packed.directory}"
    )
    return Stock(packed.directory, packed.shards, packed.classes)


def _show(client: Client, stock: Stock, path: Path) -> None:
    """Register the transform, read everything through it, and draw the picture."""
    first = stock.shards[0]
    chosen = _choose(client.object_url(BUCKET, first))
    if not chosen:
        raise BadRequest(
            f"{stock.directory / first} has no pictures ({', '.join(PICTURE_FIELDS)}) in its first samples"
        )
    say(f"a node serves {stock.directory} as {BUCKET} at {client.endpoint}")
    info = client.transforms.add(
        f"{TRANSFORM}:train_transform", NAME, probe=client.bucket(BUCKET).object(first), progress=say
    )
    spec = f"{info.uuid},{ERRORS}"
    say(f"registered {info.uuid} from {TRANSFORM.name}; reading through it")
    reading = _read(client, stock, spec)
    _report(reading, client, client.object_url(BUCKET, first, spec, seed=SEED))
    rows = _rows(client, first, spec, chosen, stock.classes)
    if not rows:
        raise BadRequest(f"{spec} gave none of the pictures that were to be drawn")
    from shardmill.cli import contact_sheet

    sheet = contact_sheet.draw_sheet(
        rows,
        title="Stored, and as read through a URL",
        lines=[
            f"/t/{BUCKET.replace('://', '/')}/{info.uuid},seed={SEED},epoch=1...{EPOCHS}~{first}",
            "random crop, resized to 224x224, mirrored half of the time, normalised to float32 (undone here)",
        ],
        headings=["stored", *(f"epoch {epoch}" for epoch in range(1, EPOCHS + 1))],
    )
    contact_sheet.save_sheet(sheet, path)
    print(f"before and after: {path}", flush=True)


def _choose(url: str) -> dict[str, StreamedSample]:
    """Samples to be drawn, by key: as many classes as there are, then more of them in the shard's order."""
    by_class: dict[bytes, list[StreamedSample]] = {}
    with contextlib.closing(PlainShard(url).samples()) as samples:
        for _, sample in zip(range(LOOKED_AT), samples, strict=False):
            if any(field in sample.fields for field in PICTURE_FIELDS):
                by_class.setdefault(sample.fields.get("cls", b""), []).append(sample)
    ranked = [(rank, sample) for found in by_class.values() for rank, sample in enumerate(found)]
    ranked.sort(key=lambda item: item[0])
    return {sample.key: sample for _, sample in ranked[:ROWS]}


def _read(client: Client, stock: Stock, spec: str) -> Reading:
    """Read all shards, or the first so many samples of them, one after another."""
    earlier = client.transforms.statistics(spec)
    samples = received = 0
    first_byte: float | None = None
    began = time.monotonic()
    for name in stock.shards:
        if samples >= MAX_SAMPLES:
            break
        shard = PlainShard(client.object_url(BUCKET, name, spec, seed=SEED, count=MAX_SAMPLES - samples))
        samples += sum(1 for _ in shard.samples())
        received += shard.received
        first_byte = shard.first_byte if first_byte is None else first_byte
    seconds = time.monotonic() - began
    costs = difference(client.transforms.statistics(spec), earlier)
    return Reading(samples, seconds, first_byte or 0.0, received, costs)


def _report(reading: Reading, client: Client, url: str) -> None:
    costs, workers = reading.costs, client.config().workers
    lines = [
        url,
        f"  {reading.samples} samples in {reading.seconds:.2f} s: {reading.samples / reading.seconds:.0f} a second, "
        f"on {count_text(workers, 'core')}",
        f"  first byte after {reading.first_byte * 1000:.0f} ms",
        f"  {size_text(costs.bytes_in)} stored, {size_text(reading.received)} received",
        f"  worker: {costs_text(costs)}",
    ]
    if costs.failures:
        lines.append(f"  {costs.failures} samples failed and were left out")
    print("\n".join(lines), flush=True)


def _rows(
    client: Client, shard: str, spec: str, chosen: dict[str, StreamedSample], classes: Sequence[str]
) -> "list[Row]":
    """The chosen samples with what each epoch draws of them, without those that failed."""
    from shardmill.cli.contact_sheet import Draw, Row

    draws: dict[str, list[Draw]] = {key: [] for key in chosen}
    for epoch in range(1, EPOCHS + 1):
        url = client.object_url(BUCKET, shard, spec, seed=SEED, epoch=epoch, count=LOOKED_AT)
        for sample in PlainShard(url).samples():
            if sample.key in draws:
                draws[sample.key].append(Draw(sample.fields["npy"], sample.fields["crop.json"]))
    return [
        Row(_class_name(sample, classes), _picture(sample), draws[key])
        for key, sample in chosen.items()
        if len(draws[key]) == EPOCHS
    ]


def _class_name(sample: StreamedSample, classes: Sequence[str]) -> str:
    label = sample.fields.get("cls", b"").decode(errors="replace").strip()
    known = classes[int(label)] if label.isdecimal() and int(label) < len(classes) else ""
    return known or f"class {label}".strip()


def _picture(sample: StreamedSample) -> bytes:
    return next(sample.fields[field] for field in PICTURE_FIELDS if field in sample.fields)


def _keep_running(node: RunningNode, stock: Stock) -> None:
    """Say what can be tried, and wait for Ctrl-C."""
    shard = f"{BUCKET}/{stock.shards[0]}"
    url = f"{node.endpoint}/t/{BUCKET.replace('://', '/')}/{NAME}~{stock.shards[0]}"
    command = "shardmill" if shutil.which("shardmill") else os.path.relpath(sys.argv[0])
    print(
        f"\nthe node runs on until Ctrl-C; in another terminal:\n"
        f"  export SHARDMILL_ENDPOINT={node.endpoint}\n"
        f"  {command} ls -l --members {shard} | head -n 4\n"
        f"  {command} transform show {NAME}\n"
        f"  {command} transform try {os.path.relpath(TRANSFORM)}:train_transform {shard}\n"
        f"  curl -s '{url}' | tar -tvf - | head -n 6",
        flush=True,
    )
    try:
        status = node.process.wait()
    except KeyboardInterrupt:
        say("\nstopping the node")
        return
    raise NodeFailed(f"the node ended by itself with status {status}:\n{node.output}")
