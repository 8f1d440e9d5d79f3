"""Tensors from the loader: a stock DataLoader with and without workers, and URL lists that know epochs."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from shardmill.client import Client
from shardmill.core.errors import BadRequest
from shardmill.loader import IterationEnded
from shardmill.testing.node import RunningNode, running_node
from shardmill.torch import EpochUrls, ShardDataLoader, ShardDataset, data_loader

NAMES = [f"imagenet-val-{number:06d}.tar" for number in range(4)]


def shrink(sample: dict[str, Any]) -> dict[str, Any]:
    import random

    picture = sample.pop("jpg").resize((32, 32))
    if random.random() < 0.5:
        picture = picture.transpose(0)
    sample["npy"] = np.asarray(picture, np.float32) / 255
    return sample


def noise(sample: dict[str, Any]) -> dict[str, Any]:
    return {"npy": torch.rand(3).numpy()}


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


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_state_is_exact_with_worker_processes_too(urls: list[str], stop: int, window: int) -> None:
    """They are ahead of what was given out, and the next one to give may be any of them."""
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "window": window, "num_workers": 2}
    loader = data_loader(urls, 2, ("npy", "__key__"), **options)
    epochs = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        epochs.append([(images.clone(), keys) for images, keys in loader])
        assert len(epochs[-1]) == len(loader)
    loader.set_epoch(1)
    for number, _ in enumerate(loader, 1):
        if number == stop:
            break
    state = torch.load(_saved(loader.state_dict()), weights_only=True)

    for going_on in (loader, data_loader(urls, 2, ("npy", "__key__"), **options)):
        if going_on is not loader:
            going_on.load_state_dict(state)
        _assert_equal([(images.clone(), keys) for images, keys in going_on], epochs[0][stop:])
        going_on.set_epoch(2)
        _assert_equal([(images.clone(), keys) for images, keys in going_on], epochs[1])

    # As many workers as before are not needed: what is left is shared out anew.
    given = [key for _, keys in epochs[0][:stop] for key in keys]
    for workers in (0, 1):
        other = data_loader(urls, 2, ("npy", "__key__"), **{**options, "num_workers": workers})
        other.load_state_dict(state)
        rest = [key for _, keys in other for key in keys]
        assert sorted(given + rest) == sorted(key for _, keys in epochs[0] for key in keys)
        other.close()


def test_closing_ends_the_worker_processes_of_an_epoch_in_the_middle(urls: list[str]) -> None:
    """Though the trainer still holds what it took batches from; and that gives no end that looks like the epoch's."""
    for end in (ShardDataLoader.close, lambda loader: loader.load_state_dict(loader.state_dict())):
        loader = data_loader(urls, 2, num_workers=2)
        batches = iter(loader)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        end(loader)
        assert multiprocessing.active_children() == []
        with pytest.raises(IterationEnded):
            next(batches)
        loader.close()


def test_worker_processes_that_outlive_an_epoch_are_refused(urls: list[str]) -> None:
    with pytest.raises(BadRequest, match="persistent_workers"):
        ShardDataLoader(ShardDataset(urls, 2), num_workers=2, persistent_workers=True)


def test_the_function_may_run_in_the_trainers_worker_processes(node: RunningNode, urls: list[str]) -> None:
    with Client(node.endpoint) as client:
        plain = client.expand_object_urls("gs://sharded-imagenet", names=NAMES)
    for workers in (0, 2):
        sides = [data_loader(urls, 8, seed=4, num_workers=workers)]
        sides.append(data_loader(plain, 8, seed=4, num_workers=workers, function=shrink))
        in_store, here = ([(images.clone(), labels) for images, labels in side] for side in sides)
        assert len(in_store) == len(here)
        for (one, labels), (other, others) in zip(in_store, here, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(labels, others)


def test_a_function_here_leaves_torchs_generator_to_the_trainer(node: RunningNode) -> None:
    with Client(node.endpoint) as client:
        plain = client.expand_object_urls("gs://sharded-imagenet", names=NAMES)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    loader = ShardDataset(plain, 4, ("npy",), function=noise)  # a stock DataLoader draws as well
    batches = iter(loader)
    (one,) = next(batches)
    found = [torch.rand(1)]
    (other,) = next(batches)
    found.append(torch.rand(1))
    loader.close()
    assert torch.equal(torch.cat(found), expected)
    assert not torch.equal(one, other)


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


def _assert_equal(batches: list[Any], expected: list[Any]) -> None:
    assert [keys for _, keys in batches] == [keys for _, keys in expected]
    assert all(torch.equal(images, others) for (images, _), (others, _) in zip(batches, expected, strict=True))


def _saved(state: dict[str, Any]) -> Any:
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream
