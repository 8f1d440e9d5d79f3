"""A trial of a transform: its first samples before and after, and whether running it in the store pays."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmill.cli.locations import Location, is_remote, locate
from shardmill.cli.output import count_text, say, size_text
from shardmill.cli.serve import check_server_is_installed
from shardmill.client import Client
from shardmill.client.shards import PICTURES, StreamedSample, describe_field, describe_sample, read_stream
from shardmill.core.api import TransformInfo, TransformStatistics
from shardmill.core.errors import BadRequest
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import Spec

RECEIVE_SECONDS = 0.4e-9  # CPU that a trainer spends on a byte it receives: http.client and tar parsing, measured
WORTHWHILE = 0.2  # of the transform's CPU must be saved for a clear "pays"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found."""

    spec: str
    before: list[StreamedSample]
    after: list[StreamedSample]
    first_byte: float
    """Seconds until the first bytes came."""
    seconds: float
    """Until the last."""
    costs: TransformStatistics
    """Of these samples only."""

    @property
    def bytes_in(self) -> int:
        return sum(sample.size for sample in self.before)

    @property
    def bytes_out(self) -> int:
        return sum(sample.size for sample in self.after)

    @property
    def cpu_seconds(self) -> float:
        """Of the worker, per sample that went in."""
        return cpu_seconds(self.costs) / max(1, len(self.before))

    @property
    def trainer_seconds(self) -> float:
        """CPU that a trainer would spend per sample that went in: it encodes nothing."""
        return (cpu_seconds(self.costs) - self.costs.seconds_encode) / max(1, len(self.before))

    @property
    def saved_seconds(self) -> float:
        """CPU that the trainer saves per sample: that work, less what it costs to receive more bytes."""
        more = max(0, self.bytes_out - self.bytes_in) / max(1, len(self.before))
        return self.trainer_seconds - more * RECEIVE_SECONDS

    @property
    def pays(self) -> bool:
        return self.saved_seconds > WORTHWHILE * self.trainer_seconds

    @property
    def gives_pictures(self) -> bool:
        """Whether the trainer has to decode what it gets."""
        return any(name.rpartition(".")[2] in PICTURES for sample in self.after for name in sample.fields)

    def report(self) -> dict[str, Any]:
        """For machines."""
        return {
            "transform": self.spec,
            "samples_in": len(self.before),
            "samples_out": len(self.after),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "first_byte_seconds": self.first_byte,
            "seconds": self.seconds,
            "cpu_seconds_per_sample": self.cpu_seconds,
            "saved_seconds_per_sample": self.saved_seconds,
            "pays": self.pays,
            "samples": [
                {"key": sample.key, "fields": {k: _field_report(k, v) for k, v in sample.fields.items()}}
                for sample in self.after
            ],
        }


@contextlib.contextmanager
def shard_at(shard: str, endpoint: str | None) -> Iterator[Location]:
    """The shard at a node; a local file gets a private node for as long as this lasts."""
    if is_remote(shard):
        location = locate(shard, endpoint)
        if location.transform is not None:
            raise BadRequest(f"{shard} is transformed already; name the plain shard")
        yield location
        return
    path = Path(shard).absolute()
    if not path.is_file():
        raise BadRequest(f"{shard}: no such file; give a .tar file or the URI of a shard at a node")
    check_server_is_installed()
    from shardmill.testing.node import running_node

    say(f"starting a private node for {path.name}")
    with running_node("--bucket", f"ais://local=dir:{path.parent}") as node, Client(node.endpoint) as client:
        yield Location(client, ObjectRef.parse(f"ais://local/{path.name}"))


def run_trial(location: Location, info: TransformInfo, *, samples: int, seed: int | None) -> Trial:
    """Read the first samples as they are, then through the transform."""
    transforms = location.client.transforms
    with location.open() as reader:
        before = list(itertools.islice(read_stream(reader), samples))
    if not before:
        raise BadRequest(f"{location} has no samples")
    spec = str(Spec.parse(info.uuid).with_options(seed=seed, count=len(before)))
    earlier = transforms.statistics(info.uuid)
    began = time.monotonic()
    with location.handle.get(spec) as reader:
        first_byte = time.monotonic() - began
        after = list(read_stream(reader))
    seconds = time.monotonic() - began
    costs = difference(transforms.statistics(info.uuid), earlier)
    return Trial(spec, before, after, first_byte, seconds, costs)


