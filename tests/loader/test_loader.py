"""Batches from a real node: every sample once, the same bytes after a stop, whatever the ranks and the placement."""

import concurrent.futures
import contextlib
import io
import itertools
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardmill.client import Client
from shardmill.core.errors import BadRequest, BadShard, ObjectNotFound, TransformFailed
from shardmill.loader import IterationEnded, ShardLoader
from shardmill.testing.node import RunningNode, running_node

COUNTS = [30, 17, 0, 25, 40]
BUCKET = "gs://own"
NAMES = [f"s-{number}.tar" for number in range(len(COUNTS))]


def draw(sample: dict[str, Any]) -> dict[str, Any]:
    """Pixels that depend on seed and sample."""
    sample["npy"] = np.random.default_rng().random((5, 7), np.float32) + random.random()
    return sample


def fan_out(sample: dict[str, Any]) -> Any:
    number = int(sample["cls"])
    if number % 5 == 0:
        return None
    return [{**sample, "npy": np.full((2, 2), number * 10 + index, np.int32)} for index in range(number % 3 + 1)]


def ragged(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npy"] = np.ones((int(sample["cls"]) % 4 + 1,), np.int16)
    return sample


def redraw(sample: dict[str, Any]) -> dict[str, Any]:
    sample["jpg"] = np.random.randint(0, 256, (24, 16, 3)).astype(np.uint8)
    return sample


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    number = 0
    for name, count in zip(NAMES, COUNTS, strict=True):
        with tarfile.open(directory / name, "w") as archive:
            for _ in range(count):
                for field, data in (("cls", b"%d" % number), ("txt", b"text %d" % number)):
                    member = tarfile.TarInfo(f"{number:05d}.{field}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                number += 1
    return directory


@pytest.fixture(scope="module")
def own_node(directory: Path) -> Iterator[RunningNode]:
    with running_node("--bucket", f"{BUCKET}=dir:{directory}", "--workers", "2") as node:
        yield node


@pytest.fixture(scope="module")
def urls(own_node: RunningNode) -> Iterator[dict[str, list[str]]]:
    """URLs by function; `plain` are the shards themselves."""
    with Client(own_node.endpoint) as client:
        found = {"plain": client.expand_object_urls(BUCKET, names=NAMES)}
        for function in (draw, fan_out, ragged, redraw):
            info = client.transforms.add(function, function.__name__.replace("_", "-"))
            found[function.__name__] = client.expand_object_urls(BUCKET, info.uuid, names=NAMES)
        yield found


def whole_epoch(urls: list[str], batch_size: int = 8, **options: Any) -> list[tuple[Any, ...]]:
    with ShardLoader(urls, batch_size, ("npy", "cls", "__key__"), **options) as loader:
        return [tuple(np.copy(column) for column in batch) for batch in loader]


def numbers(batches: list[tuple[Any, ...]]) -> list[int]:
    return [int(number) for batch in batches for number in batch[1]]


def test_an_epoch_has_every_sample_once_in_arrays(urls: dict[str, list[str]]) -> None:
    batches = whole_epoch(urls["draw"])
    assert [len(batch[0]) for batch in batches] == [8] * 14
    assert numbers(batches) == list(range(112))
    images, classes, keys = batches[0]
    assert (images.shape, images.dtype, classes.dtype) == ((8, 5, 7), np.float32, np.int64)
    assert list(keys) == [f"{number:05d}" for number in range(8)]
    again = whole_epoch(urls["draw"])
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    other_seed = whole_epoch(urls["draw"], seed=5)
    assert not np.array_equal(batches[0][0], other_seed[0][0])


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_have_as_many_batches_and_share_nothing(urls: dict[str, list[str]], world_size: int, window: int) -> None:
    ranks = [
        whole_epoch(urls["draw"], rank=rank, world_size=world_size, shuffle=True, window=window)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(number for batches in ranks for number in numbers(batches)) == list(range(112))
    if window:
        first = numbers(ranks[0][:4])
        assert first != sorted(first)


def test_epochs_differ_in_order_and_in_draws(urls: dict[str, list[str]]) -> None:
    with ShardLoader(urls["draw"], 16, ("npy", "cls"), shuffle=True) as loader:
        epochs = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            epochs.append([(np.copy(images), list(classes)) for images, classes in loader])
    by_number = [
        {number: image for images, classes in epoch for image, number in zip(images, classes, strict=True)}
        for epoch in epochs
    ]
    assert [classes for _, classes in epochs[0]] != [classes for _, classes in epochs[1]]
    assert not np.array_equal(by_number[0][3], by_number[1][3])
    assert all(np.array_equal(by_number[0][number], by_number[2][number]) for number in range(112))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_state_goes_on_with_the_very_batches_that_would_have_come(
    urls: dict[str, list[str]], stop: int, window: int, prefetch: int
) -> None:
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "shuffle": True, "window": window, "seed": 4}
    expected = whole_epoch(urls["draw"], **options)
    with ShardLoader(urls["draw"], 8, ("npy", "cls", "__key__"), prefetch=prefetch, **options) as loader:
        for _, _ in zip(range(stop), loader, strict=False):
            pass
        state = loader.state_dict()
    with ShardLoader(urls["draw"], 8, ("npy", "cls", "__key__"), prefetch=prefetch, **options) as loader:
        loader.load_state_dict(state)
        rest = [tuple(np.copy(column) for column in batch) for batch in loader]
        assert len(rest) == len(expected) - stop
        for one, other in zip(rest, expected[stop:], strict=True):
            assert all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))
        # The epoch is over; the next one is whole again.
        assert len(list(loader)) == len(expected)


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("worlds", [(2, 4), (4, 1), (1, 3)])
def test_another_number_of_ranks_goes_on_with_what_is_left(
    urls: dict[str, list[str]], worlds: tuple[int, int], window: int
) -> None:
    options: dict[str, Any] = {"shuffle": True, "window": window, "seed": 9}
    seen, states = [], []
    for rank in range(worlds[0]):
        with ShardLoader(urls["draw"], 8, ("npy", "cls"), rank=rank, world_size=worlds[0], **options) as loader:
            for number, batch in enumerate(loader, 1):
                seen += [int(value) for value in batch[1]]
                if number == 2:
                    break
            states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    counts = set()
    for rank in range(worlds[1]):
        with ShardLoader(urls["draw"], 8, ("npy", "cls"), rank=rank, world_size=worlds[1], **options) as loader:
            loader.load_state_dict(states[0])
            batches = list(loader)
            counts.add(len(batches))
            seen += [int(value) for batch in batches for value in batch[1]]
    assert sorted(seen) == list(range(112))
    assert len(counts) == 1


