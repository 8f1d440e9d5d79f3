"""A client-side pipeline, as a trainer runs it without transforms in the store: fetch, unpack, decode, call.

`python pipeline.py FILE.py:FUNCTION` prints `ready`, then for each line, the URL of a shard, the samples and the CPU
seconds that it took. Standard library, Pillow and what the function imports.
"""

import io
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.raw import decode, load


def run(target: str, url: str) -> int:
    """Every sample of a shard, one after the other; returns how many."""
    function, fields, key, count = load(target), dict[str, bytes](), "", 0
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as archive:
        for member in archive:
            name, _, field = member.name.partition(".")
            if name != key and fields:
                function(decode(fields))
                fields, count = {}, count + 1
            key = name
            file = archive.extractfile(member)
            assert file is not None
            fields[field] = io.BytesIO(file.read()).getvalue()
    function(decode(fields))
    return count + 1


def main() -> None:
    target = sys.argv[1]
    load(target)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        samples = run(target, line.strip())
        print(samples, time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
