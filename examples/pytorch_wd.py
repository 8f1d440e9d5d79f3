"""Train a ResNet from shards, with the augmentation in the store or, by one flag, on the trainer.

    shardmill serve --bucket gs://sharded-imagenet=dir:shards --env torch=$(which python)
    python examples/pytorch_wd.py --in-store
    python examples/pytorch_wd.py --no-in-store

Only `epoch_loader` knows where the transform runs; model, optimizer and loop are the usual ones. With `--in-store` each
epoch reads other URLs (`seed=…,epoch=…`), so that pictures are cropped anew in each of them, and the same way in every
run of the same seed.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
import webdataset as wds
from torch import nn
from torchvision import transforms

from shardmill import Client, WDTransform

SHUFFLED = 256  # samples held back by each loader process, to be given in random order


def identity(value: Any) -> Any:
    return value


class Pictures:
    """Shards as batches of pictures and classes, epoch by epoch."""

    def __init__(
        self,
        client: Client,
        options: argparse.Namespace,
        *,
        template: str,
        name: str,
        transform: Callable[[Any], Any],
        is_training: bool,
    ) -> None:
        self.client, self.options, self.template = client, options, template
        self.transform, self.is_training = transform, is_training
        self.etl: WDTransform | None = None
        if options.in_store:

            def transform_sample(sample: dict[str, Any]) -> dict[str, Any]:
                sample["npy"] = transform(sample.pop("jpg")).permute(1, 2, 0).numpy()
                return sample

            self.etl = WDTransform(client, transform_sample, transform_name=name, verbose=True)

    def epoch_loader(self, epoch: int) -> wds.WebLoader:
        """A new loader for each epoch: WebDataset fixes its URLs when it is made."""
        options = self.options
        if self.etl is not None:
            urls = self.client.expand_object_urls(
                options.bucket, self.etl.uuid, self.template, seed=options.seed, epoch=epoch
            )
        else:
            urls = self.client.expand_object_urls(options.bucket, template=self.template)
        if self.is_training:
            random.Random(options.seed + epoch).shuffle(urls)

        dataset = wds.WebDataset(urls, shardshuffle=False)
        if self.is_training:
            dataset = dataset.shuffle(SHUFFLED, seed=options.seed + epoch)
        if self.etl is not None:
            dataset = dataset.decode("rgb").to_tuple("npy cls").map_tuple(transforms.ToTensor(), identity)
        else:
            dataset = dataset.decode("pil").to_tuple("jpg cls").map_tuple(self.transform, identity)
        return wds.WebLoader(
            dataset,
            batch_size=options.batch_size,
            num_workers=min(options.workers, len(urls)),
            generator=torch.Generator().manual_seed(options.seed + epoch),  # of the draws on this side
        )


def make_transforms(size: int) -> tuple[Any, Any]:
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    train = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    val = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    return tuple(transforms.Compose([*steps, transforms.ToTensor(), normalize]) for steps in (train, val))


def train_epoch(model: Any, loader: Iterable[Any], optimizer: Any, epoch: int, options: argparse.Namespace) -> None:
    model.train()
    began = time.monotonic()
    waited = total = samples = 0.0
    asked = began
    for step, (images, classes) in enumerate(loader, 1):
        waited += time.monotonic() - asked
        images, classes = images.to(options.device), classes.to(options.device)
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(classes)
        samples += len(classes)
        if step == options.steps:
            break
        asked = time.monotonic()
    seconds = time.monotonic() - began
    print(
        f"epoch {epoch}: loss {total / samples:.4f}, {samples:.0f} samples, {samples / seconds:.1f} a second, "
        f"{waited / seconds:.0%} of the time spent waiting for them",
        flush=True,
    )


@torch.no_grad()
def validate(model: Any, loader: Iterable[Any], options: argparse.Namespace) -> None:
    model.eval()
    total = right = samples = 0.0
    for step, (images, classes) in enumerate(loader, 1):
        images, classes = images.to(options.device), classes.to(options.device)
        scores = model(images)
        total += nn.functional.cross_entropy(scores, classes, reduction="sum").item()
        right += (scores.argmax(dim=1) == classes).sum().item()
        samples += len(classes)
        if step == options.steps:
            break
    print(f"validation: loss {total / samples:.4f}, accuracy {right / samples:.2%} of {samples:.0f}", flush=True)


def save_checkpoint(path: Path, **parts: Any) -> None:
    """Whole or not at all: a job may be killed at any time."""
    partial = path.with_name(f"{path.name}.part")
    torch.save({name: part if isinstance(part, int) else part.state_dict() for name, part in parts.items()}, partial)
    partial.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", nargs="?", help="the node; default: SHARDMILL_ENDPOINT, else localhost:51080")
    parser.add_argument("--bucket", default="gs://sharded-imagenet")
    parser.add_argument("--train", default="imagenet-train-{000000..000003}.tar", metavar="TEMPLATE")
    parser.add_argument("--val", default="imagenet-val-{000000..000005}.tar", metavar="TEMPLATE")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--in-store", action=argparse.BooleanOptionalAction, default=True, help="where the transforms run"
    )
    parser.add_argument("--model", default="resnet18", help="any of torchvision.models")
    parser.add_argument("--size", type=int, default=224, help="of the pictures that the model sees")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="at most so many an epoch, and in validation")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=2, help="processes that load data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after each epoch, resumed if there")
    parser.add_argument("--evaluate", action="store_true", help="only validate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(options.seed)
    client = Client(options.endpoint)
    train_transform, val_transform = make_transforms(options.size)
    val = Pictures(client, options, template=options.val, name="resnet-val", transform=val_transform, is_training=False)
    model = torchvision.models.get_model(options.model, num_classes=options.classes).to(options.device)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    first = 0
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=options.device, weights_only=True)
        first = saved["epoch"]
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(saved[name])
        print(f"resuming {options.checkpoint} after {first} epochs", flush=True)
    if options.evaluate:
        validate(model, val.epoch_loader(0), options)
        return

    train = Pictures(
        client, options, template=options.train, name="resnet-train", transform=train_transform, is_training=True
    )
    for epoch in range(first, options.epochs):
        train_epoch(model, train.epoch_loader(epoch), optimizer, epoch, options)
        schedule.step()
        validate(model, val.epoch_loader(epoch), options)
        if options.checkpoint:
            save_checkpoint(options.checkpoint, epoch=epoch + 1, model=model, optimizer=optimizer, schedule=schedule)


if __name__ == "__main__":
    main()
