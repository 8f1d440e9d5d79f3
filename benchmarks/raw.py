"""The limit: decode and function in a loop, on bytes in memory, in a process of its own.

`python raw.py FILE.py:FUNCTION SHARD…` prints `ready`, waits for a line, runs every sample once and prints the seconds.
Standard library, Pillow and what the function imports; it also runs in the torch environment.
"""

import importlib.util
import io
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import PIL.Image


def load(target: str) -> Callable[[dict[str, Any]], Any]:
    """The function of `FILE.py:FUNCTION`."""
    path, _, name = target.rpartition(":")
    function: Callable[[dict[str, Any]], Any] = getattr(module_of(path), name)
    return function


def module_of(path: str) -> Any:
    """What a file defines."""
    spec = importlib.util.spec_from_file_location("measured", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Processes of a pool find the function by its module's name.
    sys.modules["measured"] = module
    spec.loader.exec_module(module)
    return module


def read(paths: list[str]) -> list[dict[str, bytes]]:
    """Samples of the shards, undecoded."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    key, _, field = member.name.partition(".")
                    samples.setdefault(f"{path}/{key}", {})[field] = file.read()
    return list(samples.values())


def decode(fields: dict[str, bytes]) -> dict[str, Any]:
    """As WebDataset's `decode("pil")`."""
    picture = PIL.Image.open(io.BytesIO(fields["jpg"]))
    picture.load()
    return {"__key__": "key", "jpg": picture.convert("RGB"), "cls": int(fields["cls"])}


def main() -> None:
    function, samples = load(sys.argv[1]), read(sys.argv[2:])
    for fields in samples[:10]:
        function(decode(fields))
    print("ready", len(samples), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for fields in samples:
            function(decode(fields))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
