"""What the servers here share: a shard's samples by WebDataset, and what a function gives as a tar again."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

Sample = dict[str, Any]
Function = Callable[[Sample], Any]


def decoded(stream: BinaryIO) -> Iterator[Sample]:
    """As `WebDataset(…).decode("pil")` gives them."""
    import webdataset as wds

    source = {"url": "shard.tar", "stream": stream}
    yield from wds.decode("pil")(wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander([source])))


def transformed(stream: BinaryIO, function: Function) -> Iterator[bytes]:
    """The shard of what the function gives, a sample at a time; by WebDataset's writer."""
    import webdataset as wds

    buffer = io.BytesIO()
    writer = wds.TarWriter(buffer)
    for sample in decoded(stream):
        sample.pop("__local_path__", None)
        writer.write(function(sample))
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    writer.close()
    yield buffer.getvalue()
