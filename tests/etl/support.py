"""A shard on disk as a source, functions as source code, and an engine to run them."""

import hashlib
import io
import json
import os
import tarfile
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from shardmill.config import Seconds, Size, TransformSettings
from shardmill.core.api import Code, TransformRequest
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import Spec
from shardmill.etl.engine import Engine
from shardmill.etl.versions import Version

REF = ObjectRef.parse("ais://shards/dir/shard-000000.tar")

IDENTITY = "def transform(sample):\n    return sample\n"


class FileSource:
    """One file as an opened version of an object."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        self.meta = ObjectMeta(REF.key, status.st_size, "etag", "v1", status.st_mtime)

    async def ensure(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= self.meta.size

    async def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.descriptor)


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A shard with keys 0000, 0001, …"""
    with tarfile.open(path, "w") as archive:
        for ordinal, fields in enumerate(samples):
            for name, data in fields.items():
                member = tarfile.TarInfo(f"{ordinal:04d}.{name}")
                member.size, member.mtime = len(data), 1_700_000_000
                archive.addfile(member, io.BytesIO(data))
    return path


def request_for(
    source: str, *, name: str = "t", decoder: str | None = "pil", function: str = "transform"
) -> TransformRequest:
    """A registration of source code, as `ship_file` makes it."""
    text = textwrap.dedent(source)
    payload = json.dumps({"source": text, "function": function, "filename": "/home/user/transform.py"}).encode()
    import sys

    code = Code(
        encoding="source",
        payload=payload,
        form=hashlib.sha256(payload).hexdigest(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        label="/home/user/transform.py:1",
    )
    return TransformRequest(name=name, code=code, decoder=decoder)


def settings_for(**values: float) -> TransformSettings:
    settings = TransformSettings(workers=2, sample_timeout=Seconds(20))
    kinds = {"sample_timeout": Seconds, "object_timeout": Seconds, "idle_workers": Seconds, "load_timeout": Seconds}
    sizes = {"memory", "run_window", "node_window", "max_sample", "max_print"}
    typed = {
        key: kinds[key](value) if key in kinds else Size(value) if key in sizes else int(value)
        for key, value in values.items()
    }
    return replace(settings, **typed)  # type: ignore[arg-type]  # each value has its field's type by now


@asynccontextmanager
async def open_engine(data: Path, **values: float) -> AsyncIterator[Engine]:
    async with Engine.open(settings_for(**values), data, ()) as engine:
        yield engine


async def register(engine: Engine, source: str, **options: str) -> Version:
    info, _ = await engine.register(request_for(source, **options), probe_with=None, progress=lambda _: None)
    return engine.versions.get(info.name, info.digest)


async def read(
    engine: Engine, version: Version, shard: Path, options: str = "", *, seed: int | None = None, request_id: str = "r1"
) -> bytes:
    """The whole transformed shard."""
    spec = Spec.parse(f"{version.label}{options}")
    source = FileSource(shard)
    chosen = seed if seed is not None else spec.seed if spec.seed is not None else engine.draw_seed()
    data = bytearray()
    try:
        async with engine.run(version, source, REF, spec, seed=chosen, request_id=request_id) as run:
            await run.start()
            async for chunk in run:
                data += chunk
    finally:
        source.close()
    return bytes(data)


def members(data: bytes) -> dict[str, bytes]:
    """Name → payload of a whole tar, read by Python's tarfile."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found
