"""Whole objects and pipelines through a real node: registered by the client and its command, read by any HTTP client."""

import functools
import gzip
import http.client
import json
import os
import random
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from shardmill import Client, Pipeline, WDTransform, transform
from shardmill.client.refusals import CannotShip
from shardmill.client.shards import StreamedSample, read_stream
from shardmill.client.transforms import Part
from shardmill.core.api import Kind
from shardmill.core.errors import BadRequest, TransformFailed, TransformNotFound
from shardmill.core.specs import Spec
from tests.client.test_transforms import IMAGENET, SHARD

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def shard(shards: Path) -> bytes:
    return (shards / SHARD).read_bytes()


def whole(client: Client, uuid: str, key: str = SHARD, **options: int) -> bytes:
    return client.bucket(IMAGENET).object(key).read(uuid, **options)


def fetch(url: str, method: str = "GET", **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=60)


def reverse(data: bytes) -> bytes:
    return data[::-1]


@transform(kind="stream", name="kinds-copy")
def copy(reader: Any, writer: Any, times: int = 1) -> None:
    for _ in range(times):
        reader.seek(0)
        while data := reader.read(1 << 16):
            writer.write(data)


@transform(kind="bytes", by_path=True)
def measure(path: str) -> bytes:
    import os

    return f"{os.path.basename(path)} {os.path.getsize(path)}".encode()


def test_bytes_of_a_registered_function_and_command_equal_those_at_home(client: Client, shard: bytes) -> None:
    reversed_ = client.transforms.add(reverse, kind="bytes", name="kinds-reverse")
    assert whole(client, reversed_.uuid) == shard[::-1]
    assert whole(client, client.transforms.add(copy, args={"times": 2}).uuid) == shard * 2
    assert whole(client, client.transforms.add(measure).uuid) == f"{SHARD} {len(shard)}".encode()
    zipped = client.transforms.add_command(["gzip", "-nc", "-{level}"], args={"level": 1}, name="kinds-gzip")
    expected = subprocess.run(["gzip", "-nc1"], input=shard, capture_output=True, check=True).stdout
    assert whole(client, zipped.uuid) == expected
    assert (zipped.kind, zipped.label, zipped.python) == ("command", "gzip -nc '-{level}'", "")


def test_other_arguments_of_a_command_are_another_version(client: Client) -> None:
    argv = ["sh", "-c", "echo {word} {{name}}"]
    one, two = (client.transforms.add_command(argv, "kinds-echo", args={"word": word}) for word in ("one", "two words"))
    assert Spec.parse(one.uuid).digest == Spec.parse(two.uuid).digest
    assert one.uuid != two.uuid
    assert whole(client, one.uuid) == b"one {name}\n"
    assert whole(client, two.uuid) == b"two words {name}\n"


def test_the_answer_says_what_the_objects_name_says(client: Client, node: Any, shard: bytes) -> None:
    info = client.transforms.add_command(["cat"], "kinds-cat")
    bucket = client.bucket("ais://pool")
    for key, kind in {
        "k/photo.jpg": "image/jpeg",
        "k/data.bin": "application/octet-stream",
        "k/none": "application/octet-stream",
        "k/x.tar": "application/x-tar",
    }.items():
        bucket.object(key).put(b"content of " + key.encode())
        with fetch(client.object_url("ais://pool", key, info.uuid)) as answer:
            assert answer.headers["Content-Type"] == kind
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert answer.read() == b"content of " + key.encode()


def test_a_finished_result_has_length_etag_and_ranges(client: Client, shard: bytes) -> None:
    info = client.transforms.add(reverse, kind="bytes", name="kinds-kept")
    url = client.object_url(IMAGENET, SHARD, info.uuid, seed=5)
    with fetch(url) as answer:
        assert answer.read() == shard[::-1]
    with fetch(url, Range="bytes=100-299") as answer:
        assert answer.status == 206
        assert answer.read() == shard[::-1][100:300]
        etag = answer.headers["ETag"]
    with fetch(url, "HEAD") as answer:
        assert (answer.headers["Content-Length"], answer.headers["ETag"]) == (str(len(shard)), etag)
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(url, **{"If-None-Match": etag})
    caught.value.close()
    assert caught.value.code == 304


@pytest.mark.parametrize("options", [{"start": 1}, {"count": 2}])
def test_options_about_samples_are_refused_for_whole_objects(client: Client, options: dict[str, int]) -> None:
    info = client.transforms.add(copy)
    with pytest.raises(BadRequest, match=f"'stream' and has no samples; leave out {next(iter(options))}"):
        with client.bucket(IMAGENET).object(SHARD).get(info.uuid, **options):
            pass
    with pytest.raises(BadRequest, match="has no samples; leave out errors"):
        whole(client, f"{info.uuid},errors=skip:0.1")


