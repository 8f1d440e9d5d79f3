"""kill -9 of a node while it streams: WebDataset never takes what has arrived for a whole shard."""

import io
import random
import time
from pathlib import Path

import pytest
from webdataset import tariterators

from tests.etl.over_http import serve
from tests.etl.runs.test_kills import SEGMENT, SlowReader
from tests.etl.support import IDENTITY, write_shard
from tests.torch.nodes import SERVER_PYTHON, SOURCES

MOMENTS = 8


def count_samples(data: bytes) -> int:
    """As `WebDataset` reads a stream; raises what it raises."""
    files = tariterators.tar_file_iterator(io.BytesIO(data))
    return sum(1 for _ in tariterators.group_by_keys({**file, "__url__": "s.tar"} for file in files))


@pytest.mark.timeout(300)
def test_webdataset_complains_about_every_cut(tmp_path: Path) -> None:
    order = random.Random(3)
    shards = tmp_path / "shards"
    shards.mkdir()
    samples = [{"cls": b"7", "txt": order.randbytes(order.randrange(1, 3000))} for _ in range(12_000)]
    whole = write_shard(shards / "s.tar", samples).read_bytes()
    assert count_samples(whole) == 12_000
    for moment in range(MOMENTS):
        data = tmp_path / "data"
        with serve(shards, "--workers", "2", data=data, environ=SOURCES, python=SERVER_PYTHON) as served:
            info = served.register(IDENTITY, decoder=None)
            reader = SlowReader(served, served.path(info, "s.tar"), segment=SEGMENT if moment % 2 else None)
            reader.take(order.randrange(12_000, 150_000))
            time.sleep(order.random() / 4)
            served.node.kill()
            cut, is_complete = reader.finish()
        assert not is_complete
        with pytest.raises(Exception, match=r"unexpected end|end of data|bad|empty|truncated"):
            count_samples(cut)
