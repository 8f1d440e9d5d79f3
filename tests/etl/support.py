"""A shard on disk as a source, functions as source code, and an engine to run them."""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import tarfile
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shardmill.config import TransformSettings
from shardmill.core.api import Code, Kind, TransformRequest
from shardmill.core.commands import parse_argv
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import InMemory, Slice
from shardmill.core.specs import Spec
from shardmill.core.values import Seconds, Size
from shardmill.etl.engine import Engine
from shardmill.etl.runs.running import Reading
from shardmill.etl.versions.registry import Version, check_request

REF = ObjectRef.parse("ais://shards/dir/shard-000000.tar")

IDENTITY = "def transform(sample):\n    return sample\n"

NEIGHBOURS: set[int] = set()
"""Children that were there before the test: nodes that other suites go on using."""


def children() -> set[int]:
    """Pids of this process's children and theirs, since the test began."""
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                below = {int(child) for child in task.read_text().split()} - NEIGHBOURS
                pending += below - found
                found |= below
    return found


async def wait_until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


class FileSource:
    """One file as an opened version of an object."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        self.meta = ObjectMeta(REF.key, status.st_size, "etag", "v1", status.st_mtime)

    @property
    def is_whole(self) -> bool:
        return True

    async def ensure(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= self.meta.size

    async def ensure_some(self, start: int, stop: int) -> int:
        stop = min(stop, self.meta.size)
        await self.ensure(start, stop)
        return stop

    def release(self, position: int) -> None:
        pass

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


def object_request(source: str, kind: Kind = "bytes", **more: Any) -> TransformRequest:
    """A registration of a function over whole objects."""
    request = request_for(source, name=kind)
    return msgspec.structs.replace(request, kind=kind, decoder=None, **more)


def command_request(argv: Sequence[str], **more: Any) -> TransformRequest:
    """A registration of a command line."""
    payload = msgspec.json.encode(parse_argv(argv))
    code = Code("command", payload, hashlib.sha256(payload).hexdigest(), python="")
    return TransformRequest("command", code, "command", **more)


async def register_request(engine: Engine, request: TransformRequest, *, probe: Path | None = None) -> Version:
    """As the node does it."""
    request = check_request(request, engine.settings.max_code)
    source = FileSource(probe) if probe is not None else None
    try:
        probe_with = (source, str(REF)) if source is not None else None
        info, _ = await engine.register(request, probe_with=probe_with, progress=lambda _: None)
    finally:
        if source is not None:
            source.close()
    return engine.versions.get(info.name, info.digest, Spec.parse(info.uuid).args)


def settings_for(**values: float) -> TransformSettings:
    settings = TransformSettings(workers=2, sample_timeout=Seconds(20))
    kinds = {"sample_timeout": Seconds, "object_timeout": Seconds, "idle_workers": Seconds, "load_timeout": Seconds}
    sizes = {"memory", "run_window", "node_window", "max_sample", "max_print", "max_object_output"}
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
    data = bytearray()
    async with open_reading(engine, version, shard, options, seed=seed, request_id=request_id) as reading:
        await reading.start()
        while (part := await reading.next()) is not None:
            data += bytes_of(part)
    return bytes(data)


@asynccontextmanager
async def open_reading(
    engine: Engine, version: Version, shard: Path, options: str = "", *, seed: int | None = None, request_id: str = "r1"
) -> AsyncIterator[Reading]:
    """A place at a run; the result must not be there yet."""
    spec = Spec.parse(f"{version.label}{options}")
    if seed is not None:
        spec = replace(spec, seed=seed)
    source = FileSource(shard)
    try:
        plan = await engine.plan(version, source.meta, REF, spec)
    except BaseException:
        source.close()
        raise
    reading = await engine.runs.open(plan, source, request_id=request_id)
    assert isinstance(reading, Reading)
    try:
        yield reading
    finally:
        reading.close()


def bytes_of(part: Slice) -> bytes:
    if isinstance(part, InMemory):
        return bytes(part.data)
    return os.pread(part.descriptor, part.stop - part.start, part.start)


def members(data: bytes) -> dict[str, bytes]:
    """Name → payload of a whole tar, read by Python's tarfile."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found
