"""A client-side pipeline, as a trainer runs it without transforms in the store: fetch, unpack, decode, call.

`python pipeline.py FILE.py:FUNCTION` prints `ready`, then for each line, the URL of a shard, the samples and the CPU
seconds that it took. WebDataset where it is installed; else the standard library and Pillow.
"""

import importlib.util
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.raw import decode, load

Sample = dict[str, Any]


def read_by_webdataset(url: str) -> Iterator[Sample]:
    """As its users write it."""
    import webdataset

    yield from webdataset.WebDataset(url, shardshuffle=False).decode("pil")


def read_plainly(url: str) -> Iterator[Sample]:
    """Samples of a shard, decoded."""
    fields: dict[str, bytes] = {}
    key = ""
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as archive:
        for member in archive:
            name, _, field = member.name.partition(".")
            if name != key and fields:
                yield decode(fields)
                fields = {}
            key = name
            file = archive.extractfile(member)
            assert file is not None
            fields[field] = file.read()
    yield decode(fields)


def main() -> None:
    function: Callable[[Sample], Any] = load(sys.argv[1])
    read = read_by_webdataset if importlib.util.find_spec("webdataset") else read_plainly
    print("ready", flush=True)
    for line in sys.stdin:
        before, samples = os.times(), 0
        for sample in read(line.strip()):
            function(sample)
            samples += 1
        print(samples, sum(os.times()[:4]) - sum(before[:4]), flush=True)


if __name__ == "__main__":
    main()
