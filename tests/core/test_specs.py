"""Specs: one spelling, so that equal specs are equal URLs."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.errors import BadRequest
from shardmill.core.specs import MAX_INTEGER, OPTIONS, ErrorPolicy, Spec, check_name
from tests.core.names import specs

DIGEST = "1f3a9c2e0b1d"


@given(specs())
def test_a_spec_is_read_back_from_its_text(spec: Spec) -> None:
    assert Spec.parse(str(spec)) == spec


@given(specs(), st.randoms(use_true_random=False))
def test_options_in_another_order_are_refused_naming_the_canonical_spelling(spec: Spec, random: object) -> None:
    head, *options = str(spec).split(",")
    for other in itertools.islice(itertools.permutations(options), 1, 4):
        with pytest.raises(BadRequest) as refused:
            Spec.parse(",".join([head, *other]))
        assert repr(str(spec)) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (f"t@{DIGEST},epoch=3,seed=7", f"t@{DIGEST},seed=7,epoch=3"),
        (f"t@{DIGEST},seed=7,epoch=0", f"t@{DIGEST},seed=7"),
        (f"t@{DIGEST},start=0", f"t@{DIGEST}"),
        (f"t@{DIGEST},errors=fail", f"t@{DIGEST}"),
        (f"t@{DIGEST},errors=skip:0.10", f"t@{DIGEST},errors=skip:0.1"),
        (f"t@{DIGEST},errors=skip:1.0", f"t@{DIGEST},errors=skip:1"),
        (f"t@{DIGEST},seed=007", f"t@{DIGEST},seed=7"),
        (f"t@{DIGEST},seed=00", f"t@{DIGEST},seed=0"),
        (f"t@{DIGEST},count=010", f"t@{DIGEST},count=10"),
        (f"t@{DIGEST.upper()}", f"t@{DIGEST}"),
        (f"t@{DIGEST},k=5BE1", f"t@{DIGEST},k=5be1"),
        (f"t@{DIGEST},args=ABCDEF012345", f"t@{DIGEST},args=abcdef012345"),
    ],
)
def test_another_spelling_is_refused_naming_the_canonical_one(text: str, canonical: str) -> None:
    with pytest.raises(BadRequest) as refused:
        Spec.parse(text)
    assert repr(canonical) in str(refused.value)
    assert str(Spec.parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "bad transform name"),
        ("Upper", "bad transform name"),
        ("-t", "bad transform name"),
        ("a" * 64, "bad transform name"),
        ("../x", "bad transform name"),
        ("t\n", "bad transform name"),
        ("t@", "12 to 64 hex digits"),
        ("t@1f3a9c2e0b1", "12 to 64 hex digits"),
        (f"t@{'a' * 65}", "12 to 64 hex digits"),
        ("t@1f3a9c2e0b1g", "12 to 64 hex digits"),
        (f"t@{DIGEST},", "unknown option ''"),
        (f"t@{DIGEST},sed=1", "unknown option 'sed'; known: seed"),
        (f"t@{DIGEST},Seed=1", "unknown option 'Seed'"),
        (f"t@{DIGEST},seed", "unknown option"),
        (f"t@{DIGEST},seed=", "not an integer from 0"),
        (f"t@{DIGEST},seed=-1", "not an integer from 0"),
        (f"t@{DIGEST},seed=+1", "not an integer from 0"),
        (f"t@{DIGEST},seed=1.0", "not an integer from 0"),
        (f"t@{DIGEST},seed=٣", "not an integer from 0"),
        (f"t@{DIGEST},seed={MAX_INTEGER + 1}", "not an integer from 0"),
        (f"t@{DIGEST},seed={'9' * 5000}", "not an integer from 0"),
        (f"t@{DIGEST},count=0", "not an integer from 1"),
        (f"t@{DIGEST},seed=1,seed=1", "'seed' is given twice"),
        (f"t@{DIGEST},epoch=1", "epoch without seed"),
        (f"t@{DIGEST},errors=skip", "neither 'fail' nor 'skip:RATIO'"),
        (f"t@{DIGEST},errors=skip:0", "neither"),
        (f"t@{DIGEST},errors=skip:0.0", "neither"),
        (f"t@{DIGEST},errors=skip:1.1", "neither"),
        (f"t@{DIGEST},errors=skip:-0.1", "neither"),
        (f"t@{DIGEST},errors=skip:nan", "neither"),
        (f"t@{DIGEST},errors=skip:1e-2", "neither"),
        (f"t@{DIGEST},args=abc", "args='abc'"),
        (f"t@{DIGEST},k=abc", "k='abc'"),
        (f"t@{DIGEST},k=123456789", "k='123456789'"),
    ],
)
def test_what_is_no_spec_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BadRequest) as refused:
        Spec.parse(text)
    assert reason in str(refused.value)


@given(st.text(alphabet="t@0123456789abcdef,=:.seedpochrkiu ~%", max_size=60))
def test_any_text_is_a_spec_in_its_one_spelling_or_refused(text: str) -> None:
    try:
        spec = Spec.parse(text)
    except BadRequest:
        return
    assert str(spec) == text


def test_the_largest_numbers_are_taken() -> None:
    text = f"t@{DIGEST},seed={MAX_INTEGER},epoch={MAX_INTEGER},start={MAX_INTEGER},count={MAX_INTEGER}"
    assert str(Spec.parse(text)) == text


def test_options_of_a_call_stand_in_place_of_the_specs_own() -> None:
    spec = Spec.parse(f"t@{DIGEST},seed=1,epoch=2,errors=skip:0.01,start=5")
    assert str(spec.with_options(seed=3, start=0, count=7)) == (f"t@{DIGEST},seed=3,epoch=2,errors=skip:0.01,count=7")
    assert spec.with_options() == spec
    assert spec.with_options(k="abcd").k == "abcd"


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"seed": MAX_INTEGER + 1}, {"count": 0}, {"epoch": 1}, {"start": -1}]
)
def test_options_of_a_call_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        Spec.parse(f"t@{DIGEST}").with_options(**options)


def test_an_error_policy_is_fail_or_a_share() -> None:
    assert ErrorPolicy.parse("fail").ratio is None
    assert ErrorPolicy.parse("skip:0.01").ratio == 0.01
    assert str(ErrorPolicy.parse("skip:0.000000001")) == "skip:0.000000001"


@pytest.mark.parametrize("name", ["t", "0", "a" * 63, "imagenet-train", "a.b_c"])
def test_a_good_name_is_taken(name: str) -> None:
    assert check_name(name) == name


def test_options_are_documented_in_their_order() -> None:
    assert OPTIONS == ("seed", "epoch", "errors", "start", "count", "args", "k")
