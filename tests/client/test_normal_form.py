"""What a function is known by: the same everywhere, another for every change that can be seen."""

import copy
import inspect
import itertools
import math
import pickle
import random
import re
import struct
import textwrap
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.marking import transform
from tests.client.processes import (
    come_back,
    form,
    form_of_value,
    ship_from,
)

SCRIPT = """
import dataclasses
import enum
import functools
import logging
import re
import typing
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


T = typing.TypeVar("T")


class Base(typing.Generic[T]):
    scale = 2

    def apply(self, x):
        return x * self.scale


@dataclasses.dataclass
class Twice(Base[T]):
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

    logger.debug("%s at work", T)
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
    assert len({client.fingerprint for client in clients}) == 1
    changed = {**FILES, "helpers.py": FILES["helpers.py"].replace("FACTOR = 3", "FACTOR = 4")}
    other = ship_from(tmp_path / "changed", SCRIPT, changed)
    assert other.form != clients[0].form
    assert other.fingerprint != clients[0].fingerprint
    assert clients[0].modules == ["numpy"]
    assert clients[0].name == "augment"
    assert clients[0].label.startswith(str(tmp_path / "first" / "job.py:"))
    assert all(client.call(3) == RESULT for client in (clients[0], clients[4], clients[5]))
    assert other.call(3) == [*RESULT[:5], 8, 20, *RESULT[7:]]


ITEMS = {
    "Path('a'), Path('b'), Path('c'), Path('d')": 4,
    "Colour.RED, Colour.GREEN, Colour.BLUE": 3,
    "one, two, three, max": 4,
    "A, B, int, ValueError": 4,
    "(A, 1), ('x', 2), (B, None), ('y', 3.5), (('z', A), one)": 5,
    "frozenset({A, 'x'}), frozenset({B, 'y', (A, B)}), one": 3,
    "Point(1), Point(2), Point(3)": 3,
}


@pytest.mark.parametrize("items", ITEMS)
def test_sets_of_what_has_an_identity_are_the_same_in_every_process(tmp_path: Path, items: str) -> None:
    """Their order depends on addresses and on the hash seed."""
    script = (
        "import dataclasses, enum\nfrom pathlib import Path\nclass A: pass\nclass B: pass\n"
        "@dataclasses.dataclass(frozen=True)\nclass Point:\n    x: int\n"
        "class Colour(enum.Enum):\n    RED = 1\n    GREEN = 2\n    BLUE = 3\n"
        "def one(x): return 1\ndef two(x): return 2\ndef three(x): return 3\n"
        f"ITEMS = {{{items}}}\ndef augment(sample):\n    return len(ITEMS)\n"
    )
    clients = [ship_from(tmp_path, script, seed=seed) for seed in range(4)]
    assert {client.call(None) for client in clients} == {ITEMS[items]}
    assert len({client.form for client in clients}) == 1
    assert len({client.fingerprint for client in clients}) == 1


DISTINCT: list[object] = [
    None, ..., False, True, 0, 1, -1, 1 << 70, 0.0, -0.0, 1.0, float("nan"), float("inf"), 0j, 1j, -0j, "", "a", "1", b"", b"a",
    b"1", bytearray(b"a"), (), (1,), (1, 2), (2, 1), ((1,), 2), (1, (2,)), [], [1], [1, 2], [[1], 2], {}, {1: 2}, {2: 1}, {1: 2, 2: 1},
    {2: 1, 1: 2}, set(), {1}, frozenset(), frozenset({1}), {1, 2}, frozenset({1, 2}), range(3), range(4), slice(1, 2), int, float,
    len, Path("a"), Path("b"), PurePosixPath("a"), re.compile("a"), re.compile("a", re.IGNORECASE), re.compile(b"a"), OrderedDict([(1, 2)]), Counter("aab"),
    deque([1]), deque([1], 3), Decimal("1.0"), Decimal("1.00"), date(2024, 1, 2), math.sin, math, np.float32(1), np.float64(1),
    np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.ones(2), np.dtype("f4"), np.dtype("f8"), np.dtype([("a", "f4")]),
    np.array([None, 1]), np.array(["a"]), np.random.default_rng(1), np.random.default_rng(2), random.Random(1), random.Random(2),
]  # fmt: skip


def test_different_values_give_different_forms() -> None:
    forms = [form_of_value(value) for value in DISTINCT]
    same = [
        (DISTINCT[first], DISTINCT[second])
        for second in range(len(forms))
        for first in range(second)
        if forms[first] == forms[second]
    ]
    assert same == []


def test_a_value_made_again_gives_the_same_form() -> None:
    for value in DISTINCT:
        again = value if isinstance(value, ModuleType) else pickle.loads(pickle.dumps(value))
        assert form_of_value(again) == form_of_value(value), repr(value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
hashables = st.recursive(
    scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=6
)
values = st.recursive(
    hashables,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


def exact(value: Any) -> Any:
    """A value that equals another's exactly when type, order and bits do, wherever the sets stand."""
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted((exact(item) for item in value), key=repr)
    if isinstance(value, dict):
        return "dict", [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, complex):
        return "complex", exact(value.real), exact(value.imag)
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    return type(value).__name__, repr(value)


