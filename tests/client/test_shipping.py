"""Functions leave for another process and work there as they did here."""

import enum
import functools
import json
import os
import pickle
import random
import re
import sys
import xml.dom.minidom
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import PIL.Image
import pytest

from shardmill.client.shipping import CannotShip, Shipment, ship, ship_file
from shardmill.client.transforms import legal_name
from shardmill.core.errors import BadRequest
from tests.client.processes import LOAD, Shipped, capturing, come_back, form, run_python, ship_from


class Base:
    scale = 2

    def __init__(self, start: int = 1) -> None:
        self.start = start

    def __call__(self, sample: int) -> int:
        return self.start + sample * self.scale

    def method(self, sample: int) -> int:
        return self(sample) + 100


class Slotted(Base):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(5)
        self.extra = 7

    @functools.cached_property
    def doubled(self) -> int:
        return self.extra * 2

    def __call__(self, sample: int) -> int:
        return super().__call__(sample) + self.doubled


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"

    @property
    def other(self) -> "Colour":
        return Colour.BLUE if self is Colour.RED else Colour.RED


class Bits(enum.Flag):
    A = 1
    B = 2


class Pair(NamedTuple):
    left: int
    right: int = 9


@dataclass(frozen=True, slots=True, order=True)
class Frozen:
    x: int
    tags: set[str] = field(default_factory=lambda: {"t"}, compare=False)


