"""The story that shardmill exists for, told by a script that nothing is changed in, and checked from outside.

`SHARDMILL_STORY` names the script; without it the repository's own, `examples/imagenet.py`, is run.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from torchvision import transforms

from shardmill import Client, WDTransform
from shardmill.testing.node import RunningNode
from tests.conftest import write_shards
from tests.torch.nodes import BUCKET, ROOT, Arrangement, run_script, torch_node

STORY = Path(os.environ.get("SHARDMILL_STORY") or ROOT / "examples" / "imagenet.py")
TRAIN = "imagenet-train-000000.tar"
VALIDATION = "imagenet-val-{000000..000005}.tar"

pytestmark = pytest.mark.timeout(300)

normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
train_transform = transforms.Compose(
    [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
)
val_transform = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
)


def wd_transform(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npy"] = train_transform(sample.pop("jpg")).permute(1, 2, 0).numpy().astype("float32")
    return sample


def wd_val_transform(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npy"] = val_transform(sample.pop("jpg")).permute(1, 2, 0).numpy().astype("float32")
    return sample


def identity(value: Any) -> Any:
    return value


@pytest.fixture(scope="session")
def story_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train shard of 100 samples and six validation shards of 25, as the story counts them."""
    if os.environ.get("SHARDMILL_TEST_SHARDS"):
        return shards
    directory = tmp_path_factory.mktemp("story")
    write_shards(directory, "train", shards=1, samples=100)
    write_shards(directory, "val", shards=6, samples=25)
    return directory


@pytest.fixture(scope="module", params=["torch elsewhere", "torch in the server"])
def arrangement(request: pytest.FixtureRequest) -> Arrangement:
    chosen: Arrangement = request.param
    return chosen


@pytest.fixture(scope="module")
def node(arrangement: Arrangement, story_shards: Path) -> Iterator[RunningNode]:
    with torch_node(arrangement, story_shards) as running:
        yield running


@pytest.fixture
def client(node: RunningNode) -> Iterator[Client]:
    with Client(node.endpoint) as client:
        yield client


def stored(directory: Path, field: str) -> list[bytes]:
    """One field of all samples, in tar order."""
    payloads = []
    for path in sorted(directory.iterdir()):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(f".{field}"):
                    payload = archive.extractfile(member)
                    assert payload is not None
                    payloads.append(payload.read())
    return payloads


def links(directory: Path, shards: Path, pattern: str) -> Path:
    directory.mkdir()
    for path in shards.glob(pattern):
        (directory / path.name).symlink_to(path)
    return directory


def batches(urls: str | list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the stock loader gives."""
    dataset = (
        wds.WebDataset(urls, shardshuffle=False)
        .decode("rgb")
        .to_tuple("npy cls")
        .map_tuple(transforms.Compose([transforms.ToTensor()]), identity)
    )
    return [tuple(batch) for batch in wds.WebLoader(dataset, batch_size=64, num_workers=1)]


def test_the_story_runs_as_it_stands(node: RunningNode, tmp_path: Path) -> None:
    printed, said = run_script(STORY, [node.endpoint], tmp_path)
    of_transforms = [line for line in printed.splitlines() if "ETL" in line]
    assert of_transforms == [
        "Initializing ETL...",
        "ETL imagenet-train successfully initialized",
        "Initializing ETL...",
        "ETL imagenet-val successfully initialized",
    ]
    assert "Traceback" not in said
    assert "150 samples" in printed


def test_a_transform_prints_exactly_two_lines(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    WDTransform(client, wd_transform, transform_name="imagenet-train", verbose=True)
    assert capsys.readouterr().out == "Initializing ETL...\nETL imagenet-train successfully initialized\n"
    WDTransform(client, wd_transform, transform_name="imagenet-train")
    assert capsys.readouterr().out == ""


def test_it_runs_in_the_environment_that_has_torch(client: Client, arrangement: Arrangement) -> None:
    etl = WDTransform(client, wd_transform, transform_name="imagenet-train")
    environments = {environment.name for environment in client.config().environments}
    if arrangement == "torch elsewhere":
        assert (etl.info.environment, environments) == ("torch", {"default", "torch"})
    else:
        assert (etl.info.environment, environments) == ("default", {"default"})


def test_the_train_loader_gives_batches_of_64_and_36_pictures(
    client: Client, story_shards: Path, tmp_path: Path
) -> None:
    etl = WDTransform(client, wd_transform, transform_name="imagenet-train")
    found = batches(client.object_url(BUCKET, TRAIN, transform_id=etl.uuid))

    assert [images.shape for images, _ in found] == [(64, 3, 224, 224), (36, 3, 224, 224)]
    assert {images.dtype for images, _ in found} == {torch.float32}
    classes = [int(label) for label in stored(links(tmp_path / "train", story_shards, TRAIN), "cls")]
    assert torch.cat([labels for _, labels in found]).tolist() == classes
    assert all(bool(torch.isfinite(images).all()) for images, _ in found)
    again = batches(client.object_url(BUCKET, TRAIN, transform_id=etl.uuid))
    assert not any(torch.equal(images, others) for (images, _), (others, _) in zip(found, again, strict=True))


def test_the_validation_range_is_bit_equal_to_the_client_side_in_tar_order(
    client: Client, story_shards: Path, tmp_path: Path
) -> None:
    etl = WDTransform(client, wd_val_transform, transform_name="imagenet-val")
    urls = client.expand_object_urls(BUCKET, transform_id=etl.uuid, template=VALIDATION)
    found = batches(urls)

    assert len(urls) == 6
    assert [images.shape for images, _ in found] == [(64, 3, 224, 224), (64, 3, 224, 224), (22, 3, 224, 224)]
    local = links(tmp_path / "val", story_shards, "imagenet-val-*.tar")
    on_client = (
        wds.WebDataset(sorted(map(str, local.iterdir())), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg cls")
        .map_tuple(val_transform, identity)
    )
    expected = list(wds.WebLoader(on_client, batch_size=64, num_workers=1))
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert torch.cat([labels for _, labels in found]).tolist() == [int(label) for label in stored(local, "cls")]
