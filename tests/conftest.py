"""What every test gets: pictures in shards, and a check that it leaves nothing behind."""

import gc
import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Assertions of the shipped suite say what they compared, as those of the tests do.
pytest.register_assert_rewrite("shardmill.testing.stores", "shardmill.testing.origins")

SETTLE_SECONDS = 5.0  # a killed child must be reaped and a closed socket collected within it


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of `imagenet-train-00000N.tar` and `imagenet-val-00000N.tar`: samples of a 8-digit key, `jpg` and `cls`.

    The real ones that `SHARDMILL_TEST_SHARDS` names; without it four and six small ones, made here.
    """
    if given := os.environ.get("SHARDMILL_TEST_SHARDS"):
        directory = Path(given)
        assert list(directory.glob("imagenet-train-*.tar")), f"SHARDMILL_TEST_SHARDS={given} has no training shards"
        return directory
    directory = tmp_path_factory.mktemp("imagenet")
    write_shards(directory, "train", shards=4, samples=32)
    write_shards(directory, "val", shards=6, samples=8)
    return directory


@pytest.fixture
def picture(tmp_path: Path, shards: Path) -> Path:
    """A JPEG of the first shard."""
    with tarfile.open(next(iter(sorted(shards.glob("*.tar"))))) as archive:
        member = next(member for member in archive if member.name.endswith("jpg"))
        file = archive.extractfile(member)
        assert file is not None
        path = tmp_path / "picture.jpg"
        path.write_bytes(file.read())
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaves a child process, a thread that would keep the program alive, or an open descriptor.

    Fixtures of a wider scope are set up before this one, so what they hold is not counted.
    """
    checks: dict[str, Callable[[], dict[str, str]]] = {
        "child processes": _children,
        "threads": _threads,
        "descriptors": _descriptors,
    }
    before = {name: set(held()) for name, held in checks.items()}
    yield
    for name, held in checks.items():
        left = _wait_released(held, before[name])
        assert not left, f"left behind {name}: {left}"


def _wait_released(held: Callable[[], dict[str, str]], before: set[str]) -> dict[str, str]:
    """What is still held that was not before, after collecting garbage and some seconds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    collected = False
    while True:
        left = {key: text for key, text in held().items() if key not in before}
        if not left or time.monotonic() > deadline:
            return left
        if not collected:
            gc.collect()
            collected = True
        else:
            time.sleep(0.01)


def _children() -> dict[str, str]:
    found = {}
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            for pid in task.read_text().split():
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def _threads() -> dict[str, str]:
    return {str(thread.ident): thread.name for thread in threading.enumerate() if not thread.daemon}


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of this very listing
            continue
        if not target.startswith("/dev/"):
            found[f"{name} {target}"] = target
    return found


def write_shards(directory: Path, kind: str, *, shards: int, samples: int) -> None:
    """Write `imagenet-{kind}-00000N.tar` of pictures made here."""
    import numpy as np
    import PIL.Image

    numbers = np.random.default_rng(len(kind))
    for shard in range(shards):
        with tarfile.open(directory / f"imagenet-{kind}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for ordinal in range(samples):
                height, width = (int(side) for side in numbers.integers(120, 400, 2))
                # Coarse noise enlarged: smooth enough for JPEG, different everywhere, so that no crop equals another.
                plane = numbers.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
                picture = PIL.Image.fromarray(plane).resize((width, height), PIL.Image.Resampling.BICUBIC)
                # One in eight is grey, as photographs in data sets are.
                stream = io.BytesIO()
                picture.convert("L" if ordinal % 8 == 5 else "RGB").save(stream, "JPEG", quality=90)
                key = f"{shard * samples + ordinal:08d}"
                for field, payload in (("cls", b"%d" % numbers.integers(1000)), ("jpg", stream.getvalue())):
                    member = tarfile.TarInfo(f"{key}.{field}")
                    member.size, member.mtime, member.mode = len(payload), 1_700_000_000, 0o644
                    archive.addfile(member, io.BytesIO(payload))
