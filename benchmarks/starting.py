"""Workers: how soon one that nobody has needed before gives its first sample, and the memory that another one takes."""

import contextlib
import time
from pathlib import Path

from benchmarks.processes import children_of, private
from benchmarks.table import Row, Samples, wait_quiet
from benchmarks.transforms import BUCKET, Setting, served

WORKERS = 4


def measure(setting: Setting, scratch: Path, rounds: int) -> list[Row]:
    """With the environment's process warm: it has imported what the function needs."""
    path, _, name = setting.target.rpartition(":")
    source = Path(path).read_text()
    start, again, memory = Samples(), Samples(), Samples()
    with served(setting, WORKERS) as node:
        handle = node.client.object(f"{BUCKET}/{setting.shards[0].name}")

        def first_sample(spec: str) -> float:
            began = time.perf_counter()
            with handle.get(spec) as reader:
                reader.read(1)
                taken = time.perf_counter() - began
                reader.read()
            return taken * 1000

        for number in range(rounds * 3):
            # Each version has workers of its own.
            another = scratch / "another.py"
            another.write_text(f"{source}\n\ndef another(sample, number={number}):\n    return {name}(sample)\n")
            info = node.client.transforms.add(f"{another}:another", "another")
            start.add(first_sample(f"{info.uuid},count=1"))
            wait_quiet()
            again.add(first_sample(f"{info.uuid},count=1"))
            wait_quiet()
        with handle.get(node.spec) as reader:
            while reader.read(1 << 20):
                pass
        wait_quiet()
        for zygote in children_of(node.node.pid):
            for worker in children_of(zygote):
                with contextlib.suppress(OSError):
                    memory.add(private(worker) / 1e6)
    return [
        Row(
            f"{setting.name}: first sample of a new version, its worker being started for it", start, "ms", at_most=150
        ),
        Row(f"{setting.name}: the same again, the worker being there", again, "ms"),
        Row(f"{setting.name}: private memory of a worker", memory, "MB", at_most=40),
    ]
