"""Functions shipped from processes of their own, and called where nothing of the user's exists."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from shardmill.client.shipping import PYTHON, ship
from shardmill.core.api import Code
from shardmill.etl.versions.fingerprints import fingerprint

Files = dict[str, str]

SHIP = "\nfrom shardmill.client.shipping import ship\n\n{before}s = ship({what})\n"
REPORT = """
import json, sys
print(json.dumps({"form": s.form, "modules": list(s.modules), "label": s.label, "name": s.name}))
open(sys.argv[1], "wb").write(s.payload)
"""
# As a worker is: nothing of the user's is there, and of this package nothing at all.
LOAD = """
import json, pickle, sys
sys.path += json.loads(sys.argv[2])
sys.modules["shardmill"] = None
function = pickle.load(open(sys.argv[1], "rb"))
print(json.dumps(function(json.loads(sys.argv[3]))))
"""


@dataclass(frozen=True)
class Shipped:
    """What a client process said of its function."""

    form: str
    modules: list[str]
    label: str
    name: str
    payload: Path

    @property
    def fingerprint(self) -> str:
        """What a node would know it by."""
        return fingerprint(Code("cloudpickle", self.payload.read_bytes(), self.form, PYTHON))

    def call(self, argument: object) -> Any:
        """What the function returns in a fresh interpreter."""
        paths = sorted({str(Path(str(module.__file__)).parent.parent) for module in (cloudpickle, np)})
        arguments = [str(self.payload), json.dumps(paths), json.dumps(argument)]
        return json.loads(run_python("-I", "-S", "-c", LOAD, *arguments, directory=self.payload.parent))


def run_python(*arguments: str, directory: Path, hash_seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ship_from(
    directory: Path, script: str, files: Files | None = None, *, what: str = "augment", before: str = "", seed: int = 0
) -> Shipped:
    """Ship a function from a script of its own process."""
    for name, text in {**(files or {}), "job.py": script + SHIP.format(what=what, before=before) + REPORT}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    payload = directory / f"{what}-{seed}.code"
    return Shipped(
        **json.loads(run_python("job.py", str(payload), directory=directory, hash_seed=seed)), payload=payload
    )


def form(function: Callable[..., Any]) -> str:
    return ship(function).form


def form_of_value(value: object) -> str:
    """Of a function that has captured the value."""
    return form(lambda sample: (sample, value))


def come_back(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the shipped bytes load as, here."""
    loaded: Callable[..., Any] = pickle.loads(ship(function).payload)
    assert callable(loaded)
    return loaded


def capturing(value: object) -> Callable[[Any], Any]:
    """A function that holds the value."""
    return lambda sample: (value, sample)
