"""The examples as a reader runs them: on real shards, for a few steps, with the transform on either side."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from shardmill.testing.node import RunningNode
from tests.torch.nodes import BUCKET, ROOT, run_script, torch_node

TRAINING = ROOT / "examples" / "pytorch_wd.py"
SMALL = ("--batch-size", "8", "--workers", "1", "--size", "64")
pytestmark = pytest.mark.timeout(1000)  # up to four scripts, each of which imports torch
SIDES = ["--in-store", "--no-in-store"]


@pytest.fixture(scope="module")
def node(shards: Path) -> Iterator[RunningNode]:
    with torch_node("torch elsewhere", shards) as running:
        yield running


def test_imagenet_writes_its_pictures_and_the_same_numbers_on_both_sides(
    node: RunningNode, shards: Path, tmp_path: Path
) -> None:
    printed, _ = run_script(
        ROOT / "examples" / "imagenet.py",
        [node.endpoint, "--bucket", BUCKET, "--val", "imagenet-val-{000000..000001}.tar", "--out", "pictures"],
        tmp_path,
    )
    with tarfile.open(shards / "imagenet-train-000000.tar") as archive:
        count = sum(name.endswith(".cls") for name in archive.getnames())
    assert f"train, on the client: {count} samples" in printed
    assert f"train, in the store: {count} samples" in printed
    ours, theirs = (re.findall(rf"validation, {side}: (.*)", printed) for side in ("in the store", "on the client"))
    assert ours == theirs
    assert len(ours) > 1
    for name in ("stored", "transformed"):
        with PIL.Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 1000


@pytest.mark.parametrize("side", SIDES)
def test_training_goes_through_its_epochs_on_real_shards(node: RunningNode, tmp_path: Path, side: str) -> None:
    printed, _ = run_script(TRAINING, [node.endpoint, side, "--epochs", "2", "--steps", "2", *SMALL], tmp_path)
    assert re.findall(r"epoch (\d): loss \d+\.\d+, 16 samples", printed) == ["0", "1"]
    assert len(re.findall(r"validation: loss \d+\.\d+, accuracy \d+\.\d+% of 16", printed)) == 2
    assert ("ETL resnet-train successfully initialized" in printed) == (side == "--in-store")


def test_a_checkpoint_is_resumed_and_validates_alike_on_both_sides(node: RunningNode, tmp_path: Path) -> None:
    common = [node.endpoint, "--epochs", "2", "--steps", "3", "--checkpoint", "resnet.pt", *SMALL]
    first, _ = run_script(TRAINING, [*common, "--epochs", "1"], tmp_path)
    assert (tmp_path / "resnet.pt").exists()
    last = re.findall(r"validation: .*", first)[-1]

    for side in SIDES:
        evaluated, _ = run_script(TRAINING, [*common, "--evaluate", side], tmp_path)
        assert re.findall(r"validation: .*", evaluated) == [last]

    resumed, _ = run_script(TRAINING, common, tmp_path)
    assert "resuming resnet.pt after 1 epochs" in resumed
    assert re.findall(r"epoch (\d)", resumed) == ["1"]


def test_the_same_seed_draws_the_same_pictures_and_each_epoch_others(node: RunningNode, tmp_path: Path) -> None:
    """Without learning (rate 0) the loss of an epoch tells which crops it saw."""
    still = [node.endpoint, "--lr", "0", "--epochs", "2", "--steps", "2", *SMALL]
    losses = [re.findall(r"loss (\d+\.\d+), 16", run_script(TRAINING, still, tmp_path)[0]) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("side", SIDES)
def test_either_side_learns(side: str, tmp_path: Path) -> None:
    """Two classes that a colour tells apart: both sides learn them."""
    _write_colours(tmp_path / "shards")
    shards = ["--train", "colours-{0..2}.tar", "--val", "colours-3.tar", "--classes", "2", "--size", "32"]
    rates = ["--epochs", "8", "--batch-size", "8", "--lr", "0.02", "--workers", "1"]
    with torch_node("torch elsewhere", tmp_path / "shards") as node:
        printed, _ = run_script(TRAINING, [node.endpoint, side, *shards, *rates], tmp_path)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\d+\.\d+)", printed)]
    accuracies = [float(accuracy) for accuracy in re.findall(r"accuracy (\d+\.\d+)%", printed)]
    assert len(losses) == len(accuracies) == 8
    assert min(losses) < 0.4  # of guessing: 0.69
    assert accuracies[-1] >= 90


def _write_colours(directory: Path) -> None:
    directory.mkdir()
    numbers = np.random.default_rng(5)
    for shard in range(4):
        with tarfile.open(directory / f"colours-{shard}.tar", "w") as archive:
            for ordinal in range(32):
                label = ordinal % 2
                plane = numbers.integers(0, 120, (6, 8, 3), np.uint8)
                plane[:, :, 0 if label else 2] += 100
                stream = io.BytesIO()
                PIL.Image.fromarray(plane).resize((80, 60)).save(stream, "JPEG")
                for field, payload in (("cls", b"%d" % label), ("jpg", stream.getvalue())):
                    member = tarfile.TarInfo(f"{shard}{ordinal:03d}.{field}")
                    member.size = len(payload)
                    archive.addfile(member, io.BytesIO(payload))
