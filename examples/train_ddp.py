"""Train on several processes from a store, to be killed at any time and to go on as if nothing had happened.

    shardmill serve --bucket gs://sharded-imagenet=dir:shards --env torch=$(which python)
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --checkpoint ddp.pt
    python examples/train_ddp.py --shares 2 --checkpoint ddp.pt

Both commands train the same model, to the last bit. An epoch is cut into as many shares as `--shares` says (default:
one a process), a step takes a batch of each, and the gradient is the mean over them. Two processes take the mean of
what each of them has; a single one goes through both shares and adds half of each. Halving is exact in binary
arithmetic and a sum of two has one order only, so nothing is rounded differently. The model has group instead of
batch normalisation, because the latter looks at the batch of its own process, which is where the two would differ.

With one share a single process takes other batches (64 in a row instead of 32 in each half of the epoch), and its
losses are others.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import distributed, nn
from torchvision import transforms

from shardmill import Client, WDTransform
from shardmill.torch import ShardDataLoader, data_loader

WINDOW = 256  # samples that each share shuffles among themselves


def make_functions(size: int) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """What the store does with a sample, for training and for validation: a picture becomes planes of float32."""
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    steps = {
        "ddp-train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        "ddp-val": [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)],
    }

    def make_function(steps: list[Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        transform = transforms.Compose([*steps, transforms.ToTensor(), normalize])

        def transform_sample(sample: dict[str, Any]) -> dict[str, Any]:
            sample["npy"] = transform(sample.pop("jpg")).numpy()
            return sample

        return transform_sample

    return {name: make_function(own) for name, own in steps.items()}


class Team:
    """The processes that train together, and the shares of an epoch that this one reads."""

    def __init__(self, shares: int | None) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.is_first = self.rank == 0
        self.shares = self.size if shares is None else shares
        if self.shares % self.size:
            raise SystemExit(f"{self.shares} shares cannot be read by {self.size} processes alike")
        own = self.shares // self.size
        self.own_shares = range(self.rank * own, (self.rank + 1) * own)
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if self.size > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def close(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()


class Training:
    """Model, optimizer and loaders: what a checkpoint holds."""

    def __init__(self, client: Client, team: Team, options: argparse.Namespace) -> None:
        self.team, self.options = team, options
        self.model = torchvision.models.get_model(
            options.model, num_classes=options.classes, norm_layer=lambda channels: nn.GroupNorm(8, channels)
        ).to(team.device)
        self.parallel: Any = nn.parallel.DistributedDataParallel(self.model) if team.size > 1 else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), options.lr, momentum=options.momentum)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, options.epochs)
        functions = make_functions(options.size)
        train, val = (WDTransform(client, function, transform_name=name) for name, function in functions.items())

        def loaders(etl: WDTransform, template: str, **more: Any) -> list[ShardDataLoader]:
            """One for each share that this process reads."""
            urls = client.expand_object_urls(options.bucket, etl.uuid, template, seed=options.seed)
            common = {"world_size": team.shares, "seed": options.seed, **more}
            return [data_loader(urls, options.batch_size, rank=share, **common) for share in team.own_shares]

        # What does not fill a batch is left out, so that all samples of a step count alike.
        self.train = loaders(train, options.train, shuffle=True, window=WINDOW, drop_last=True)
        self.val = loaders(val, options.val)
        self.epoch = self.step = 0
        self.total = 0.0

    def run(self) -> None:
        while self.epoch < self.options.epochs:
            self.train_epoch()
            self.validate()
            self.schedule.step()
            self.epoch, self.step, self.total = self.epoch + 1, 0, 0.0
            for loader in self.train:
                loader.set_epoch(self.epoch)
            self.save()

    def train_epoch(self) -> None:
        """The epoch, or what is left of it."""
        self.model.train()
        for batches in zip(*self.train, strict=True):
            loss = self.learn(batches)
            self.step += 1
            self.total += loss
            if self.team.is_first:
                print(f"epoch {self.epoch} step {self.step}: loss {loss!r}", flush=True)
            if self.options.steps and self.step % self.options.steps == 0:
                self.save()
        if self.team.is_first:
            print(f"epoch {self.epoch}: loss {self.total / self.step!r}", flush=True)

    def learn(self, batches: Sequence[Any]) -> float:
        """One step on a batch of each share; returns their mean loss."""
        model = self.model if self.parallel is None else self.parallel
        own = len(self.team.own_shares)
        total = torch.zeros((), dtype=torch.float64, device=self.team.device)
        self.optimizer.zero_grad()
        for number, (images, classes) in enumerate(batches, 1):
            # Gradients of the shares are added up; the last one's turn is when processes take the mean of theirs.
            waits = self.parallel is not None and number < own
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                scores = model(images.to(self.team.device))
                loss = nn.functional.cross_entropy(scores, classes.to(self.team.device)) / own
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return float(self.team.sum(total)) / self.team.size

    @torch.no_grad()
    def validate(self) -> None:
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.team.device)  # loss, right, samples
        for loader in self.val:
            for images, classes in loader:
                scores = self.model(images.to(self.team.device))
                classes = classes.to(self.team.device)
                sums[0] += nn.functional.cross_entropy(scores, classes, reduction="sum").item()
                sums[1] += (scores.argmax(dim=1) == classes).sum()
                sums[2] += len(classes)
        loss, right, samples = self.team.sum(sums).tolist()
        if self.team.is_first:
            print(f"validation: loss {loss / samples!r}, accuracy {right / samples:.2%} of {samples:.0f}", flush=True)

    def save(self) -> None:
        """Whole or not at all; every process stands at the same step, so the first one's state is that of all."""
        path = self.options.checkpoint
        if path is None or not self.team.is_first:
            return
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        numbers = {name: getattr(self, name) for name in ("epoch", "step", "total")}
        partial = path.with_name(f"{path.name}.part")
        torch.save({**parts, **numbers, "loader": self.train[0].state_dict()}, partial)
        partial.replace(path)
        print(f"saved {path} in epoch {self.epoch} after step {self.step}", flush=True)

    def load(self) -> None:
        saved = torch.load(self.options.checkpoint, map_location=self.team.device, weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(saved[name])
        for name in ("epoch", "step", "total"):
            setattr(self, name, saved[name])
        for loader in self.train:
            loader.load_state_dict(saved["loader"])
        if self.team.is_first:
            print(f"going on in epoch {self.epoch} after step {self.step}", flush=True)

    def close(self) -> None:
        for loader in (*self.train, *self.val):
            loader.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", nargs="?", help="the node; default: SHARDMILL_ENDPOINT, else localhost:51080")
    parser.add_argument("--bucket", default="gs://sharded-imagenet")
    parser.add_argument("--train", default="imagenet-train-{000000..000003}.tar", metavar="TEMPLATE")
    parser.add_argument("--val", default="imagenet-val-{000000..000005}.tar", metavar="TEMPLATE")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--model", default="resnet18", help="a ResNet of torchvision.models")
    parser.add_argument("--size", type=int, default=64, help="of the pictures that the model sees")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--shares", type=int, help="that an epoch is cut into; default: one for each process")
    parser.add_argument("--batch-size", type=int, default=32, help="of a share")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after each epoch; resumed if there")
    parser.add_argument("--steps", type=int, metavar="N", help="write it every N steps as well")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(options.seed)
    # The order in which a sum is taken depends on the threads; one for each process gives the same on any machine.
    torch.set_num_threads(1)
    team = Team(options.shares)
    with Client(options.endpoint) as client:
        training = Training(client, team, options)
        if options.checkpoint and options.checkpoint.exists():
            training.load()
        training.run()
        training.close()
    team.close()


if __name__ == "__main__":
    main()
