"""Room on the disk for cached objects."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardmill.storage.cache.disk import CacheDisk
from tests.storage.cache.support import run

CAPACITY = 1000


@dataclass(eq=False)
class Item:
    """A file that may leave."""

    disk: CacheDisk
    path: Path
    taken: int
    used: float = 0.0
    may_leave: bool = True

    def leave(self) -> Sequence[Path]:
        self.disk.forget(self)
        self.disk.give_back(self.taken)
        return [self.path]


@pytest.mark.parametrize("cancelled", [None, 0, 1])
def test_nobody_has_room_of_files_that_are_still_there(tmp_path: Path, cancelled: int | None) -> None:
    """Whoever leaves, the one that removes them or one that waits for that, takes none."""

    async def story() -> None:
        gone = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            disk = CacheDisk(tmp_path, capacity=CAPACITY, high=100, low=50, threads=threads)
            old = Item(disk, tmp_path / "old", 900)
            old.path.write_bytes(bytes(900))
            await disk.take(900)
            disk.add(old)
            asyncio.get_running_loop().run_in_executor(threads, gone.wait)
            first, second = (asyncio.ensure_future(disk.take(300)) for _ in range(2))
            try:
                for _ in range(20):
                    await asyncio.sleep(0)
                assert old.path.exists()
                assert not first.done()
                assert not second.done()
                if cancelled is not None:
                    (first, second)[cancelled].cancel()
            finally:
                gone.set()
            await asyncio.wait([first, second])
            assert not old.path.exists()
            assert disk.used == (600 if cancelled is None else 300)

    run(story())
