"""`python -m benchmarks`: measure everything, print the tables, and put them where the documentation shows them."""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import (
    ahead,
    client,
    idle,
    listing,
    loading,
    members,
    objects,
    page,
    plane,
    remote,
    serving,
    sharing,
    starting,
    storing,
    transforms,
    writing,
)
from benchmarks.processes import end_when_told
from benchmarks.table import Row, markdown
from benchmarks.transforms import Setting

SHARDS = {"transforms": 4, "serving": 2, "sharing": 2, "workers": 2, "loading": 4, "ahead": 4, "remote": 2}
"""Section → train shards that it reads."""

NGINX = ("idle", "members", "plane", "remote", "writing")
"""Sections that compare with it."""


def main() -> None:
    """Measure, print, keep."""
    arguments = _parse()
    end_when_told()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        # Two processes with two threads each would be slower, and no limit to compare with.
        os.environ.setdefault(name, "1")
    for name in arguments.only or page.TITLES:
        with tempfile.TemporaryDirectory(prefix="shardmill-bench-") as scratch:
            rows = _measure(name, arguments, Path(scratch))
        print(f"\n{page.TITLES[name][0]}\n\n{markdown(rows)}", flush=True)
        if arguments.write:
            # Each as soon as it is done: what follows may fail, or be stopped.
            page.keep({name: _section(name, arguments, rows)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=page.TITLES, help="one section; may be given repeatedly")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=Path, default=os.environ.get("SHARDMILL_TEST_SHARDS"), metavar="DIR")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="made from requirements/bench.lock")
    parser.add_argument(
        "--tensorflow", type=Path, metavar="PYTHON", help="made from requirements/bench-tensorflow.lock"
    )
    parser.add_argument("--nginx", type=Path, metavar="PROGRAM", help="default: the one that is installed, if any")
    parser.add_argument("--peer", metavar="URL", help="another server that takes PUT, to be read beside nginx")
    parser.add_argument("--emulators", type=Path, metavar="DIR", help="of cloud stores, as tools/emulators prints it")
    parser.add_argument("--write", action="store_true", help="into docs/: the figures, the page and the chart")
    return parser.parse_args()


def _measure(name: str, arguments: argparse.Namespace, scratch: Path) -> list[Row]:
    rounds = arguments.rounds
    if name == "objects":
        return objects.measure(scratch, rounds)
    if name == "client":
        return client.measure(scratch, rounds, arguments.peers)
    if name == "storing":
        return storing.measure(scratch, rounds)
    if name == "writing":
        return writing.measure(scratch, rounds, arguments.nginx)
    if name == "members":
        return members.measure(scratch, rounds, arguments.nginx)
    if name == "plane":
        return plane.measure(scratch, rounds, arguments.nginx, arguments.peer)
    if name == "idle":
        return idle.measure(scratch, rounds, arguments.nginx)
    if name == "listing":
        return listing.measure(scratch, rounds)
    directory = _directory(arguments.shards, scratch)
    shards = _shards(directory, SHARDS[name])
    if name == "remote":
        return remote.measure(scratch / "remote", rounds, shards, arguments.nginx, arguments.emulators)
    if name == "ahead":
        return ahead.measure(shards, scratch, rounds)
    if name == "loading":
        return loading.measure(_settings(shards, arguments)[1], scratch, rounds, arguments.tensorflow)
    if name == "serving":
        pillow, torchvision = _settings(shards, arguments)
        # Peers have one interpreter for both.
        pillow = replace(pillow, python=torchvision.python)
        return [*serving.measure(torchvision, rounds), *serving.measure_rates(pillow, rounds)]
    measure: dict[str, Callable[[Setting], list[Row]]] = {
        "transforms": lambda setting: transforms.measure(setting, rounds),
        "sharing": lambda setting: sharing.measure(setting, rounds, arguments.peers),
        "workers": lambda setting: starting.measure(setting, scratch, rounds),
    }
    return [row for setting in transforms.settings_for(shards, arguments.peers) for row in measure[name](setting)]


def _settings(shards: list[Path], arguments: argparse.Namespace) -> tuple[Setting, Setting]:
    """Pillow's and torchvision's."""
    if arguments.peers is None:
        raise SystemExit("peers run in an environment of their own: --peers PYTHON, as `make bench` gives it")
    pillow, torchvision = transforms.settings_for(shards, arguments.peers)
    return pillow, torchvision


def _directory(given: Path | None, scratch: Path) -> Path:
    """Shards to be read: the user's, or photographs packed for the purpose."""
    if given is not None:
        return Path(given)
    from shardmill.cli.photographs import pack_photographs

    return pack_photographs(scratch / "photographs").directory


def _shards(directory: Path, count: int) -> list[Path]:
    paths = sorted(directory.glob("*train*.tar")) or sorted(directory.glob("*.tar"))
    if not paths:
        raise SystemExit(f"{directory} has no shards (*.tar)")
    return paths[:count]


def _section(name: str, arguments: argparse.Namespace, rows: list[Row]) -> page.Section:
    told = ["--only", name, *(["--rounds", str(arguments.rounds)] if arguments.rounds != 5 else [])]
    told += ["--shards", "DIR"] if arguments.shards is not None else []
    told += ["--nginx", "PROGRAM"] if arguments.nginx is not None and name in NGINX else []
    told += ["--peer", "URL"] if arguments.peer is not None and name == "plane" else []
    command = f"make bench ARGS='{' '.join([*told, '--write'])}'"
    if arguments.tensorflow is not None and name == "loading":
        command = f"make bench-tensorflow ARGS='{' '.join([*told, '--write'])}'"
    if arguments.emulators is not None and name == "remote":
        command = f"make bench-remote ARGS='{' '.join([*told[2:], '--write'])}'"
    machine, peers = page.describe_machine(), page.describe_peers(name)
    return page.Section(name, command, page.today(), arguments.rounds, machine, peers, rows)


if __name__ == "__main__":
    main()
