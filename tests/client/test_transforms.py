"""Transforms of a real node, through the client: torch-free functions on real pictures."""

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardmill import Pipeline, WDTransform
from shardmill.client import Client
from shardmill.client.shards import StreamedSample, read_stream
from shardmill.client.shipping import CannotShip
from shardmill.core.errors import BadRequest, TransformFailed, TransformNotFound
from shardmill.core.specs import Spec
from shardmill.marking import transform
from shardmill.notebook import display_shard_images
from shardmill.testing.node import RunningNode
from tests.client.processes import run_python

IMAGENET = "gs://sharded-imagenet"
SHARD = "imagenet-train-000000.tar"
Sample = dict[str, Any]


def crop(sample: Sample) -> Sample:
    image = np.asarray(sample.pop("jpg").resize((64, 64)))
    left, top = random.randrange(32), random.randrange(32)
    sample["npy"] = image[top : top + 32, left : left + 32].astype(np.float32) / 255
    return sample


def fail_always(sample: Sample) -> Sample:
    raise ValueError("not " + "today")


def read(client: Client, uuid: str, **options: int) -> list[StreamedSample]:
    with client.bucket(IMAGENET).object(SHARD).get(uuid, **options) as reader:
        return list(read_stream(reader))


def test_a_registered_function_runs_on_every_sample(
    client: Client, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    etl = WDTransform(client, crop, transform_name="client-crop", verbose=True)
    assert capsys.readouterr().out == "Initializing ETL...\nETL client-crop successfully initialized\n"
    spec = Spec.parse(etl.uuid)
    assert (spec.name, len(spec.digest or ""), str(spec.errors)) == ("client-crop", 12, "skip:0.01")
    with client.bucket(IMAGENET).object(SHARD).get() as reader:
        source = list(read_stream(reader))
    made = read(client, etl.uuid)
    assert [sample.key for sample in made] == [sample.key for sample in source]
    assert all(sample.fields["cls"] == plain.fields["cls"] for sample, plain in zip(made, source, strict=True))
    array = np.load(io.BytesIO(made[0].fields["npy"]))
    assert (array.shape, array.dtype) == ((32, 32, 3), np.float32)
    assert etl.statistics().samples >= len(source)


def test_a_seed_repeats_and_a_drawn_seed_can_be_given_back(client: Client) -> None:
    etl = WDTransform(client, crop, transform_name="client-crop", seed=3)
    assert ",seed=3," in etl.uuid
    assert read(client, etl.uuid, count=5) == read(client, etl.uuid, count=5)
    assert read(client, etl.uuid, count=5) != read(client, etl.uuid, count=5, epoch=1)
    plain = WDTransform(client, crop, transform_name="client-crop", errors="fail")
    assert "," not in plain.uuid
    with client.bucket(IMAGENET).object(SHARD).get(plain.uuid, count=3) as reader:
        drawn, first = reader.seed, list(read_stream(reader))
    assert drawn is not None
    assert read(client, plain.uuid, count=3, seed=drawn) == first


def test_start_and_count_choose_samples_without_changing_them(client: Client) -> None:
    etl = WDTransform(client, crop, transform_name="client-crop", seed=1)
    assert read(client, etl.uuid, start=4, count=2) == read(client, etl.uuid, count=8)[4:6]


def test_a_failing_function_raises_with_its_own_traceback(client: Client) -> None:
    etl = WDTransform(client, fail_always)
    assert etl.name == "fail_always"
    with pytest.raises(TransformFailed, match="not today") as caught:
        read(client, etl.uuid)
    assert caught.value.traceback is not None
    assert Path(__file__).name in caught.value.traceback
    failures = etl.errors()
    assert failures.total >= 1
    assert failures.failures[0].object == SHARD


def test_a_probe_fails_at_registration_by_uri_url_and_handle(client: Client) -> None:
    handle = client.bucket(IMAGENET).object(SHARD)
    for probe in (handle, handle.uri, handle.url()):
        with pytest.raises(TransformFailed, match="not today") as caught:
            WDTransform(client, fail_always, transform_name="probed", probe=probe)
        assert "fail_always" in (caught.value.traceback or "")
    report = WDTransform(client, crop, transform_name="client-crop", probe=handle).info.probe
    assert report is not None
    assert (report.deterministic, report.reproducible) == (False, True)


def test_a_probe_warns_of_what_a_seed_does_not_cover(client: Client) -> None:
    def salt(sample: Sample) -> Sample:
        sample["txt"] = os.urandom(8).hex()
        return sample

    probe = f"{IMAGENET}/{SHARD}"
    with pytest.warns(UserWarning, match=r"salted@\w+ gives other bytes under the same seed") as caught:
        etl = WDTransform(client, salt, "salted", probe=probe)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="other bytes under the same seed") as caught:
        Pipeline(client, [etl, WDTransform(client, crop)], "salted-crop", probe=probe)
    assert [warning.filename for warning in caught] == [__file__]


