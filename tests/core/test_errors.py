"""The error tree: as drawn, and the same on both ends of the wire."""

import builtins
import re
import traceback
from http import HTTPStatus

import pytest

from shardmill.core import errors
from shardmill.core.errors import ServerError, ShardmillError, error_from_wire, error_types

ROW = re.compile(
    r"^(?P<branch>[│ ]*[├└]─ )(?P<name>\w+)(?: +\((?P<builtin>\w+)\))? +(?P<code>\w+) +(?P<status>\d+) +(?P<retry>yes|no)",
    re.M,
)
ROWS = list(ROW.finditer(errors.__doc__ or ""))


def test_the_drawing_has_every_class_once() -> None:
    drawn = [row["name"] for row in ROWS]
    assert sorted(drawn) == sorted(error.__name__ for error in error_types().values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["name"]))
def test_a_class_is_as_it_is_drawn(row: "re.Match[str]") -> None:
    error = getattr(errors, row["name"])
    assert (error.code, error.status, error.retryable) == (row["code"], int(row["status"]), row["retry"] == "yes")
    if row["builtin"]:
        assert issubclass(error, getattr(builtins, row["builtin"]))
    depth = len(row["branch"]) // 3
    above = [found["name"] for found in ROWS[: ROWS.index(row)] if len(found["branch"]) // 3 == depth - 1]
    assert error.__bases__[0].__name__ == (above[-1] if depth > 1 else "ShardmillError")


@pytest.mark.parametrize("code", error_types())
def test_every_code_is_raised_again_by_the_client(code: str) -> None:
    error = error_types()[code]
    again = error_from_wire(
        code, "it broke", status=error.status, traceback="Traceback", request_id="r1", retry_after=3
    )
    assert type(again) is error
    assert (again.message, str(again)) == ("it broke", "it broke")
    assert (again.traceback, again.request_id, again.retry_after) == ("Traceback", "r1", 3)


def test_who_prints_an_error_prints_the_users_traceback_below_it() -> None:
    error = error_from_wire("transform_failed", "it broke", status=422, traceback="Traceback\n  in pipeline.py\n")
    printed = "".join(traceback.format_exception(error))
    assert printed.endswith("TransformFailed: it broke\nIn the transform:\nTraceback\n  in pipeline.py\n")
    assert not hasattr(error_from_wire("not_found", "m", status=404), "__notes__")


@pytest.mark.parametrize("code", error_types())
def test_every_status_is_one_of_http(code: str) -> None:
    assert HTTPStatus(error_types()[code].status) >= 400


def test_an_unknown_code_falls_back_to_its_status_and_an_unknown_status_to_the_nodes_fault() -> None:
    assert error_from_wire("novel", "m", status=404).status == 404
    assert type(error_from_wire("novel", "m", status=404)) is errors.NotFound
    assert type(error_from_wire("novel", "m", status=422)) is errors.TransformFailed
    assert type(error_from_wire("novel", "m", status=599)) is ServerError
    assert type(error_from_wire("novel", "m", status=418)) is ServerError


def test_a_users_failure_is_never_a_status_that_loaders_retry() -> None:
    for error in error_types().values():
        if issubclass(error, errors.TransformFailed):
            assert error.status == 422
            assert not error.retryable


@pytest.mark.parametrize("code", error_types())
def test_an_error_says_its_message_whatever_builtin_it_is(code: str) -> None:
    error: ShardmillError = error_types()[code]("the message", size=5)
    assert str(error) == error.message == "the message"
    assert error.size == 5
    assert error.traceback is None
