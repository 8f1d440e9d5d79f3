"""Functions that jobs run, and looks at what they did."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from typing import Any

from shardmill.client import Client
from shardmill.core.jobs import JobDetails
from tests.server.readers import wait_until

SOURCE = "gs://sharded-imagenet"
VAL = [f"imagenet-val-{number:06d}.tar" for number in range(6)]
Sample = dict[str, Any]


def shrink(sample: Sample) -> Sample:
    """Random, so that a job that drew otherwise than its URL would be seen."""
    import random

    side = random.choice([24, 32, 40])
    sample["jpg"] = sample["jpg"].convert("RGB").resize((side, side))
    return sample


def shrink_slowly(sample: Sample) -> Sample:
    import time

    time.sleep(0.02)
    return shrink(sample)


def shrink_some(sample: Sample) -> Sample:
    if int(sample["__key__"]) % 5 == 3:
        raise ValueError("unlucky " + sample["__key__"])
    return shrink(sample)


def fail_always(sample: Sample) -> Sample:
    raise ValueError("never")


def reverse(data: bytes) -> bytes:
    return data[::-1]


def tar_of(samples: dict[str, bytes]) -> bytes:
    """A shard of one field a sample."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for key, payload in samples.items():
            member = tarfile.TarInfo(f"{key}.txt")
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return stream.getvalue()


def digests(client: Client, bucket: str, prefix: str = "") -> dict[str, str]:
    """Key → hash of everything in a bucket but manifests."""
    return {
        item.key: hashlib.sha256(client.object(f"{bucket}/{item.key}").read()).hexdigest()
        for item in client.bucket(bucket).list(prefix)
        if not item.key.startswith(".shardmill/")
    }


def inline(client: Client, bucket: str, key: str, spec: str) -> str:
    """Hash of what the URL gives."""
    return hashlib.sha256(client.object(f"{bucket}/{key}").read(spec)).hexdigest()


def wait_for(client: Client, job: str, holds: Callable[[JobDetails], bool], what: str) -> None:
    wait_until(lambda: holds(client.jobs.get(job)), what)
