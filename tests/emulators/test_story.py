"""The story of the README over buckets of clouds: transformed shards by URL, while they arrive and from the disk."""

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardmill import Client, WDTransform
from shardmill.config import BucketSettings
from shardmill.core.values import Secret
from shardmill.testing import emulators
from shardmill.testing.emulators import ACCESS_KEY, ACCOUNT, ACCOUNT_KEY, Emulator
from shardmill.testing.node import running_node
from shardmill.testing.origins import put
from tests.emulators.test_origins import opened

NAME = "sharded-imagenet"
COUNT = 2
TEMPLATE = f"train/imagenet-train-{{000000..{COUNT - 1:06d}}}.tar"
KEYS = [f"train/imagenet-train-{number:06d}.tar" for number in range(COUNT)]


Cloud = Callable[[Path, contextlib.ExitStack], tuple[Emulator, str, dict[str, str]]]
"""Starts an emulator; gives the bucket's URI, and its settings."""


def mirror(sample: dict[str, Any]) -> dict[str, Any]:
    """At random, as augmentation is."""
    picture = sample.pop("jpg").convert("RGB").resize((64, 64))
    sample["npy"] = np.asarray(picture)[:, :: random.choice((1, -1))].copy()
    return sample


def google(programs: Path, stack: contextlib.ExitStack) -> tuple[Emulator, str, dict[str, str]]:
    emulator = stack.enter_context(emulators.fake_gcs(programs))
    bucket = json.dumps({"name": NAME}).encode()
    emulator.request("POST", "/storage/v1/b?project=p", {"Content-Type": "application/json"}, bucket)
    return emulator, f"gcp://{NAME}", {"endpoint": emulator.endpoint, "token": "token"}


def s3(programs: Path, stack: contextlib.ExitStack) -> tuple[Emulator, str, dict[str, str]]:
    emulator = stack.enter_context(emulators.moto(programs))
    name = emulators.make_moto_bucket(emulator)
    keys = {"access_key_id": "name", "secret_access_key": "secret"}
    return emulator, f"s3://{name}", {"endpoint": emulator.endpoint, **keys}


def seaweedfs(programs: Path, stack: contextlib.ExitStack) -> tuple[Emulator, str, dict[str, str]]:
    emulator = stack.enter_context(emulators.seaweedfs(programs))
    name = emulators.make_seaweedfs_bucket(emulator)
    keys = {"access_key_id": ACCESS_KEY[0], "secret_access_key": ACCESS_KEY[1]}
    return emulator, f"s3://{name}", {"endpoint": emulator.endpoint, **keys}


def azure(programs: Path, stack: contextlib.ExitStack) -> tuple[Emulator, str, dict[str, str]]:
    emulator = stack.enter_context(emulators.azurite(programs))
    name = emulators.make_azure_container(emulator)
    return emulator, f"az://{name}", {"endpoint": emulator.endpoint, "account": ACCOUNT, "account_key": ACCOUNT_KEY}


def web(programs: Path, stack: contextlib.ExitStack) -> tuple[Emulator, str, dict[str, str]]:
    emulator = stack.enter_context(emulators.nginx(programs))
    return emulator, f"ht://{NAME}", {"backing": emulator.endpoint}


def fill(emulator: Emulator, uri: str, options: dict[str, str], files: Sequence[Path]) -> None:
    """Put the shards where the bucket will find them, by other means than a node."""
    if uri.startswith("gcp"):
        for key, file in zip(KEYS, files, strict=True):
            emulators.upload_gcs(emulator, NAME, key, file.read_bytes())
        return
    if uri.startswith("ht"):
        (emulator.directory / "root/train").mkdir()
        for key, file in zip(KEYS, files, strict=True):
            (emulator.directory / "root" / key).write_bytes(file.read_bytes())
        return

    async def store() -> None:
        secret = {name: Secret(text) for name, text in options.items() if name in ("secret_access_key", "account_key")}
        async with opened(BucketSettings(uri, uri, **(options | secret))) as origin:  # type: ignore[arg-type]
            for key, file in zip(KEYS, files, strict=True):
                await put(origin, key, file.read_bytes())

    asyncio.run(store())


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        found: bytes = answer.read()
        return found


