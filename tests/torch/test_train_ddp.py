"""Training on several processes: the same losses as on one, and a kill leaves no trace in the curve."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill.testing.node import RunningNode
from tests.torch.nodes import BUCKET, ROOT, kill_tree, run_script, start_script, torch_node

TRAINING = ROOT / "examples" / "train_ddp.py"
SHARDS = ("--train", "imagenet-train-{000000..000001}.tar", "--val", "imagenet-val-{000000..000001}.tar")
SMALL = ("--bucket", BUCKET, *SHARDS, "--batch-size", "8", "--size", "32", "--epochs", "3", "--lr", "0.02")
pytestmark = pytest.mark.timeout(600)  # each process of each script imports torch


@pytest.fixture(scope="module")
def node(shards: Path) -> Iterator[RunningNode]:
    with torch_node("torch elsewhere", shards) as running:
        yield running


def curve_of(printed: str) -> dict[str, str]:
    """Step, epoch or validation → what was said of it, with all digits."""
    found: dict[str, str] = {}
    epoch = ""
    for what, said in re.findall(r"^(epoch \d+ step \d+|epoch \d+|validation): (.*)$", printed, re.MULTILINE):
        epoch = what if what.startswith("epoch") else epoch
        found[what if what == epoch else f"{what} after {epoch}"] = said
    return found


def test_two_processes_killed_and_resumed_have_the_losses_of_one_that_was_not(
    node: RunningNode, tmp_path: Path
) -> None:
    alone, _ = run_script(TRAINING, [node.endpoint, *SMALL, "--shares", "2"], tmp_path)
    expected = curve_of(alone)
    assert len([name for name in expected if name.startswith("validation")]) == 3
    assert len(set(expected.values())) == len(expected)

    together = [node.endpoint, *SMALL, "--checkpoint", "ddp.pt", "--steps", "2"]
    printed = ""
    with start_script(TRAINING, together, tmp_path, processes=2) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if "in epoch 1 after step 2" in printed and re.search("epoch 1 step 3", line):
                break
        kill_tree(process)
        _, said = process.communicate()
    assert "epoch 1 step 3" in printed, said
    before = curve_of(printed)
    assert before.items() <= expected.items()

    resumed, _ = run_script(TRAINING, together, tmp_path, processes=2)
    assert resumed.startswith("going on in epoch 1 after step")
    rest = curve_of(resumed)
    assert rest.items() <= expected.items()
    assert before.keys() | rest.keys() == expected.keys()
    assert "epoch 1 step 1" not in rest