def nestings(size: int) -> list[object]:
    """Every way to nest tuples, lists and dictionaries around ones with that many parts."""
    if size == 1:
        return [1, (), [], {}]
    made: list[object] = []
    for parts in partitions(size - 1):
        for inner in itertools.product(*map(nestings, parts)):
            made += [tuple(inner), list(inner), dict(enumerate(inner))]
    return made


def partitions(total: int) -> list[tuple[int, ...]]:
    return (
        [()] if total == 0 else [(first, *rest) for first in range(1, total + 1) for rest in partitions(total - first)]
    )


def test_no_two_nestings_have_one_form() -> None:
    every = [value for size in range(1, 5) for value in nestings(size)]
    forms = {form_of_value(value): value for value in every}
    assert len(every) > 500
    assert len(forms) == len(every)


@settings(deadline=None)  # how long it takes is the machine's business
@given(values, values)
def test_forms_are_equal_exactly_when_the_values_are(first: Any, second: Any) -> None:
    assert (form_of_value(first) == form_of_value(second)) == (exact(first) == exact(second))
    assert form_of_value(copy.deepcopy(first)) == form_of_value(first)


@settings(deadline=None)  # how long it takes is the machine's business
@given(st.sets(hashables, max_size=8), st.randoms())
def test_the_order_in_which_a_set_was_filled_does_not_matter(items: set[Any], order: random.Random) -> None:
    listed = list(items)
    order.shuffle(listed)
    refilled: set[Any] = set()
    for item in listed:
        refilled.add(item)
    assert form_of_value(refilled) == form_of_value(items)


def test_code_is_told_apart_by_what_it_does() -> None:
    functions: list[Callable[..., Any]] = [
        lambda s: s,
        lambda s: s + 1,
        lambda s: s + 2,
        lambda s: s - 1,
        lambda s: s + 1.0,
        lambda s: s + True,
        lambda s: (s, 0.0),
        lambda s: (s, -0.0),
        lambda s: s.lower(),
        lambda s: s.upper(),
        lambda s: [c for c in s if c in {"a", "b"}],
        lambda s: [c for c in s if c in {"a", "c"}],
        lambda s: lambda: s,
        lambda s, x=1: s,
        lambda s, x=2: s,
        lambda s, *, x=1: s,
        lambda s, /: s,
        lambda *s: s,
        lambda s: (len(s),),
        lambda s: (math.sin(s),),
        lambda s: (math.cos(s),),
    ]
    assert len({form(function) for function in functions}) == len(functions)


