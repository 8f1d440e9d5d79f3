"""The power goes at any point of any change: what was acknowledged is there, the index is complete without a scan."""

import asyncio
import os
from pathlib import Path

import pytest

from shardmill.core.errors import ObjectNotFound
from shardmill.storage import log
from shardmill.storage.pool import PoolStore
from shardmill.testing.stores import NOTHING, keys_on, page_of, put, read
from tests.storage.power import LOSSES, Disk, Loss
from tests.storage.support import make_files, open_pool, run

SMALL, LARGE = 1000, 100_000
KEYS = ("a", "b", "c")

STORY: tuple[tuple[str, int | None], ...] = (
    ("a", SMALL),
    ("b", LARGE),
    ("a", SMALL + 1),
    ("b", SMALL + 2),
    ("a", LARGE + 3),
    ("b", None),
    ("a", SMALL + 4),
    ("b", SMALL + 5),
    ("b", LARGE + 6),
    ("a", None),
    ("c", LARGE + 7),
    ("c", None),
    ("a", SMALL + 8),
)
"""Key and size of what is stored, None: removed. The log and the direct way follow one another on the same keys."""


class Cuts:
    """Tries a start after a cut at every point, in a directory of its own."""

    def __init__(self, scratch: Path, loss: Loss) -> None:
        self._scratch = scratch
        self._loss: Loss = loss
        self.allowed: dict[str, set[int | None]] = {key: {None} for key in KEYS}
        """Sizes that a start may find: what was acknowledged, and what is on its way."""
        self.images: list[tuple[Path, dict[str, set[int | None]]]] = []

    def cut(self, disk: Disk) -> None:
        image = self._scratch / str(len(self.images))
        disk.write_to(image, self._loss)
        self.images.append((image, {key: set(sizes) for key, sizes in self.allowed.items()}))

    async def check(self) -> None:
        for image, allowed in self.images:
            async with open_pool(image) as store:
                assert store._index().is_complete
                found = {key: await size_of(store, key) for key in KEYS}
                for key, size in found.items():
                    assert size in allowed[key], (image.name, key)
                assert keys_on(await page_of(store)) == [key for key, size in found.items() if size is not None]


async def size_of(store: PoolStore, key: str) -> int | None:
    try:
        body, _ = await read(store, key)
    except ObjectNotFound:
        return None
    assert body == content(key, len(body))
    return len(body)


def content(key: str, size: int) -> bytes:
    return (f"{key} {size} ".encode() * (size // 4 + 1))[:size]


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some objects fill it, so that both files are used and forgotten."""
    for name in ("LARGEST", "LEAST"):
        monkeypatch.setattr(log, name, 8192)


@pytest.mark.usefixtures("small_log")
@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_acknowledged_is_there_wherever_the_power_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss
) -> None:
    cuts = Cuts(tmp_path, loss)
    data = tmp_path / "data"
    disk = Disk(data, cuts.cut)

    async def story() -> None:
        async with open_pool(data) as store:
            with monkeypatch.context() as patch:
                disk.watch(patch)
                for number, (key, size) in enumerate(STORY, 1):
                    cuts.allowed[key].add(size)
                    if size is None:
                        await store.delete(key, conditions=NOTHING)
                    else:
                        await put(store, key, content(key, size))
                    cuts.allowed[key] = {size}
                    if number % 5 == 0:
                        await make_files(store)
                cuts.cut(disk)
        disk.close()
        assert len(cuts.images) > 80
        await cuts.check()

    run(story())


@pytest.mark.usefixtures("small_log")
@pytest.mark.parametrize("loss", LOSSES)
def test_many_small_ones_at_once_are_there_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss
) -> None:
    """Groups, more than both files of the log hold."""
    data, image = tmp_path / "data", tmp_path / "image"
    bodies = {f"{number:03d}": os.urandom(300) for number in range(120)}
    disk = Disk(data, lambda _: None)

    async def story() -> None:
        async with open_pool(data) as store:
            with monkeypatch.context() as patch:
                disk.watch(patch)
                await asyncio.gather(*[put(store, key, body) for key, body in bodies.items()])
                disk.write_to(image, loss)
        disk.close()
        async with open_pool(image) as store:
            assert store._index().is_complete
            assert keys_on(await page_of(store)) == list(bodies)
            for key, body in bodies.items():
                assert (await read(store, key))[0] == body

    run(story())