def print_trial(trial: Trial) -> None:
    """Samples before and after, then what they cost."""
    after = {sample.key: sample for sample in trial.after}
    given = {sample.key: _take_outputs(sample.key, after) for sample in trial.before}
    for sample in trial.before:
        print("\n".join(describe_sample(sample)))
        if not given[sample.key]:
            print("  -> nothing under this key" if after else "  -> nothing")
        for output in given[sample.key]:
            key, *lines = describe_sample(output)
            if key != sample.key:
                print(f"  -> {key}")
            for line in lines:
                print(f"  ->{line}")
    # Under keys of the function's own.
    for sample in after.values():
        print("\n".join(["-> " + line if number == 0 else line for number, line in enumerate(describe_sample(sample))]))
    count = len(trial.before)
    print()
    print(f"{count_text(count, 'sample')} in, {len(trial.after)} out, through {trial.spec}")
    print(f"bytes per sample: {size_text(trial.bytes_in // count)} in, {size_text(trial.bytes_out // count)} out")
    print(
        f"time: first byte after {trial.first_byte * 1000:.0f} ms, all after {trial.seconds * 1000:.0f} ms "
        f"({trial.seconds * 1000 / count:.1f} ms per sample)"
    )
    if trial.costs.samples:
        print(f"worker: {costs_text(trial.costs)}")
        print(_verdict(trial))


def _take_outputs(key: str, after: dict[str, StreamedSample]) -> list[StreamedSample]:
    """Take out what a sample became: one under its key, or several, to whose keys their positions are appended."""
    if key in after:
        return [after.pop(key)]
    numbered = itertools.takewhile(after.__contains__, (f"{key}-{index}" for index in itertools.count()))
    return [after.pop(name) for name in list(numbered)]


def costs_text(costs: TransformStatistics, noun: str = "sample") -> str:
    """Milliseconds of a worker per sample (or whole object), by part."""
    parts = {
        "read": costs.seconds_read,
        "decode": costs.seconds_decode,
        "function": costs.seconds_user,
        "encode": costs.seconds_encode,
    }
    samples = max(1, costs.samples)
    each = ", ".join(f"{name} {seconds / samples * 1000:.1f}" for name, seconds in parts.items())
    return f"{cpu_seconds(costs) / samples * 1000:.1f} ms per {noun} ({each})"


def save_picture(trial: Trial, path: str) -> None:
    """Write the pictures before and after as a PNG."""
    from shardmill.notebook import draw_before_after

    figure = draw_before_after(trial.before, trial.after)
    figure.savefig(path, dpi=100)


def _verdict(trial: Trial) -> str:
    saved, work = trial.saved_seconds * 1000, trial.trainer_seconds * 1000
    if trial.pays:
        decoding = ", less what decoding the pictures takes that it gets" if trial.gives_pictures else ""
        return (
            f"offloading pays: of {work:.1f} ms CPU per sample a trainer would save about {saved:.1f} ms{decoding}; "
            "shardmill bench measures both sides"
        )
    return (
        f"offloading does not pay: a trainer would save about {saved:.1f} ms of {work:.1f} ms CPU per sample, "
        "because more bytes must be received; return smaller types (uint8, a crop, a JPEG)"
    )


def _field_report(name: str, payload: bytes) -> dict[str, Any]:
    return {"size": len(payload), "content": describe_field(name, payload)}


def cpu_seconds(costs: TransformStatistics) -> float:
    """Of workers."""
    return costs.seconds_read + costs.seconds_decode + costs.seconds_user + costs.seconds_encode


def difference(later: TransformStatistics, earlier: TransformStatistics) -> TransformStatistics:
    """Totals of what happened in between."""
    return TransformStatistics(
        **{
            name: getattr(later, name) - getattr(earlier, name)
            for name in TransformStatistics.__struct_fields__
            if name != "bottleneck"
        }
    )
