"""A node that transforms real shards, with what a test asks of it and of its disk."""

import io
import random
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardmill import Client
from shardmill.testing.node import RunningNode, running_node
from tests.server.readers import get, metric

BUCKET = "gs://sharded-imagenet"
TRAIN, VAL = "imagenet-train-000000.tar", "imagenet-val-000000.tar"
Sample = dict[str, Any]


def crop(sample: Sample) -> Sample:
    """A random crop as float32, 600 KB: five times what a photograph has."""
    picture = sample.pop("jpg").convert("RGB").resize((256, 256))
    left, top = random.randrange(32), random.randrange(32)
    sample["npy"] = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return sample


def crop_slowly(sample: Sample) -> Sample:
    import time

    time.sleep(0.02)
    return crop(sample)


@dataclass
class Served:
    """A node with its client, and URLs on it."""

    node: RunningNode
    client: Client
    uuid: str

    def url(self, name: str = VAL, **options: int) -> str:
        return self.client.object_url(BUCKET, name, self.uuid, **options)

    def samples(self, name: str = VAL) -> int:
        with tarfile.open(fileobj=io.BytesIO(get(self.client.object_url(BUCKET, name)).body)) as archive:
            return len({member.name.partition(".")[0] for member in archive})

    def count(self, outcome: str = "ok") -> int:
        name = self.uuid.partition("@")[0]
        return int(metric(self.client, "shardmill_transform_samples_total", transform=name, outcome=outcome))

    def runs(self, state: str) -> int:
        return int(metric(self.client, "shardmill_runs", state=state))

    @property
    def results(self) -> Path:
        return self.node.data / "results"

    def kept(self) -> list[Path]:
        return [path for path in self.results.iterdir() if path.is_file()]

    def spools(self) -> list[Path]:
        return list((self.results / "tmp").iterdir())


@contextmanager
def serving(
    shards: Path, *flags: str, function: Any = crop, args: dict[str, object] | None = None, **options: Any
) -> Iterator[Served]:
    with running_node("--bucket", f"{BUCKET}=dir:{shards}", "--workers", "2", *flags, **options) as node:
        with Client(node.endpoint) as client:
            info = client.transforms.add(function, args=args)
            yield Served(node, client, info.uuid)


def names_in(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getnames()
