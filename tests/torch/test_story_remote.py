"""The story over a store of Google's form: stock WebDataset reads transformed URLs while shards arrive, and from the disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import webdataset as wds

from shardmill import Client, WDTransform
from shardmill.testing.faults import Fault, FaultServer, fault_server
from shardmill.testing.node import RunningNode, running_node
from tests.torch.nodes import SERVER_PYTHON, SOURCES, TORCH_PYTHON
from tests.torch.test_story import (
    TRAIN,
    VALIDATION,
    batches,
    identity,
    story_shards,
    val_transform,
    wd_transform,
    wd_val_transform,
)

__all__ = ["story_shards"]  # a fixture

URI = "gcp://sharded-imagenet"
CONFIG = """
[[bucket]]
uri = "gcp://sharded-imagenet"
endpoint = "{endpoint}"
token = "token"
revalidate = "never"
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def store(story_shards: Path) -> Iterator[FaultServer]:
    with fault_server() as found:
        for file in [story_shards / TRAIN, *sorted(story_shards.glob("imagenet-val-*.tar"))]:
            found.put(f"/sharded-imagenet/{file.name}", file.read_bytes())
        yield found


@pytest.fixture
def node(store: FaultServer, tmp_path: Path) -> Iterator[RunningNode]:
    config = tmp_path / "node.toml"
    config.write_text(CONFIG.format(endpoint=store.endpoint))
    flags = ("--config", config, "--env", f"torch={TORCH_PYTHON}", "--workers", "2")
    with running_node(*flags, data=tmp_path / "data", python=SERVER_PYTHON, environ=SOURCES) as running:
        yield running


def is_equal(found: list[tuple[torch.Tensor, torch.Tensor]], others: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(found) == len(others) and all(
        torch.equal(images, other_images) and torch.equal(labels, other_labels)
        for (images, labels), (other_images, other_labels) in zip(found, others, strict=True)
    )


def test_stock_webdataset_reads_the_same_samples_cold_and_from_the_disk(
    node: RunningNode, store: FaultServer, story_shards: Path
) -> None:
    on_client = (
        wds.WebDataset([str(path) for path in sorted(story_shards.glob("imagenet-val-*.tar"))], shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg cls")
        .map_tuple(val_transform, identity)
    )
    expected = list(wds.WebLoader(on_client, batch_size=64, num_workers=1))
    with Client(node.endpoint) as client:
        etl = WDTransform(client, wd_val_transform, transform_name="imagenet-val")
        train = WDTransform(client, wd_transform, transform_name="imagenet-train")
        urls = client.expand_object_urls(URI, transform_id=etl.uuid, template=VALIDATION)
        drawn = [client.object_url(URI, TRAIN, transform_id=train.uuid, seed=seed, epoch=0) for seed in (1, 2)]
        cold, cold_train = batches(urls), batches(drawn[0])
        assert is_equal(cold, [tuple(batch) for batch in expected])
        assert [images.shape for images, _ in cold_train] == [(64, 3, 224, 224), (36, 3, 224, 224)]
        # From here on nothing can be had from the store; another seed is not the kept result of the first either.
        asked = len(store.asked("GET"))
        store.misbehave("*", Fault("status", status=500, methods=("GET", "HEAD")))
        assert is_equal(batches(urls), cold)
        assert is_equal(batches(drawn[0]), cold_train)
        others = batches(drawn[1])
        assert [images.shape for images, _ in others] == [(64, 3, 224, 224), (36, 3, 224, 224)]
        assert not is_equal(others, cold_train)
        assert len(store.asked("GET")) == asked > 0