def test_a_failing_command_raises_with_its_words(client: Client) -> None:
    info = client.transforms.add_command(["gzip", "-dc"], "kinds-gunzip")
    with pytest.raises(TransformFailed, match="gzip exited with status 1: gzip: stdin: not in gzip format"):
        whole(client, info.uuid)
    (failure, *_) = client.transforms.errors(info.uuid).failures
    assert failure.output == "gzip: stdin: not in gzip format"


def test_a_command_that_fails_midway_is_cut_and_explained(client: Client) -> None:
    script = "cat; echo too bad >&2; exit 9"
    client.bucket("ais://pool").object("k/large").put(os.urandom(2 << 20))
    info = client.transforms.add_command(["sh", "-c", script], "kinds-cut")
    with pytest.raises(TransformFailed, match="sh exited with status 9: too bad"):
        client.object("ais://pool/k/large").read(info.uuid)
    with pytest.raises(TransformFailed, match="not found in"):
        client.transforms.add_command(["no-such-command-x"])
    # As the many see it that do not speak shardmill: a body without its end.
    with fetch(client.object_url("ais://pool", "k/large", info.uuid)) as answer:
        with pytest.raises(http.client.IncompleteRead):
            answer.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "object"}, "no kind of function; known: sample, bytes, stream"),
        ({"kind": "command"}, "no kind of function"),
        ({"kind": "bytes", "decoder": "rgb"}, "decoder is of kind 'sample'"),
        ({"kind": "bytes", "fields": ["jpg"]}, "fields are of kind 'sample'"),
        ({"kind": "stream", "by_path": True}, "by_path is of kind 'bytes'"),
        ({"by_path": True}, "by_path is of kind 'bytes'"),
    ],
)
def test_options_of_another_kind_are_refused(client: Client, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        client.transforms.add(reverse, "kinds-refused", **options)
    assert message in caught.value.message


def test_wd_transform_is_for_samples(client: Client) -> None:
    with pytest.raises(BadRequest, match="not of kind 'stream': use"):
        WDTransform(client, copy)


def test_a_command_line_is_checked_before_it_is_sent() -> None:
    offline = Client("http://127.0.0.1:1")
    for argv, message in [
        ([], "sequence of strings"),
        ("gzip -c", "sequence of strings"),
        (["./tool"], "neither a plain name"),
        (["echo", "{nme}"], "which nothing stands for"),
    ]:
        with pytest.raises(BadRequest, match=message):
            offline.transforms.add_command(argv, "t")


# Pipelines.


def halve(sample: Sample) -> Sample:
    image = sample["jpg"]
    sample["jpg"] = image.resize((image.width // 2, image.height // 2))
    return sample


def brighten(sample: Sample, by: int = 10) -> Sample:
    noise = random.randrange(3)
    sample["jpg"] = sample["jpg"].point(lambda value: min(255, value + by + noise))
    sample["json"] = {"noise": noise, "size": sample["jpg"].size}
    return sample


def both(sample: Sample) -> Sample:
    return brighten(halve(sample))


def twice(sample: Sample) -> Any:
    for number in range(2):
        yield {**sample, "json": {"number": number}}


def odd_only(sample: Sample) -> Sample | None:
    return sample if sample["__key__"].endswith("1") else None


def samples(client: Client, uuid: str, **options: int) -> list[StreamedSample]:
    with client.bucket(IMAGENET).object(SHARD).get(uuid, **options) as reader:
        return list(read_stream(reader))


def test_a_pipeline_gives_the_bytes_of_the_composed_function(client: Client) -> None:
    one, two = WDTransform(client, halve, seed=3), WDTransform(client, brighten, "kinds-brighten")
    pipeline = one >> two
    assert isinstance(pipeline, Pipeline)
    assert pipeline.name == "halve.kinds-brighten"
    assert str(Spec.parse(pipeline.uuid).errors) == "skip:0.01"
    assert Spec.parse(pipeline.uuid).seed == 3
    # Had a picture been encoded in between, its pixels would be others.
    composed = WDTransform(client, both, seed=3)
    assert whole(client, pipeline.uuid) == whole(client, composed.uuid)


def test_parts_are_named_by_handles_specs_and_registrations(client: Client) -> None:
    first = WDTransform(client, halve)
    second = client.transforms.add(brighten, "kinds-brighten", args={"by": 20})
    ways = [first >> second, first >> second.uuid, first.uuid >> WDTransform(client, twice), second >> first]
    assert ways[0].uuid == ways[1].uuid
    assert ways[0].info.parts == [first.info.uuid, second.uuid]
    assert len({way.info.digest for way in ways}) == 3
    other = first >> client.transforms.add(brighten, "kinds-brighten", args={"by": 30})
    assert other.info.digest != ways[0].info.digest
    assert whole(client, other.uuid, seed=1) != whole(client, ways[0].uuid, seed=1)
    named = client.transforms.add_pipeline([first, second], "kinds-both")
    assert (named.name, named.digest) == ("kinds-both", ways[0].info.digest)


def test_a_pipeline_of_a_pipeline_is_that_of_all_their_parts(client: Client) -> None:
    one, two, three = WDTransform(client, halve), WDTransform(client, twice), WDTransform(client, odd_only)
    left, right, flat = (one >> two) >> three, one >> (two >> three), Pipeline(client, [one, two, three])
    assert left.info.digest == right.info.digest == flat.info.digest
    assert len(flat.info.parts) == 3
    made = samples(client, flat.uuid)
    assert made
    assert all(sample.key.endswith("-1") and json.loads(sample.fields["json"]) == {"number": 1} for sample in made)


def test_what_fans_out_or_is_dropped_goes_on_or_not(client: Client) -> None:
    fanned = WDTransform(client, twice) >> WDTransform(client, twice)
    keys = [sample.key for sample in samples(client, fanned.uuid, count=1)]
    (plain,) = [sample.key for sample in samples(client, WDTransform(client, halve).uuid, count=1)]
    assert keys == [f"{plain}-{outer}-{inner}" for outer in range(2) for inner in range(2)]
    dropped = WDTransform(client, lambda sample: None, "kinds-none") >> WDTransform(client, twice)
    assert samples(client, dropped.uuid) == []


def test_a_pipelines_failures_are_its_own(client: Client) -> None:
    def refuse(sample: Sample) -> Sample:
        raise ValueError("refused " + "here")

    pipeline = WDTransform(client, halve) >> WDTransform(client, refuse, "kinds-refuse")
    with pytest.raises(TransformFailed, match="refused here") as caught:
        whole(client, pipeline.uuid)
    assert caught.value.traceback is not None
    assert "in refuse" in caught.value.traceback
    assert pipeline.errors().total > 0
    assert pipeline.statistics().samples == 0


def test_a_pipeline_outlives_its_parts(client: Client) -> None:
    one = WDTransform(client, halve, "kinds-gone")
    pipeline = one >> WDTransform(client, brighten, "kinds-brighten", seed=1)
    expected = whole(client, pipeline.uuid)
    client.transforms.remove("kinds-gone")
    assert whole(client, pipeline.uuid, epoch=1) != expected
    with pytest.raises(TransformNotFound):
        client.transforms.add_pipeline([one, one])


def test_functions_over_bytes_follow_one_another(client: Client, shard: bytes) -> None:
    def squeeze(data: bytes, ref: str) -> bytes:
        return gzip.compress(ref.encode() + data, mtime=0)

    parts = [client.transforms.add(measure, "kinds-measure"), client.transforms.add(squeeze, kind="bytes")]
    info = client.transforms.add_pipeline(parts)
    assert info.kind == "bytes"
    assert gzip.decompress(whole(client, info.uuid)) == f"{IMAGENET}/{SHARD}{SHARD} {len(shard)}".encode()
    bad = client.transforms.add(lambda data: "text", "kinds-text", kind="bytes")
    with pytest.raises(TransformFailed, match="returned str; return the output as bytes"):
        whole(client, client.transforms.add_pipeline([bad, parts[1]]).uuid)


def test_parts_that_cannot_follow_one_another_are_refused(client: Client) -> None:
    first = client.transforms.add(halve)
    raw = client.transforms.add(twice, "kinds-raw", decoder=None)
    whole_bytes = client.transforms.add(reverse, "kinds-reverse", kind="bytes")
    command = client.transforms.add_command(["cat"], "kinds-cat")
    path = client.transforms.add(measure, "kinds-measure")
    cases: list[tuple[list[Part], str]] = [
        ([first], "at least two parts, not 1"),
        ([first, raw], "differ in decoder, fields or allow_pickle"),
        ([first, whole_bytes], "'sample', .* 'bytes'"),
        ([whole_bytes, command], "all of kind 'sample' or all of kind 'bytes'"),
        ([whole_bytes, path], "can only be the first part"),
        ([first.name, first.uuid], "names no version"),
    ]
    for parts, message in cases:
        with pytest.raises(BadRequest, match=message):
            client.transforms.add_pipeline(parts, "kinds-refused")
    with pytest.raises(BadRequest, match="different seeds"):
        WDTransform(client, halve, seed=1) >> WDTransform(client, twice, seed=2)


def test_a_function_that_cannot_be_called_as_it_will_be_is_refused_at_once(client: Client) -> None:
    def pair(left: Any, right: Any) -> Any:
        return left

    def scale(data: bytes, width: int, *, ref: str) -> bytes:
        return data * width

    @functools.wraps(pair)
    def wrapper(sample: Any) -> Any:
        return pair(sample, 1)

    add = client.transforms.add
    with pytest.raises(
        BadRequest, match=r"`pair` cannot be called with a sample: missing a required argument: 'right'"
    ):
        add(pair)
    with pytest.raises(BadRequest, match=r"`scale` .* the object and args widht: missing a required argument: 'width'"):
        add(scale, kind="bytes", args={"widht": 2})
    with pytest.raises(BadRequest, match=r"`<lambda>` .* reader and writer: too many positional arguments"):
        add(lambda reader: None, "kinds-reading", kind="stream")
    add(pair, "kinds-files", kind="stream")
    add(pair, "kinds-given", args={"right": 2})
    add(scale, "kinds-scaled", kind="bytes", args={"width": 2})
    add(wrapper, "kinds-wrapped")
    add(functools.partial(pair, 1), "kinds-partial")
    add(len, "kinds-builtin")


FILE = """
import functools
from shardmill import transform

def pair(left, right):
    return left

@transform(kind="bytes")
def scale(data, width, /, *more, ref, **others):
    return data * width

def defaults(sample, level=1, *, deep=2):
    return sample

async def later(sample):
    return sample

@functools.lru_cache
def wrapped(left, right):
    return left

if functools:
    def chosen(sample):
        return sample
else:
    def chosen(left, right):
        return left

class Callable:
    def __new__(cls, sample):
        return sample

class Mine:
    def transform(size):
        return lambda function: lambda sample: function(sample, size)

@Mine.transform(3)
def sized(sample, size):
    return sample
"""


def test_a_function_of_a_file_that_cannot_be_called_as_it_will_be_is_refused_at_once(
    client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FILE)

    def add(function: str, kind: Kind | None = None, **args: object) -> None:
        client.transforms.add(f"{file}:{function}", f"kinds-of-file-{function.lower()}", kind=kind, args=args or None)

    with pytest.raises(
        BadRequest, match=r"`pair` cannot be called with a sample: missing a required argument: 'right'"
    ):
        add("pair")
    with pytest.raises(BadRequest, match=r"`scale` cannot .* the object: missing a required argument: 'width'"):
        add("scale")
    with pytest.raises(BadRequest, match=r"`defaults` .* a sample and args wide: got an unexpected keyword"):
        add("defaults", wide=1)
    with pytest.raises(CannotShip, match=r"`later` is async"):
        add("later")
    add("pair", "stream")
    add("pair", right=2)
    add("defaults", deep=1)
    # Its decorator is its own, whatever its name.
    add("sized")
    # What a decorator makes of it, what is chosen as the file is run, and classes are not known here.
    add("wrapped", "stream")
    add("chosen")
    add("Callable")


def test_a_pipeline_is_probed_as_a_whole(client: Client) -> None:
    drawing = Pipeline(
        client,
        [WDTransform(client, halve), WDTransform(client, brighten, "kinds-brighten")],
        probe=f"{IMAGENET}/{SHARD}",
    )
    still = Pipeline(client, [WDTransform(client, halve), WDTransform(client, twice)], probe=f"{IMAGENET}/{SHARD}")
    assert drawing.info.probe is not None
    assert still.info.probe is not None
    assert (drawing.info.probe.deterministic, drawing.info.probe.reproducible) == (False, True)
    assert still.info.probe.deterministic


def test_marks_say_the_kind(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "marked.py"
    file.write_text(
        'import shardmill\n\n@shardmill.transform(kind="bytes", by_path=True, name="kinds-marked")\n'
        "def size(path, unit=1):\n    import os\n    return str(os.path.getsize(path) // unit).encode()\n"
    )
    info = client.transforms.add(f"{file}:size", args={"unit": 10})
    assert (info.name, info.kind, info.by_path) == ("kinds-marked", "bytes", True)
    with client.bucket(IMAGENET).object(SHARD).get() as reader:
        assert whole(client, info.uuid) == str(reader.meta.size // 10).encode()