def test_where_code_stands_does_not_matter() -> None:
    """The same text at another line, in another file, inside another function, with other annotations."""
    source = """
import math
LIMITS = {"low", "high"}
class Level:
    scale = 3
    def of(self, x): return x * self.scale
def work(sample, level=Level()):
    def inner(y):
        class Local:
            kind = "local"
        return Local.kind, y
    return inner(level.of(sample)), sorted(LIMITS), math.pi
"""
    lines = source.strip().split("\n")
    shifted = "# One.\n\n\n" + "\n# Between.\n".join(line for line in lines)
    annotated = source.replace(
        "(sample, level=Level())", "(sample: 'list[int]', level: Level = Level()) -> 'dict[str, int]'"
    )
    documented = source.replace("    def inner", "    'What it does.'\n    def inner")
    forms = set()
    for number, text in enumerate((source, shifted, annotated, documented)):
        namespace: dict[str, Any] = {"__name__": f"place{number}"}
        exec(compile(text, f"/somewhere/{number}.py", "exec"), namespace)
        assert come_back(namespace["work"])(2) == ((("local", 6)), ["high", "low"], math.pi)
        forms.add(form(namespace["work"]))
    assert len(forms) == 1


def test_how_deep_a_function_stands_does_not_matter() -> None:
    def inside() -> Callable[..., Any]:
        def work(sample: int) -> Any:
            class Local:
                def of(self) -> int:
                    return sample

            return Local().of()

        return work

    plain: dict[str, Any] = {}
    source = textwrap.dedent("".join(inspect.getsource(inside).splitlines(keepends=True)[1:-2]))
    exec(compile(source, "<ipython-input-7-0123456789ab>", "exec"), {"Any": Any}, plain)
    assert form(plain["work"]) == form(inside())


def test_what_a_handler_covers_matters() -> None:
    def guarded(sample: Any) -> Any:
        try:
            return sample.one()
        except ValueError:
            return 1

    code = guarded.__code__
    bare = types.FunctionType(code.replace(co_exceptiontable=b""), {}, guarded.__name__)
    assert form(bare) != form(types.FunctionType(code, {}, guarded.__name__)) == form(guarded)


def test_attributes_are_in_no_order_but_dictionaries_are() -> None:
    class Options:
        pass

    first, second = Options(), Options()
    first.a, first.b = 1, 2  # type: ignore[attr-defined]
    second.b, second.a = 2, 1  # type: ignore[attr-defined]
    assert form_of_value(first) == form_of_value(second)
    assert form_of_value({"a": 1, "b": 2}) != form_of_value({"b": 2, "a": 1})


def test_marks_do_not_change_what_a_function_is() -> None:
    def double(sample: int) -> int:
        return 2 * sample

    plain = form(double)
    marked = transform(name="twice", decoder=None)(double)
    assert form(marked) == plain
    assert come_back(marked)(4) == 8


def test_what_a_function_does_not_reach_does_not_matter(tmp_path: Path) -> None:
    script = "import helpers\n\n\ndef augment(sample):\n    return helpers.scale(sample)\n"
    plain = ship_from(tmp_path / "plain", script, FILES)
    more = {**FILES, "helpers.py": FILES["helpers.py"] + "\n\ndef other():\n    return FACTOR + 1\n"}
    assert ship_from(tmp_path / "more", script + "\n\nUNUSED = 5\n", more).form == plain.form
    assert plain.call(5) == 15


def test_functions_that_call_one_another_end() -> None:
    """Forty functions, each calling all forty: many ways through, few things to see."""
    namespace: dict[str, Any] = {}
    calls = " + ".join(f"f{number}(n - 1)" for number in range(40))
    exec("\n".join(f"def f{number}(n): return n if n <= {number} else {calls}" for number in range(40)), namespace)
    first = form(namespace["f0"])
    assert form(namespace["f0"]) == first
    assert form(namespace["f1"]) != first
    assert come_back(namespace["f39"])(39) == 39


def test_values_that_hold_themselves_end() -> None:
    def of(mark: int) -> Any:
        cycle: list[Any] = [mark]
        table = {"list": cycle}
        cycle.append(table)
        return cycle

    assert form_of_value(of(1)) == form_of_value(of(1))
    assert form_of_value(of(1)) != form_of_value(of(2))

    class Node:
        def __init__(self) -> None:
            self.peers = {self}

    assert form_of_value(Node()) == form_of_value(Node())
