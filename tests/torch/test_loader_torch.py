"""Tensors from the loader: a stock DataLoader with and without workers, and URL lists that know epochs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node
from shardmill.torch import EpochUrls, ShardDataset, data_loader

NAMES = [f"imagenet-val-{number:06d}.tar" for number in range(4)]


def shrink(sample: dict[str, Any]) -> dict[str, Any]:
    import random

    picture = sample.pop("jpg").resize((32, 32))
    if random.random() < 0.5:
        picture = picture.transpose(0)
    sample["npy"] = np.asarray(picture, np.float32) / 255
    return sample


@pytest.fixture(scope="module")
def node(shards: Path) -> Iterator[RunningNode]:
    with running_node("--bucket", f"gs://sharded-imagenet=dir:{shards}", "--workers", "2") as running:
        yield running


@pytest.fixture(scope="module")
def urls(node: RunningNode) -> Iterator[list[str]]:
    with Client(node.endpoint) as client:
        etl = client.transforms.add(shrink, "shrink")
        yield client.expand_object_urls("gs://sharded-imagenet", etl.uuid, names=NAMES)


def test_a_stock_data_loader_gives_tensors(urls: list[str]) -> None:
    loader = data_loader(urls, 8, seed=2)
    batches = [(images.clone(), classes) for images, classes in loader]
    assert isinstance(batches[0][0], torch.Tensor)
    assert (batches[0][0].shape, batches[0][0].dtype) == ((8, 32, 32, 3), torch.float32)
    assert batches[0][1].dtype == torch.int64
    assert len(batches) == len(loader)


def test_workers_share_the_epoch(urls: list[str]) -> None:
    single = sorted(bytes(image.numpy()) for images, _ in data_loader(urls, 8, seed=2) for image in images)
    loader = data_loader(urls, 8, seed=2, num_workers=2)
    for _ in range(2):
        found = sorted(bytes(image.numpy()) for images, _ in loader for image in images)
        assert found == single
    loader.dataset.set_epoch(1)
    assert sorted(bytes(image.numpy()) for images, _ in loader for image in images) != single
    del loader


def test_a_state_goes_on_in_another_dataset(urls: list[str]) -> None:
    expected = [images.clone() for images, _ in ShardDataset(urls, 8, shuffle=True)]
    dataset = ShardDataset(urls, 8, shuffle=True)
    for number, _ in enumerate(dataset, 1):
        if number == 3:
            break
    state = torch.load(_saved(dataset.state_dict()), weights_only=True)
    other = ShardDataset(urls, 8, shuffle=True)
    other.load_state_dict(state)
    rest = [images.clone() for images, _ in other]
    assert len(rest) == len(expected) - 3
    assert all(torch.equal(one, two) for one, two in zip(rest, expected[3:], strict=True))
    dataset.close()


def test_stock_webdataset_draws_anew_in_each_epoch(node: RunningNode) -> None:
    with Client(node.endpoint) as client:
        etl = client.transforms.add(shrink, "shrink")
        urls = EpochUrls(
            lambda epoch: client.expand_object_urls(
                "gs://sharded-imagenet", etl.uuid, names=NAMES[:2], seed=1, epoch=epoch
            )
        )
        dataset = wds.DataPipeline(
            urls, wds.split_by_worker, wds.tarfile_to_samples(), wds.decode("rgb"), wds.to_tuple("npy", "cls")
        )
        epochs = []
        for epoch in (0, 1, 0):
            urls.set_epoch(epoch)
            epochs.append([image.tobytes() for image, _ in dataset])
    assert len(epochs[0]) == len(epochs[1])
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


def _saved(state: dict[str, Any]) -> Any:
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream
