"""`python -m benchmarks`: measure everything, print the table, and write it where the documentation shows it."""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

from benchmarks import ahead, objects, sharing, storing, transforms
from benchmarks.table import Row, markdown
from shardmill.config import available_cores

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `{command}` on {when}: {cores} cores, {machine}, Python {python}. Ratios, because a machine's own speed drifts:
rounds of shardmill and of the limit take turns in one run, and what is shown is the median with its range, of {rounds}
rounds. The reader, curl, has to share the same cores. Limits are named in each line: a *bare process* only decodes and
calls the function, in a loop, on bytes in memory; a *bare sendfile loop* sends one file and cannot do anything else.

"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=Path, default=os.environ.get("SHARDMILL_TEST_SHARDS"))
    parser.add_argument("--torch", type=Path, help="an interpreter with torchvision, measured too")
    parser.add_argument("--only", choices=("transforms", "sharing", "ahead", "objects", "storing"))
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    arguments = parser.parse_args()

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="shardmill-bench-") as scratch:
        directory = Path(scratch)
        if arguments.only in (None, "transforms"):
            shards = _shards(arguments.shards)
            for setting in transforms.settings_for(shards, arguments.torch):
                rows += transforms.measure(setting, arguments.rounds)
        if arguments.only in (None, "sharing"):
            for setting in transforms.settings_for(_shards(arguments.shards), arguments.torch):
                rows += sharing.measure(setting, arguments.rounds)
        if arguments.only in (None, "ahead"):
            rows += ahead.measure(_shards(arguments.shards, "val", 6), arguments.rounds)
        if arguments.only in (None, "objects"):
            rows += objects.measure(directory, arguments.rounds)
        if arguments.only in (None, "storing"):
            rows += storing.measure(directory / "storing", arguments.rounds)
    text = markdown(rows)
    print(text)
    if arguments.write:
        head = HEAD.format(
            command="make bench ARGS='--shards DIR --torch PYTHON --write'",
            when=time.strftime("%Y-%m-%d"),
            cores=available_cores(),
            machine=platform.machine(),
            python=platform.python_version(),
            rounds=arguments.rounds,
        )
        PAGE.write_text(f"{head}{text}\n", encoding="utf-8")


def _shards(given: Path | None, kind: str = "train", count: int = 2) -> list[Path]:
    if given is None:
        raise SystemExit("name a directory of JPEG shards (jpg and cls): --shards DIR")
    paths = sorted(Path(given).glob(f"*{kind}*.tar"))[:count]
    if not paths:
        raise SystemExit(f"{given} has no *{kind}*.tar")
    return paths


if __name__ == "__main__":
    main()