def test_arguments_are_given_to_the_function(client: Client) -> None:
    def label(sample: Sample, *, prefix: str) -> Sample:
        sample["txt"] = prefix + sample["__key__"]
        return sample

    etl = WDTransform(client, label, args={"prefix": "p-"}, wd_decoder=None)
    made = read(client, etl.uuid, count=2)
    assert [sample.fields["txt"].decode() for sample in made] == [f"p-{sample.key}" for sample in made]


def test_marks_of_the_function_are_its_defaults(client: Client) -> None:
    @transform(name="marked-one", decoder=None, errors="skip:0.5")
    def marked(sample: Sample) -> Sample:
        assert isinstance(sample["jpg"], bytes)
        return sample

    etl = WDTransform(client, marked)
    assert etl.uuid.startswith("marked-one@")
    assert etl.uuid.endswith(",errors=skip:0.5")
    assert etl.info.decoder is None
    assert len(read(client, etl.uuid, count=3)) == 3


def test_a_function_of_a_file_is_registered_without_running_the_file(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def keep(sample):\n    sample['txt'] = 'kept'\n    return sample\n")
    info = client.transforms.add(f"{file}:keep", decoder=None)
    assert info.name == "keep"
    assert read(client, info.uuid, count=1)[0].fields["txt"] == b"kept"


def test_versions_are_listed_found_and_removed(client: Client) -> None:
    etl = WDTransform(client, lambda sample: sample, transform_name="short-lived")
    assert etl.info.uuid in [info.uuid for info in client.transforms.list()]
    assert client.transforms.get("short-lived").transform == etl.info
    assert client.transforms.get(etl.uuid).transform.digest == etl.info.digest
    client.transforms.remove(etl.uuid)
    with pytest.raises(TransformNotFound):
        client.transforms.get("short-lived")
    with pytest.raises(TransformNotFound):
        read(client, etl.uuid)


def test_wrong_calls_say_what_to_do(client: Client) -> None:
    with pytest.raises(BadRequest, match="a lambda has no name"):
        WDTransform(client, lambda sample: sample)
    with pytest.raises(BadRequest, match="--index-url"):
        WDTransform(client, crop, packages=["--index-url=http://127.0.0.1"])
    with pytest.raises(BadRequest, match="bad transform name"):
        WDTransform(client, crop, transform_name="No Such Name")
    with pytest.raises(BadRequest, match="neither 'fail' nor"):
        WDTransform(client, crop, errors="sometimes")
    with pytest.raises(CannotShip, match="a Client"):
        WDTransform(client, lambda sample: {**sample, "x": client.endpoint}, transform_name="captures")


def test_pictures_of_a_shard_raw_by_name_and_by_uuid(client: Client) -> None:
    etl = WDTransform(client, crop, transform_name="client-crop", seed=1)
    assert len(display_shard_images(client, IMAGENET, SHARD, objects=3).axes) == 3
    for name in ("client-crop", etl.uuid):
        figure = display_shard_images(client, IMAGENET, SHARD, objects=2, etl_name=name)
        pictures = [axes.get_images()[0].get_array() for axes in figure.axes]
        assert [np.shape(picture) for picture in pictures if picture is not None] == [(32, 32, 3)] * 2


REGISTER = """
import sys
from shardmill import Client, WDTransform

KEPT = {"alpha", "beta", "gamma", "delta"}


class Label:
    factor = 3

    def of(self, number):
        return self.factor * number


label = Label()


def count(sample):
    sample["txt"] = f"{label.of(len(KEPT))} {'-'.join(sorted(KEPT))}"
    return sample


print(WDTransform(Client(sys.argv[1]), count, wd_decoder=None).uuid)
"""


def test_six_client_processes_get_one_uuid_and_changed_code_another(
    client: Client, node: RunningNode, tmp_path: Path
) -> None:
    """Old URLs go on giving the bytes of the old code."""

    def register(place: str, text: str, hash_seed: int) -> str:
        directory = tmp_path / place
        directory.mkdir(exist_ok=True)
        (directory / "job.py").write_text(text)
        return run_python("job.py", node.endpoint, directory=directory, hash_seed=hash_seed).strip()

    commented = "# Shifts every line.\n" + REGISTER.replace("    sample[", "    # Inside.\n    sample[")
    cases = [
        ("here", REGISTER, 0),
        ("here", REGISTER, 1),
        ("here", REGISTER, 2),
        ("there", REGISTER, 0),
        ("there", REGISTER, 7),
    ]
    uuids = {register(*case) for case in cases} | {register("commented", commented, 1)}
    assert len(uuids) == 1
    (old,) = uuids
    before = read(client, old, count=2)
    assert before[0].fields["txt"] == b"12 alpha-beta-delta-gamma"
    new = register("here", REGISTER.replace("factor = 3", "factor = 5"), 0)
    assert new != old
    assert read(client, old, count=2) == before
    assert read(client, new, count=1)[0].fields["txt"] == b"20 alpha-beta-delta-gamma"
    assert register("here", REGISTER, 3) == old