def test_the_twin_on_the_trainer_gives_the_same_tensors(urls: dict[str, list[str]]) -> None:
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "rank": 1, "world_size": 2}
    in_store = whole_epoch(urls["draw"], **options)
    random.seed(11)
    np.random.seed(11)
    on_client = whole_epoch(urls["plain"], function=draw, **options)
    assert len(in_store) == len(on_client)
    for one, other in zip(in_store, on_client, strict=True):
        assert all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("function", [fan_out, ragged, redraw])
def test_the_twin_gives_what_would_have_gone_through_a_shard(urls: dict[str, list[str]], function: Any) -> None:
    """Keys of what a sample was multiplied into, pictures as JPEG gives them back, fields that nobody touched."""
    fields = ("jpg;npy", "__key__", "txt", "cls")
    sides = []
    for name, options in ((function.__name__, {}), ("plain", {"function": function})):
        with ShardLoader(urls[name], 16, fields, seed=5, **options) as loader:
            sides.append([[(np.copy(image), *rest) for image, *rest in zip(*batch, strict=True)] for batch in loader])
    assert [len(batch) for batch in sides[0]] == [len(batch) for batch in sides[1]]
    for one, other in zip(itertools.chain(*sides[0]), itertools.chain(*sides[1]), strict=True):
        assert (one[0].dtype, one[0].shape, one[0].tobytes()) == (other[0].dtype, other[0].shape, other[0].tobytes())
        assert one[1:] == other[1:]


