"""Workers that report what cannot be: no sample is lost over it without the run's saying so."""

import asyncio
from pathlib import Path

import pytest

from shardmill.core.errors import TransformFailed
from tests.etl.support import open_engine, read, register, write_shard

# A function can reach all that is in its process, the list of what is to be reported included.
FORGE = """
import gc

def transform(sample):
    if sample["__key__"] == "0003":
        worker = next(item for item in gc.get_objects() if type(item).__name__ == "Worker")
        worker._results.append([3, "out", [[1 << 40, 10, 5]], "0003", "0003", 1, False])
    return sample
"""


def test_a_report_of_a_region_that_is_none_fails_the_run_after_a_second_try(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard.tar", [{"txt": b"%d" % number} for number in range(6)])

    async def run() -> bytes:
        async with open_engine(tmp_path / "data") as engine:
            return await read(engine, await register(engine, FORGE), shard)

    with pytest.raises(TransformFailed, match=r"'0003'.*broke the protocol.*tried 2 times"):
        asyncio.run(run())
