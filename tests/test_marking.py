"""`@transform`: marks on functions and in source."""

import pytest

from shardmill import transform
from shardmill.marking import marks_in_source, marks_of


def test_a_marked_function_is_the_function_itself() -> None:
    def double(sample: dict[str, int]) -> dict[str, int]:
        return {name: 2 * value for name, value in sample.items()}

    assert transform(double) is double
    assert marks_of(double) == {}
    assert transform(name="twice", decoder="rgb8", fields=("jpg",))(double)({"x": 1}) == {"x": 2}
    assert marks_of(double) == {"name": "twice", "decoder": "rgb8", "fields": ["jpg"]}


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"decode.*known: name"):
        transform(decode="pil")  # type: ignore[call-overload]


def test_marks_are_read_from_source_without_running_it() -> None:
    source = """
import shardmill
from shardmill import transform

raise RuntimeError("not to be run")

@shardmill.transform(name="imagenet", decoder=None, env=PLACE, packages=["numpy<3", "av"])
def first(sample): return sample

@transform
def second(sample): return sample
"""
    assert marks_in_source(source, "first") == {
        "name": "imagenet", "decoder": None, "packages": ["numpy<3", "av"],
    }  # fmt: skip
    assert marks_in_source(source, "second") == {}
    assert marks_in_source(source, "third") == {}


def test_the_mark_is_known_by_its_import() -> None:
    marked = "@{0}(name='mine')\ndef first(sample): return sample\n"
    for imported, name in (
        ("from shardmill import transform as mark", "mark"),
        ("import shardmill as mill", "mill.transform"),
        ("from shardmill.marking import transform", "transform"),
    ):
        assert marks_in_source(f"{imported}\n{marked.format(name)}", "first") == {"name": "mine"}
    assert marks_in_source(f"from other import transform\n{marked.format('transform')}", "first") == {}
