"""`shardmill bench`: one function on both sides of the link, measured, and which side should run it.

What is compared are limits: cores by the CPU that a sample costs, the link by the bytes that it carries. Both hold on a
machine that does other work as well, where samples a second by the clock would not.
"""

import contextlib
import functools
import importlib.util
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from shardmill.cli import trying
from shardmill.cli.locations import EndpointOption, Location
from shardmill.cli.output import JsonOption, print_document, print_table, say, size_text
from shardmill.cli.transforms import ArgsOption, DecoderOption, EnvOption, parse_arguments
from shardmill.client.shards import StreamedSample, read_stream
from shardmill.config import available_cores
from shardmill.core.api import TransformInfo
from shardmill.core.errors import BadRequest, TransformFailed
from shardmill.core.specs import Spec
from shardmill.loader.local import LocalFunction

WORTHWHILE = 0.2  # of the CPU here must be saved; less is within the spread of a measurement
SLOWER_LINK = 0.8  # of the rate here; below it the link is what makes the store's side the slower one
SLOWER_NODE = 0.33  # of the rate here; above it a node with fewer cores than the trainer still frees the trainer's
WARM_SAMPLES = 8  # run first and not counted: starts the worker, fills what is remote

Side = Literal["store", "client"]
Function = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """One function over the same samples on both sides; what is in bytes or seconds is per source sample."""

    samples: int
    bytes_in: float
    """As stored."""
    bytes_out: float
    """As transformed."""
    link: float
    """Bytes a second from the node to this machine."""
    receive_in: float
    """CPU of this machine, to receive what is stored."""
    function: float
    """CPU of this machine, to decode it and to call the function."""
    receive_out: float
    """CPU of this machine, to receive what is transformed."""
    worker: float
    """Of a worker of the node, to read, decode, call the function and encode; by the clock."""
    rate: float
    """Transformed samples a second that came, by the clock, to one reader."""
    cores: int
    """Of this machine."""
    workers: int
    """Of the node."""

    @property
    def here(self) -> float:
        """CPU of this machine when the function runs on it."""
        return self.receive_in + self.function

    @property
    def client_limits(self) -> dict[str, float]:
        """Samples a second that each part would allow, the function running here."""
        return {"CPU here": _rate(self.cores, self.here), "the link": _rate(self.link, self.bytes_in)}

    @property
    def store_limits(self) -> dict[str, float]:
        """The same, the function running in the store."""
        return {
            "the node's workers": _rate(self.workers, self.worker),
            "the link": _rate(self.link, self.bytes_out),
            "CPU here": _rate(self.cores, self.receive_out),
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to run it, and why."""

    side: Side
    reason: str


def choose(found: Measured) -> Choice:
    """The side that gives more samples a second, and among equals the one that leaves the trainer its CPU."""
    client, store = min(found.client_limits.values()), found.store_limits
    part = min(store, key=store.__getitem__)
    if part == "the link" and store[part] < SLOWER_LINK * client:
        return Choice(
            "client",
            f"the link carries {store[part]:.0f} samples/s of what comes out "
            f"({size_text(round(found.bytes_out))} each), and this machine makes {client:.0f}/s of what is stored "
            f"({size_text(round(found.bytes_in))} each); a smaller output (uint8, a JPEG) may turn it",
        )
    if found.receive_out >= (1 - WORTHWHILE) * found.here:
        return Choice(
            "client",
            f"receiving what comes out costs {_ms(found.receive_out)} of CPU here per sample; receiving what is stored "
            f"and running the function costs {_ms(found.here)}",
        )
    if part == "the node's workers" and store[part] < SLOWER_NODE * client:
        return Choice(
            "client",
            f"the node's {_count(found.workers, 'worker')} can make {store[part]:.0f} samples/s, and the "
            f"{_count(found.cores, 'core')} here {client:.0f}/s; more workers may turn it",
        )
    return Choice("store", f"a sample then costs {_ms(found.receive_out)} of CPU here instead of {_ms(found.here)}")


def bench(
    function: Annotated[str, typer.Argument(metavar="FILE.py:FUNC", help="It runs in the store and in this process.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="URI or URL of a plain shard, or a local .tar.")],
    name: Annotated[str, typer.Option(metavar="N", help="Default: the function's own.")] = "",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="How many.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Of which the medians count.")] = 3,
    decoder: DecoderOption = "pil",
    args: ArgsOption = None,
    env: EnvOption = None,
    json: JsonOption = False,
    endpoint: EndpointOption = None,
) -> None:
    """Measure a function in the store and on this machine, and say which side should run it.

    Compares CPU per sample, bytes in and out, and the link between this machine and the node.
    """
    decoder = None if decoder == "none" else decoder
    arguments = parse_arguments(args)
    local = _load(function)
    if arguments:
        local = functools.partial(local, **arguments)
    with trying.shard_at(url, endpoint) as location:
        info = location.client.transforms.add(function, name, decoder=decoder, args=arguments, env=env, progress=say)
        if info.kind != "sample":
            raise BadRequest(f"{info.name} is of kind {info.kind}, and bench is for functions over samples")
        found = _measure(location, info, local, decoder, samples, rounds)
    choice = choose(found)
    if json:
        print_document(asdict(found) | {"side": choice.side, "reason": choice.reason})
        return
    print(f"{_count(found.samples, 'sample')} of {location}; the link carries {size_text(round(found.link))}/s")
    print()
    print_table(("per sample", "in the store", "here"), _cells(found), right=(1, 2))
    print()
    print(f"run it {'in the store' if choice.side == 'store' else 'on the client'}: {choice.reason}")


def _load(target: str) -> Function:
    """The function, from its file, for this process.

    Raises:
        BadRequest: There is none, or it needs what this interpreter does not have.
        TransformFailed: The file's own code raised.
    """
    path, _, name = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("benched", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise BadRequest(f"{target!r} is not of the form FILE.py:FUNC with a file that exists")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BadRequest(
            f"{path} cannot run here ({error}); use the trainer's interpreter: PYTHON -m shardmill.cli bench …"
        ) from error
    except Exception as error:
        raise TransformFailed(f"{path}: {type(error).__name__}: {error}", traceback=traceback.format_exc()) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadRequest(f"{path} has no function {name!r}")
    return cast(Function, function)


def _measure(
    location: Location, info: TransformInfo, local: Function, decoder: str | None, samples: int, rounds: int
) -> Measured:
    """Both sides in turn, so that what else the machine does falls on both."""
    plain, _, _ = _receive(location, None, samples)
    if not plain:
        raise BadRequest(f"{location} has no samples")
    stored = sum(sample.size for sample in plain)
    _call(location, local, decoder, plain[:WARM_SAMPLES])
    _receive(location, str(Spec.parse(info.uuid).with_options(count=min(WARM_SAMPLES, len(plain)))), samples)

    transforms, spec = location.client.transforms, str(Spec.parse(info.uuid).with_options(count=len(plain)))
    taken, bytes_out = [], 0
    for _ in range(rounds):
        link = _link_rate(location, stored)
        receive_in = _receive(location, None, len(plain))[1]
        function = _call(location, local, decoder, plain)
        earlier = transforms.statistics(info.uuid)
        given, receive_out, seconds = _receive(location, spec, None)
        costs = trying.difference(transforms.statistics(info.uuid), earlier)
        if not costs.samples:
            raise BadRequest(
                f"the node gave kept results of {info.uuid}, so what they cost was not seen; remove them first: "
                f"shardmill transform results rm {info.name}"
            )
        bytes_out = sum(sample.size for sample in given)
        worker = trying.cpu_seconds(costs) / costs.samples
        taken.append((link, receive_in, function, receive_out, worker, seconds))
    link, receive_in, function, receive_out, worker, seconds = map(statistics.median, zip(*taken, strict=True))
    return Measured(
        samples=len(plain),
        bytes_in=stored / len(plain),
        bytes_out=bytes_out / len(plain),
        link=link,
        receive_in=receive_in / len(plain),
        function=function / len(plain),
        receive_out=receive_out / len(plain),
        worker=worker,
        rate=len(plain) / seconds,
        cores=available_cores(),
        workers=location.client.config().workers,
    )


def _receive(location: Location, spec: str | None, samples: int | None) -> tuple[list[StreamedSample], float, float]:
    """The first samples, with the CPU seconds of this thread and those by the clock."""
    began, cpu = time.perf_counter(), time.thread_time()
    with location.handle.get(spec) as reader:
        found = list(itertools.islice(read_stream(reader), samples))
    return found, time.thread_time() - cpu, time.perf_counter() - began


def _call(location: Location, function: Function, decoder: str | None, samples: Sequence[StreamedSample]) -> float:
    """CPU seconds of this process for what a trainer does with samples that it has received."""
    with contextlib.closing(LocalFunction(function, decoder, seed=0)) as twin:
        cpu = time.process_time()
        for ordinal, sample in enumerate(samples):
            twin.call(location.ref, 0, ordinal, sample.key, sample.fields)
        return time.process_time() - cpu


def _link_rate(location: Location, size: int) -> float:
    began = time.perf_counter()
    received = len(location.handle.get_range(0, size))
    return received / (time.perf_counter() - began)


def _cells(found: Measured) -> list[tuple[str, str, str]]:
    """The comparison as rows of a table."""
    store, client = found.store_limits, found.client_limits
    return [
        ("CPU here", _ms(found.receive_out), _ms(found.here)),
        ("time of the node's worker", _ms(found.worker), "-"),
        ("bytes over the link", size_text(round(found.bytes_out)), size_text(round(found.bytes_in))),
        ("samples/s that one reader got", f"{found.rate:.0f}", "-"),
        ("samples/s at most", f"{min(store.values()):.0f}", f"{min(client.values()):.0f}"),
        ("limited by", min(store, key=store.__getitem__), min(client, key=client.__getitem__)),
    ]


def _rate(capacity: float, each: float) -> float:
    return capacity / each if each > 0 else float("inf")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
