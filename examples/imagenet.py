"""ImageNet through a URL: the same transforms first on the trainer, then in the store.

A node serves the shards; torch is in an interpreter that it is told of, which may be this very one:

    shardmill serve --bucket gs://sharded-imagenet=dir:shards --env torch=$(which python)
    python examples/imagenet.py http://localhost:51080

This side needs torch, torchvision, webdataset and shardmill's client, and matplotlib for the pictures. Those are shown
in a notebook, and written into a directory otherwise.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import webdataset as wds
from torchvision import transforms

from shardmill import Client, WDTransform
from shardmill.notebook import display_loader_images, display_shard_images

normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
train_transform = transforms.Compose(
    [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
)
val_transform = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
)


def wd_transform(sample: dict[str, Any]) -> dict[str, Any]:
    """For the store: the picture becomes an array, height × width × channel, as the `npy` field of a shard."""
    sample["npy"] = train_transform(sample.pop("jpg")).permute(1, 2, 0).numpy()
    return sample


def wd_val_transform(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npy"] = val_transform(sample.pop("jpg")).permute(1, 2, 0).numpy()
    return sample


def identity(value: Any) -> Any:
    return value


def client_side(urls: str | list[str], transform: Callable[[Any], Any]) -> wds.WebLoader:
    """Batches of stored pictures, transformed here."""
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg cls").map_tuple(transform, identity)
    return wds.WebLoader(dataset, batch_size=64, num_workers=1)


def in_store(urls: str | list[str]) -> wds.WebLoader:
    """Batches of what the store has transformed: nothing is left to do but to make tensors of arrays."""
    dataset = (
        wds.WebDataset(urls, shardshuffle=False)
        .decode("rgb")
        .to_tuple("npy cls")
        .map_tuple(transforms.ToTensor(), identity)
    )
    return wds.WebLoader(dataset, batch_size=64, num_workers=1)


def report(name: str, loader: Iterable[Any]) -> None:
    samples = 0
    for images, classes in loader:
        samples += len(classes)
        print(f"{name}: {tuple(images.shape)} {images.dtype}, mean {images.mean():+.4f}")
    print(f"{name}: {samples} samples")


def show(figure: Any, path: Path) -> None:
    """A notebook shows the figure by itself."""
    if "ipykernel" not in sys.modules:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        print(f"pictures: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", nargs="?", help="the node; default: SHARDMILL_ENDPOINT, else localhost:51080")
    parser.add_argument("--bucket", default="gs://sharded-imagenet")
    parser.add_argument("--train", default="imagenet-train-000000.tar", metavar="SHARD", help="a single shard")
    parser.add_argument(
        "--val", default="imagenet-val-{000000..000005}.tar", metavar="TEMPLATE", help="a range of shards"
    )
    parser.add_argument("--out", default="imagenet-out", type=Path, metavar="DIR", help="for pictures")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    client, bucket, shard = Client(arguments.endpoint), arguments.bucket, arguments.train

    # The conventional way: the store gives bytes, and the trainer transforms them.
    report("train, on the client", client_side(client.object_url(bucket, shard), train_transform))
    show(display_shard_images(client, bucket, shard, objects=4), arguments.out / "stored.png")

    # The same function, sent to the store: the URL is that of a shard of arrays.
    train_etl = WDTransform(client, wd_transform, transform_name="imagenet-train", verbose=True)
    loader = in_store(client.object_url(bucket, shard, transform_id=train_etl.uuid))
    report("train, in the store", loader)
    show(display_loader_images(loader, objects=4), arguments.out / "transformed.png")

    # A range of shards. Nothing is random here, so both sides give the same numbers.
    val_etl = WDTransform(client, wd_val_transform, transform_name="imagenet-val", verbose=True)
    urls = client.expand_object_urls(bucket, transform_id=val_etl.uuid, template=arguments.val)
    report("validation, in the store", in_store(urls))
    urls = client.expand_object_urls(bucket, template=arguments.val)
    report("validation, on the client", client_side(urls, val_transform))


if __name__ == "__main__":
    main()
