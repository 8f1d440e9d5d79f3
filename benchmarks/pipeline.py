"""What a reader runs: samples by WebDataset, or by a loop that does no more than it must.

`python pipeline.py WAY [FILE.py:FUNCTION]` prints `ready`, then for each line, the URL of a shard, the samples and the
CPU seconds that it took. The way is `stock` or `thin`, which fetch, unpack, decode and call the function, as a trainer
does without transforms in the store; or `made`, which reads what the store has made: there is no function to call.
"""

import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.raw import decode, load

Sample = dict[str, Any]


def read_stock(url: str, function: Callable[[Sample], Any]) -> Iterator[Sample]:
    """As WebDataset's users write it."""
    import webdataset

    yield from webdataset.WebDataset(url, shardshuffle=False).decode("pil").map(function)


def read_made(url: str) -> Iterator[Sample]:
    """Samples whose function the store has called."""
    import webdataset

    yield from webdataset.WebDataset(url, shardshuffle=False).decode()


def read_thinly(url: str, function: Callable[[Sample], Any]) -> Iterator[Sample]:
    """By the standard library and Pillow alone, which knows two kinds of fields and no more."""
    fields: dict[str, bytes] = {}
    key = ""
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as archive:
        for member in archive:
            name, _, field = member.name.partition(".")
            if name != key and fields:
                yield function(decode(fields))
                fields = {}
            key = name
            file = archive.extractfile(member)
            assert file is not None
            fields[field] = file.read()
    yield function(decode(fields))


def main() -> None:
    way, *target = sys.argv[1:]
    read: Callable[[str], Iterator[Sample]] = read_made
    if target:
        read = partial({"stock": read_stock, "thin": read_thinly}[way], function=load(target[0]))
    print("ready", flush=True)
    for line in sys.stdin:
        before, samples = os.times(), 0
        for _ in read(line.strip()):
            samples += 1
        # With what was started for it and has ended: WebDataset reads by curl.
        print(samples, sum(os.times()[:4]) - sum(before[:4]), flush=True)


if __name__ == "__main__":
    main()