def read_as_stock(url: str) -> list[str]:
    """Members of a shard, by a tar reader that knows nothing of a node and takes the stream as it comes."""
    with urllib.request.urlopen(url, timeout=60) as answer, tarfile.open(fileobj=answer, mode="r|") as archive:
        return [member.name for member in archive]


def get_through_tar(client: Client, uri: str, etl: WDTransform) -> list[str]:
    """`shardmill get … - | tar -tf -`."""
    command = [sys.executable, "-m", "shardmill.cli", "get", f"{uri}/{KEYS[0]}", "-", "--transform", etl.uuid]
    environ = {**os.environ, "SHARDMILL_ENDPOINT": client.endpoint}
    with (
        subprocess.Popen([*command, "--seed", "1", "--epoch", "0"], stdout=subprocess.PIPE, env=environ) as getting,
        subprocess.Popen(["tar", "-tf", "-"], stdin=getting.stdout, stdout=subprocess.PIPE, text=True) as listing,
    ):
        assert getting.stdout is not None
        assert listing.stdout is not None
        getting.stdout.close()
        names = listing.stdout.read().split()
    assert (getting.returncode, listing.returncode) == (0, 0)
    return names


def check_reading(client: Client, uri: str, etl: WDTransform, names: Sequence[str]) -> None:
    """By a URL of its own, by a stock reader and through a pipe it is the same shard."""
    url = urls_of(client, etl, uri, seed=1)[0]
    assert client.object_url(uri, KEYS[0], etl.uuid, seed=1, epoch=0) == url
    assert read_as_stock(url) == names
    assert get_through_tar(client, uri, etl) == names


@contextlib.contextmanager
def story(*flags: str | Path, data: Path) -> Iterator[tuple[Client, WDTransform]]:
    """A node, and the transform registered there."""
    with running_node(*flags, "--workers", "2", data=data) as node, Client(node.endpoint) as client:
        yield client, WDTransform(client, mirror, transform_name="imagenet-train", errors="fail")


def urls_of(client: Client, etl: WDTransform | None, uri: str, seed: int = 0) -> list[str]:
    if etl is None:
        return client.expand_object_urls(uri, template=TEMPLATE)
    return client.expand_object_urls(uri, transform_id=etl.uuid, template=TEMPLATE, seed=seed, epoch=0)


@pytest.mark.parametrize("cloud", [google, s3, seaweedfs, azure, web])
def test_the_readme_over_a_cloud_cold_and_warm(cloud: Cloud, programs: Path, shards: Path, tmp_path: Path) -> None:
    """Cold the store is asked; warm it is gone. Either way the bytes are those of the same shards in a directory."""
    files = sorted(shards.glob("imagenet-train-*.tar"))[:COUNT]
    local = tmp_path / "local/train"
    local.mkdir(parents=True)
    for key, file in zip(KEYS, files, strict=True):
        shutil.copy(file, tmp_path / "local" / key)
    with contextlib.ExitStack() as stack:
        emulator, uri, options = cloud(programs, stack)
        fill(emulator, uri, options, files)
        lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
        config = tmp_path / "node.toml"
        config.write_text("\n".join(["[[bucket]]", f'uri = "{uri}"', 'revalidate = "never"', *lines, ""]))
        reference = f"{uri}=dir:{tmp_path / 'local'}"
        with story("--bucket", reference, data=tmp_path / "reference") as (client, etl):
            expected = [[read(url) for url in urls_of(client, etl, uri, seed)] for seed in (1, 2)]
        assert expected[0] != expected[1]
        with tarfile.open(fileobj=io.BytesIO(expected[0][0])) as archive:
            names = archive.getnames()
        assert {name.rpartition(".")[2] for name in names} == {"npy", "cls"}
        with story("--config", config, data=tmp_path / "data") as (client, etl):
            # What is first read from the store goes through all of it.
            check_reading(client, uri, etl, names)
            assert [read(url) for url in urls_of(client, etl, uri, seed=1)] == expected[0]
            stack.close()
            with pytest.raises(OSError, match="refused"):
                emulator.request("GET", "/")
            assert [read(url) for url in urls_of(client, etl, uri, seed=1)] == expected[0]
            assert [read(url) for url in urls_of(client, etl, uri, seed=2)] == expected[1]
            assert [read(url) for url in urls_of(client, None, uri)] == [file.read_bytes() for file in files]
            check_reading(client, uri, etl, names)
