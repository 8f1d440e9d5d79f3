"""Two ranks over four shards, stopped in the middle, gone on with by other processes against a restarted node."""

import base64
import contextlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode, running_node

BATCH = 10
STOP = 3  # batches before the stop
BUCKET = "gs://imgs"
FIELDS = ["npy", "cls", "__key__"]
RANK_SECONDS = 120.0

# What each rank runs, in a process of its own: batches from stdin's arguments, one line each, then the state.
RANK = """
import base64, json, sys
import numpy as np
from shardmill.loader import ShardLoader

asked = json.load(sys.stdin)
with ShardLoader(asked["urls"], asked["batch"], asked["fields"], **asked["options"]) as loader:
    if asked["state"] is not None:
        loader.load_state_dict(asked["state"])
    for number, (images, classes, keys) in enumerate(loader, 1):
        pixels = base64.b64encode(images.tobytes()).decode()
        print(json.dumps([images.shape, images.dtype.str, pixels, classes.tolist(), list(keys)]))
        if number == asked["stop"]:
            print(json.dumps(loader.state_dict()))
            break
"""


def crop(sample: dict[str, Any]) -> dict[str, Any]:
    """A crop that depends on seed, epoch and sample."""
    import random

    import numpy as np

    picture = sample.pop("jpg").convert("RGB")
    left, top = random.randrange(picture.width // 2), random.randrange(picture.height // 2)
    sample["npy"] = np.asarray(picture.crop((left, top, left + 16, top + 12)))
    return sample


@dataclass(frozen=True)
class Rank:
    """What a rank's process printed."""

    batches: list[Any]
    state: Any

    @property
    def keys(self) -> list[str]:
        return [key for *_, keys in self.batches for key in keys]


def read_ranks(
    urls: Sequence[str], world_size: int, *, window: int, state: Any = None, stop: int | None = None
) -> list[Rank]:
    """Each rank in its own process, all at once."""
    ranks = []
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "shuffle": True, "seed": 6, "window": window}
            asked = {"urls": urls, "batch": BATCH, "fields": FIELDS, "options": options, "state": state, "stop": stop}
            command = [sys.executable, "-c", RANK]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            process.stdin = None
            processes.append(process)
        for process in processes:
            lines = [json.loads(line) for line in process.communicate(timeout=RANK_SECONDS)[0].splitlines()]
            assert process.returncode == 0
            ranks.append(Rank(lines if stop is None else lines[:-1], None if stop is None else lines[-1]))
    return ranks


@contextlib.contextmanager
def serve(shards: Path, data: Path, listen: str = "127.0.0.1:0") -> Iterator[tuple[RunningNode, Client]]:
    with running_node("--bucket", f"{BUCKET}=dir:{shards}", "--workers", "2", data=data, listen=listen) as node:
        with Client(node.endpoint) as client:
            yield node, client


def keys_of(shards: Path) -> list[str]:
    keys = set()
    for path in shards.glob("imagenet-train-*.tar"):
        with tarfile.open(path) as archive:
            keys |= {member.name.partition(".")[0] for member in archive}
    return sorted(keys)


@pytest.mark.parametrize("window", [0, 4 * BATCH])
def test_ranks_stopped_after_a_batch_go_on_exactly_against_a_restarted_node(
    shards: Path, tmp_path: Path, window: int
) -> None:
    with serve(shards, tmp_path / "data") as (node, client):
        uuid = client.transforms.add(crop, "crop").uuid
        urls = client.expand_object_urls(BUCKET, uuid, "imagenet-train-{000000..000003}.tar")
        whole = read_ranks(urls, 2, window=window)
        listen = node.endpoint.removeprefix("http://")
    every = keys_of(shards)
    assert len(whole[0].batches) == len(whole[1].batches) > STOP
    assert set(whole[0].keys).isdisjoint(whole[1].keys)
    assert sorted(whole[0].keys + whole[1].keys) == every

    # Another node, which has done nothing of it yet.
    with serve(shards, tmp_path / "other", listen) as (node, client):
        assert client.transforms.add(crop, "crop").uuid == uuid
        before = read_ranks(urls, 2, window=window, stop=STOP)
        assert before[0].state == before[1].state
        node.kill()
    for rank, expected in zip(before, whole, strict=True):
        assert rank.batches == expected.batches[:STOP]

    state = json.loads(json.dumps(before[0].state))
    with serve(shards, tmp_path / "other", listen) as (_, client):
        rest = read_ranks(urls, 2, window=window, state=state)
        for rank, expected in zip(rest, whole, strict=True):
            assert rank.batches == expected.batches[STOP:]
        # A node that was just started has counted what was computed for these readers only: nothing twice. Only where
        # batches of one window lie among each other, what had been given out of it is made again.
        done, left = STOP * BATCH, len(every) // 2 - STOP * BATCH
        again = client.transforms.get(uuid).statistics.samples - 2 * left
        assert again <= 2 * min(window, done)

        # Half of the ranks have gone, or twice as many have come: what is left is shared out anew.
        for world_size in (4, 1):
            others = read_ranks(urls, world_size, window=window, state=state)
            assert len({len(rank.batches) for rank in others}) == 1
            found = [key for rank in others for key in rank.keys]
            given = [key for rank in before for key in rank.keys]
            assert sorted(found + given) == every
            assert pixels_of(others).items() <= pixels_of(whole).items()


def pixels_of(ranks: list[Rank]) -> dict[str, bytes]:
    """Key → its picture."""
    found: dict[str, bytes] = {}
    for rank in ranks:
        for shape, kind, pixels, _, keys in rank.batches:
            assert kind == "|u1"
            assert len(shape) == 4
            data = base64.b64decode(pixels)
            size = len(data) // len(keys)
            found |= {key: data[number * size : (number + 1) * size] for number, key in enumerate(keys)}
    return found