def decorated(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def wrapper(sample: Any) -> Any:
        return ["wrapped", function(sample)]

    return wrapper


@decorated
def wrapped(sample: int) -> int:
    return sample + 1


@functools.cache
def remembered(sample: int) -> int:
    return sample * 3


CONSTANT = 11


def with_local_class(sample: int) -> Any:
    class Local(Base):
        kept = CONSTANT

        def both(self) -> tuple[int, int]:
            return super().method(sample), self.kept

    return Local().both()


def counts_down(sample: int) -> int:
    return 0 if sample == 0 else 1 + counts_down(sample - 1)


ARRAY = np.arange(6, dtype=np.int16).reshape(2, 3)
PICTURE = PIL.Image.new("RGB", (3, 3), (1, 2, 3))

ROUND_TRIPS: dict[str, tuple[Callable[..., Any], Any]] = {
    "a function": (counts_down, 5),
    "a decorated function": (wrapped, 3),
    "a cached function": (remembered, 4),
    "a lambda": (lambda sample: sample + CONSTANT, 1),
    "a partial": (functools.partial(divmod, 17), 5),
    "a bound method": (Base(3).method, 4),
    "a callable object": (Slotted(), 3),
    "a class": (Base, 3),
    "a local class": (with_local_class, 2),
    "an enum": (lambda name: (Colour[name].other.name, (Bits.A | Bits.B).value, Colour("r") is Colour.RED), "RED"),
    "a named tuple": (lambda sample: (Pair(sample), Pair(1)._replace(left=4).left), 2),
    "a dataclass": (lambda sample: (Frozen(sample) < Frozen(5), Frozen(1).tags), 2),
    "an array": (lambda sample: [*ARRAY.tolist(), ARRAY.dtype.str, sample], 0),
    "a picture": (lambda sample: (PICTURE.getpixel((1, 1)), PICTURE.size, sample), 0),
    "a submodule": (
        lambda sample: [xml.dom.minidom.parseString(text).toxml() for text in sample],
        ["<a/>"],
    ),
}


@pytest.mark.parametrize("what", ROUND_TRIPS)
def test_what_is_shipped_works_where_nothing_of_it_exists(what: str, tmp_path: Path) -> None:
    function, argument = ROUND_TRIPS[what]
    here = function(argument)
    shipment = ship(function)
    payload = tmp_path / "function.code"
    payload.write_bytes(shipment.payload)
    there = Shipped(shipment.form, list(shipment.modules), shipment.label, shipment.name, payload)
    script = LOAD.replace("json.dumps(function(json.loads(sys.argv[3])))", "repr(function(json.loads(sys.argv[3])))")
    paths = json.dumps(sorted({str(Path(str(module.__file__)).parent.parent) for module in (cloudpickle, np, PIL)}))
    said = run_python("-I", "-S", "-c", script, str(there.payload), paths, json.dumps(argument), directory=tmp_path)
    # Objects without a text of their own show an address.
    assert re.sub("0x[0-9a-f]+", "", said.strip()) == re.sub("0x[0-9a-f]+", "", repr(here))


def test_a_round_trip_keeps_what_was_one_object_one(tmp_path: Path) -> None:
    shared = [1]
    first, second = {"list": shared}, {"list": shared}
    loaded = come_back(lambda sample: first["list"] is second["list"])
    assert loaded(None) is True


def test_the_registry_of_modules_by_value_is_left_as_it_was() -> None:
    class Failing:
        def __reduce__(self) -> Any:
            assert (__name__ in cloudpickle.list_registry_pickle_by_value()) == registered.pop()
            return Failing, ()

    assert __name__ not in cloudpickle.list_registry_pickle_by_value()
    # Once for the form; again, after the function's own module was registered, for the bytes.
    registered = [True, False]
    held = Failing()
    ship(lambda sample: (counts_down(sample), held))
    assert registered == []
    assert cloudpickle.list_registry_pickle_by_value() == set()
    with pytest.raises(CannotShip):
        ship(lambda sample: (counts_down(sample), held))
    assert cloudpickle.list_registry_pickle_by_value() == set()
    mine = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(mine)
    try:
        ship(counts_down)
        assert __name__ in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(mine)


def test_functions_of_the_shared_generator_draw_from_the_workers_own() -> None:
    """A copy of the generator would never be seeded; and its state would be part of the form."""
    function = capturing((random.randrange, np.random.rand))
    plain = form(function)
    random.random()
    np.random.rand()
    assert form(function) == plain
    (randrange, rand), _ = come_back(function)(None)
    random.seed(5)
    np.random.seed(5)
    drawn = (randrange(1000), rand())
    random.seed(5)
    np.random.seed(5)
    assert drawn == (random.randrange(1000), np.random.rand())


def test_the_environment_and_the_streams_of_the_client_stay_here() -> None:
    os.environ["SHARDMILL_TEST_SECRET"] = "a-secret-that-stays"
    try:
        payload = ship(capturing((os.environ, sys.stderr))).payload
    finally:
        del os.environ["SHARDMILL_TEST_SECRET"]
    assert b"a-secret-that-stays" not in payload
    (environ, stream), _ = pickle.loads(payload)(None)
    assert environ is os.environ
    assert stream is sys.stderr


def test_a_traceback_shows_the_clients_file_and_lines(tmp_path: Path) -> None:
    script = "def augment(sample):\n    values = [1]\n    return values[sample]  # the third line\n"
    shipped = ship_from(tmp_path, script)
    with pytest.raises(AssertionError) as caught:
        shipped.call(5)
    assert f'File "{tmp_path}/job.py", line 3, in augment' in str(caught.value)
    assert "return values[sample]  # the third line" in str(caught.value)


def test_names_and_labels() -> None:
    line = counts_down.__code__.co_firstlineno
    assert (ship(counts_down).name, ship(counts_down).label) == ("counts_down", f"{__file__}:{line}")
    assert ship(functools.partial(counts_down, 3)).name == "counts_down"
    assert ship(wrapped).label.startswith(f"{__file__}:")
    assert (ship(Base(1)).name, ship(Base(1).method).name) == ("Base", "method")
    assert legal_name(ship(lambda sample: sample).name) == ""
    assert ship(counts_down).python == ".".join(map(str, sys.version_info[:2]))


# Files


def of_file(directory: Path, text: str, name: str = "one") -> Shipment:
    (directory / "mine.py").write_text(text)
    return ship_file(f"{directory / 'mine.py'}:{name}")


def test_a_file_is_shipped_as_text_that_is_not_run(tmp_path: Path) -> None:
    text = "import os\nimport numpy\nraise RuntimeError('not to be run')\n\n\ndef keep(sample):\n    return sample\n"
    shipment = of_file(tmp_path, text, "keep")
    document = json.loads(shipment.payload)
    assert document == {"source": text, "function": "keep", "filename": str(tmp_path / "mine.py")}
    assert (shipment.encoding, shipment.name, shipment.label) == ("source", "keep", f"{tmp_path / 'mine.py'}:6")
    assert shipment.modules == ("numpy",)


def test_comments_in_a_file_do_not_count_but_the_name_does(tmp_path: Path) -> None:
    text = "def one(s):\n    return s in {'a', 'b', 'c'}\n\n\ndef two(s):\n    return s, 1\n"
    plain = of_file(tmp_path, text).form
    assert of_file(tmp_path, "# A comment.\n\n" + text.replace("return s,", "return  s,  ")).form == plain
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    assert of_file(elsewhere, text).form == plain
    assert of_file(tmp_path, text, "two").form != plain
    assert of_file(tmp_path, text.replace("1", "2")).form != plain


def test_what_a_file_imports(tmp_path: Path) -> None:
    text = """
import json, PIL.Image
from typing import TYPE_CHECKING
from shardmill import transform
if TYPE_CHECKING:
    import only_for_types
try:
    import simplejpeg
except ImportError:
    simplejpeg = None

@transform
def one(sample):
    from numpy.linalg import norm
    return norm(sample)

if __name__ == "__main__":
    from shardmill import Client
    import only_here
"""
    assert of_file(tmp_path, text).modules == ("PIL", "numpy")


def test_what_another_function_of_the_file_imports_is_not_asked_for(tmp_path: Path) -> None:
    text = """
import numpy

def one(sample):
    return helper(sample)

def helper(sample):
    import PIL.Image

def other(sample):
    import beside, cv2
    return one(sample)

@print
def registered(sample):
    import xxhash

class Reader:
    def read(self):
        import braceexpand
"""
    (tmp_path / "beside.py").write_text("")
    assert of_file(tmp_path, text).modules == ("PIL", "braceexpand", "numpy", "xxhash")
    with pytest.raises(CannotShip, match=r"mine.py:11 imports beside"):
        of_file(tmp_path, text, "other")


def test_wrong_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="defines no 'other'; it defines one"):
        of_file(tmp_path, "import x\n\n\ndef one(s):\n    return s\n", "other")
    with pytest.raises(BadRequest, match=r"is not FILE.py:FUNCTION"):
        ship_file("mine.py")
    with pytest.raises(FileNotFoundError):
        ship_file(f"{tmp_path}/none.py:one")
    with pytest.raises(CannotShip, match=r"mine.py:2 is not Python"):
        of_file(tmp_path, "x = 1\ndef one(:\n")
    (tmp_path / "beside.py").write_text("")
    for text in ("import beside\n", "from beside import x\n", "from . import beside\n"):
        with pytest.raises(CannotShip, match=r"mine.py:1 imports beside.*, another file of yours"):
            of_file(tmp_path, text + "def one(s):\n    return s\n")
    with pytest.raises(CannotShip, match=r"mine.py:1 imports shardmill.Client, .* below if __name__"):
        of_file(tmp_path, "from shardmill import Client\ndef one(s):\n    return s\n")


def test_a_file_may_define_its_function_in_other_ways(tmp_path: Path) -> None:
    text = "import functools\nif True:\n    one = functools.partial(print, 'x')\nfor two in [print]:\n    pass\nclass Three: pass\n"
    assert [of_file(tmp_path, text, name).label.rpartition(":")[2] for name in ("one", "two", "Three")] == [
        "3",
        "4",
        "6",
    ]