def test_a_function_in_the_trainer_does_not_touch_its_draws(urls: dict[str, list[str]]) -> None:
    finders, fresh = list(sys.meta_path), np.random.default_rng
    random.seed(7)
    np.random.seed(7)
    expected = [random.random(), np.random.random(), random.random(), np.random.random()]
    random.seed(7)
    np.random.seed(7)
    with ShardLoader(urls["plain"], 8, function=draw) as loader:
        batches = iter(loader)
        next(batches)
        found = [random.random(), np.random.random()]
        assert np.random.default_rng().random() != np.random.default_rng().random()
        next(batches)
        found += [random.random(), np.random.random()]
    assert found == expected
    assert (sys.meta_path, np.random.default_rng) == (finders, fresh)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropped_and_multiplied_samples_stay_in_their_batch(urls: dict[str, list[str]], world_size: int) -> None:
    ranks = [whole_epoch(urls["fan_out"], rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [int(image[0, 0]) for batches in ranks for images, _, _ in batches for image in images]
    assert found == [number * 10 + index for number in range(112) if number % 5 for index in range(number % 3 + 1)]


def test_what_does_not_stack_is_a_list(urls: dict[str, list[str]]) -> None:
    with ShardLoader(urls["ragged"], 8, ("npy", "txt")) as loader:
        images, texts = next(iter(loader))
    assert [image.shape for image in images] == [(number % 4 + 1,) for number in range(8)]
    assert texts == [f"text {number}" for number in range(8)]


def test_plain_shards_are_read_without_a_function(urls: dict[str, list[str]]) -> None:
    with ShardLoader(urls["plain"], 50, ("txt;missing", "cls"), drop_last=True) as loader:
        batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [50, 50]
    assert batches[1][0][0] == "text 50"


def test_buffers_are_used_again_once_nobody_has_the_batch(urls: dict[str, list[str]]) -> None:
    with ShardLoader(urls["draw"], 8, ("npy",)) as loader:
        bases = {id(batch[0].base) for batch in loader}
        assert len(bases) <= 6
        kept = [batch[0] for batch in loader]
        assert len({id(images.base) for images in kept}) == len(kept)
        assert len({images.tobytes() for images in kept}) == len(kept)


def test_progress_and_length(urls: dict[str, list[str]]) -> None:
    seen: list[int] = []
    with ShardLoader(urls["draw"], 9, ("cls",), progress=seen.append) as loader:
        assert len(loader) == 13 == len(list(loader))
    assert sum(seen) == 112


def test_an_epoch_that_is_left_in_the_middle_leaves_nothing(urls: dict[str, list[str]]) -> None:
    loader = ShardLoader(urls["draw"], 4, ("npy",))
    for _ in loader:
        break
    iterator = iter(loader)
    next(iterator)
    loader.set_epoch(1)
    assert len(list(loader)) == 28
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "leave",
    [
        ShardLoader.close,
        lambda loader: loader.set_epoch(1),
        lambda loader: loader.load_state_dict(loader.state_dict()),
        lambda loader: next(iter(loader)),
    ],
)
def test_an_iteration_that_was_left_gives_no_end(urls: dict[str, list[str]], leave: Any, prefetch: int) -> None:
    """It would look like that of the epoch; and nobody waits for batches that do not come."""
    with ShardLoader(urls["draw"], 4, prefetch=prefetch) as loader:
        batches = iter(loader)
        next(batches)
        leave(loader)
        state = loader.state_dict()
        with pytest.raises(IterationEnded):
            next(batches)
        assert loader.state_dict() == state


def test_a_node_that_is_restarted_is_gone_on_with(directory: Path, tmp_path: Path) -> None:
    with running_node("--bucket", f"{BUCKET}=dir:{directory}", "--workers", "2", data=tmp_path / "data") as node:
        listen = node.endpoint.removeprefix("http://")
        client = Client(node.endpoint)
        info = client.transforms.add(draw, "draw")
        names = client.expand_object_urls(BUCKET, info.uuid, names=NAMES)
        client.close()
        expected = whole_epoch(names)
        loader = ShardLoader(names, 8, ("npy", "cls", "__key__"), prefetch=0)
        batches = iter(loader)
        found = [tuple(np.copy(column) for column in next(batches)) for _ in range(3)]
        node.kill()
    flags = ("--bucket", f"{BUCKET}=dir:{directory}", "--workers", "2", "--listen", listen)
    with running_node(*flags, data=tmp_path / "data"):
        found += [tuple(np.copy(column) for column in batch) for batch in batches]
        loader.close()
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["draw", "plain"])
def test_a_node_that_is_away_between_two_shards_is_waited_for(directory: Path, tmp_path: Path, kind: str) -> None:
    flags = ("--bucket", f"{BUCKET}=dir:{directory}", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data") as node:
        listen = node.endpoint.removeprefix("http://")
        with Client(node.endpoint) as client:
            spec = client.transforms.add(draw, "draw").uuid if kind == "draw" else None
            names = client.expand_object_urls(BUCKET, spec, names=NAMES)
        loader = ShardLoader(names, 30, ("cls",), prefetch=0)
        batches = iter(loader)
        found = list(next(batches)[0])  # the first shard to its end
        node.kill()
    with concurrent.futures.ThreadPoolExecutor(1) as threads, contextlib.closing(loader):
        rest = threads.submit(lambda: [number for batch in batches for number in batch[0]])
        assert not rest.done()
        with running_node(*flags, "--listen", listen, data=tmp_path / "data"):
            found += rest.result(60)
    assert found == list(range(112))


def test_bad_calls_say_what_is_wrong(urls: dict[str, list[str]], own_node: RunningNode) -> None:
    good = urls["draw"]
    with pytest.raises(BadRequest, match="not empty"):
        ShardLoader([], 8)
    with pytest.raises(BadRequest, match="make no sense"):
        ShardLoader(good, 8, rank=2, world_size=2)
    with pytest.raises(BadRequest, match="is not a data URL"):
        ShardLoader(["http://127.0.0.1:1/x/y"], 8)
    with pytest.raises(BadRequest, match="2 nodes"):
        ShardLoader([good[0], good[1].replace("127.0.0.1", "localhost")], 8)
    with pytest.raises(BadRequest, match="part of a shard"):
        ShardLoader([good[0].replace(",k=", ",start=3,k=")], 8)
    with pytest.raises(BadRequest, match="for plain shards"):
        ShardLoader(good, 8, function=draw)
    with pytest.raises(ObjectNotFound):
        ShardLoader([good[0].replace("s-0", "s-9")], 8)
    with ShardLoader(good, 8, ("png",)) as loader, pytest.raises(BadShard, match="no field 'png'; it has"):
        next(iter(loader))
    with pytest.raises(BadRequest, match="make no sense"):
        ShardLoader(good, 8, world_size=3, workers=2)
    with ShardLoader(good, 8) as loader:
        state = loader.state_dict()
        with pytest.raises(BadRequest, match="version 1; this program reads 2"):
            loader.load_state_dict({**state, "version": 1})
    for others, options, what in ((good, {"seed": 3}, "seed"), (good, {"shuffle": True}, "shuffle"),
                                  (good[::-1], {}, "shards"), (good[:3], {}, "samples")):  # fmt: skip
        with ShardLoader(others, 8, **options) as loader, pytest.raises(BadRequest, match=f"of other {what}"):
            loader.load_state_dict(state)


def test_a_function_that_fails_here_names_the_sample(urls: dict[str, list[str]]) -> None:
    def fail(sample: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("nothing")

    with ShardLoader(urls["plain"], 8, ("txt",), function=fail) as loader:
        with pytest.raises(TransformFailed, match="sample '00000'"):
            next(iter(loader))
