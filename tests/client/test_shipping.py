"""Functions leave for another process: what they take along, what they are known by, and what cannot leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardmill.client.shipping import CannotShip, Shipment, ship, ship_file
from shardmill.client.transforms import legal_name
from shardmill.core.errors import BadRequest
from shardmill.marking import transform

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

    def call(self, argument: object) -> Any:
        """What the function returns in a fresh interpreter."""
        import cloudpickle
        import numpy

        paths = sorted({str(Path(str(module.__file__)).parent.parent) for module in (cloudpickle, numpy)})
        arguments = [str(self.payload), json.dumps(paths), json.dumps(argument)]
        return json.loads(run_python("-I", "-S", "-c", LOAD, *arguments, directory=self.payload.parent))


def run_python(*arguments: str, directory: Path, hash_seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
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


SCRIPT = """
import dataclasses
import enum
import functools
import logging
import re
import numpy as np
import helpers
import package.part

WORDS = {"alpha", "beta", "gamma", "delta", 3, (1, "x")}
PATTERN = re.compile(r"[a-z]+")
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
logger = logging.getLogger(__name__)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Base:
    scale = 2

    def apply(self, x):
        return x * self.scale


@dataclasses.dataclass
class Twice(Base):
    tags: set = dataclasses.field(default_factory=lambda: {"a", "b", "c"})

    def apply(self, x):
        return super().apply(x) + len(self.tags)


TWICE = Twice()


@functools.lru_cache(maxsize=4)
def cached(x):
    return x + 1


def is_even(n):
    return True if n == 0 else is_odd(n - 1)


def is_odd(n):
    return False if n == 0 else is_even(n - 1)


def augment(sample, *, letters=frozenset({"z", "y", "x"})):
    import helpers as again
    from package.part import third

    class Local:
        words = WORDS

    logger.debug("at work")
    return [
        TWICE.apply(sample), sorted(map(str, Local.words)), PATTERN.match("ab1").group(), float(ARRAY.sum()),
        Colour.RED.name, helpers.scale(2), again.scale(5), package.part.second(), third(), cached(4), is_even(10),
        sorted(letters), [word for word in ("q", "u") if word in {"q", "r", "s"}],
    ]
"""
FILES = {
    "helpers.py": "import threading\nLOCK = threading.Lock()\nFACTOR = 3\n\n\ndef scale(x):\n    return x * FACTOR\n",
    "package/__init__.py": "",
    "package/part.py": "from . import deep\n\n\ndef second():\n    return deep.value()\n\n\n"
    "def third():\n    from .deep import value\n    return value() + 1\n",
    "package/deep.py": "def value():\n    return 42\n",
}
RESULT = [
    9, ["(1, 'x')", "3", "alpha", "beta", "delta", "gamma"], "ab", 15.0, "RED", 6, 15, 42, 43, 5, True, ["x", "y", "z"], ["q"],
]  # fmt: skip


def test_six_processes_give_one_form_and_a_changed_constant_another(tmp_path: Path) -> None:
    """Three hash seeds, two directories, and a comment line: the same code; a constant of a helper: other code."""
    commented = SCRIPT.replace("def augment", "# Shifts every line below.\n\n\ndef augment").replace(
        "    logger.debug", "    # Inside, too.\n    logger.debug"
    )
    clients = [
        ship_from(tmp_path / "first", SCRIPT, FILES, seed=0),
        ship_from(tmp_path / "first", SCRIPT, FILES, seed=1),
        ship_from(tmp_path / "first", SCRIPT, FILES, seed=2),
        ship_from(tmp_path / "second" / "place", SCRIPT, FILES, seed=0),
        ship_from(tmp_path / "second" / "place", SCRIPT, FILES, seed=3),
        ship_from(tmp_path / "commented", commented, FILES, seed=1),
    ]
    assert len({client.form for client in clients}) == 1
    changed = {**FILES, "helpers.py": FILES["helpers.py"].replace("FACTOR = 3", "FACTOR = 4")}
    other = ship_from(tmp_path / "changed", SCRIPT, changed)
    assert other.form != clients[0].form
    assert clients[0].modules == ["numpy"]
    assert clients[0].name == "augment"
    assert clients[0].label.startswith(str(tmp_path / "first" / "job.py:"))
    assert all(client.call(3) == RESULT for client in (clients[0], clients[4], clients[5]))
    assert other.call(3) == [*RESULT[:5], 8, 20, *RESULT[7:]]


def form(function: Callable[..., Any]) -> str:
    return ship(function).form


def test_marks_do_not_change_what_a_function_is() -> None:
    def double(sample: int) -> int:
        return 2 * sample

    plain = form(double)
    assert form(transform(name="twice", decoder=None)(double)) == plain


def test_a_lambda_has_no_name() -> None:
    assert legal_name(ship(lambda sample: sample).name) == ""


def test_what_cannot_leave_is_named_with_the_way_to_it() -> None:
    import threading

    held = {"inner": [threading.Lock()]}

    def augment(sample: Any) -> Any:
        return held, sample

    with pytest.raises(CannotShip) as caught:
        ship(augment)
    assert str(caught.value) == (
        "`held['inner'][0]` (captured variable `held` of function `augment`) is a lock, which cannot leave this "
        "process; create it inside the function"
    )


def test_a_file_is_shipped_as_text_that_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "import os\nimport numpy\nraise RuntimeError('not to be run')\n\n\ndef keep(sample):\n    return sample\n"
    file.write_text(text)
    shipment = ship_file(f"{file}:keep")
    document = json.loads(shipment.payload)
    assert document == {"source": text, "function": "keep", "filename": str(file)}
    assert (shipment.encoding, shipment.name, shipment.label) == ("source", "keep", f"{file}:6")
    assert shipment.modules == ("numpy",)
    with pytest.raises(BadRequest, match="defines no 'other'; it defines keep"):
        ship_file(f"{file}:other")


def test_comments_in_a_file_do_not_count_but_the_name_does(tmp_path: Path) -> None:
    def of(text: str, name: str = "one") -> Shipment:
        (tmp_path / "mine.py").write_text(text)
        return ship_file(f"{tmp_path / 'mine.py'}:{name}")

    text = "def one(s):\n    return s\n\n\ndef two(s):\n    return s, 1\n"
    plain = of(text).form
    assert of("# A comment.\n" + text).form == plain
    assert of(text, "two").form != plain
    assert of(text.replace("1", "2")).form != plain
