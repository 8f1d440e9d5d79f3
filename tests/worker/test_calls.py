"""The user's function loaded from bytes, and what it raises made into a story that can be kept."""

import json
import os
import pickle
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from shardmill.worker.calls import MAX_MESSAGE, MAX_TRACEBACK, Function, SampleFailure, failure_of, load_function


def from_source(source: str, function: str = "transform", arguments: dict[str, Any] | None = None) -> Function:
    document = {"source": source, "function": function, "filename": "/home/user/story.py"}
    return load_function("source", json.dumps(document).encode(), arguments)


def failure(raiser: Callable[[], object]) -> SampleFailure:
    try:
        raiser()
    except BaseException as error:
        return failure_of(error, "sample 'a'")
    raise AssertionError("it raised nothing")


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def raiser() -> NoReturn:
        raise error

    return raiser


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Leaves(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Evasive(str):
    """A str that refuses to be one."""

    def __getitem__(self, key: object) -> NoReturn:
        raise RuntimeError("no slices")

    def __format__(self, form: str) -> NoReturn:
        raise RuntimeError("no format")

    def __len__(self) -> NoReturn:
        raise RuntimeError("no length")

    def __bool__(self) -> NoReturn:
        raise RuntimeError("no truth")


class SaysEvasively(Exception):
    def __str__(self) -> str:
        return Evasive("words")


class Meta(type):
    @property
    def __name__(cls) -> NoReturn:  # type: ignore[override]  # it is meant to be impossible
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=Meta):
    pass


class Own(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("plain"), "ValueError: plain"),
        (ValueError(), "ValueError"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (Own("own"), "Own: own"),
        (Unprintable(), "Unprintable (its message cannot be printed)"),
        (Leaves(), "Leaves (its message cannot be printed)"),
        (SaysEvasively(), "SaysEvasively: words"),
        (Nameless("x"), "Nameless: x"),
        (ValueError("\udcff\ud800"), "ValueError: \udcff\ud800"),
        (ExceptionGroup("many", [ValueError(str(n)) for n in range(3)]), "ExceptionGroup: many (3 sub-exceptions)"),
    ],
)
def test_any_exception_becomes_a_message_and_a_traceback(error: BaseException, message: str) -> None:
    found = failure(raising(error))
    assert found.message == f"sample 'a': {message}"
    assert found.traceback is not None
    assert type.__dict__["__name__"].__get__(type(error)) in found.traceback or "cannot be printed" in found.traceback


def test_a_huge_message_is_cut() -> None:
    found = failure(raising(ValueError("x" * (50 << 20))))
    assert len(found.message) == MAX_MESSAGE
    assert found.traceback is not None
    assert len(found.traceback) <= MAX_TRACEBACK + 10
    assert found.traceback.startswith("Traceback")


def test_a_huge_traceback_keeps_its_beginning_and_its_end() -> None:
    error: BaseException = ValueError("the first")
    for number in range(3000):
        following = RuntimeError(f"number {number}")
        following.__cause__ = error
        error = following
    found = failure(raising(error))
    assert found.traceback is not None
    assert len(found.traceback) <= MAX_TRACEBACK + 10
    assert "number 2999" in found.traceback[-200:] or "cannot be printed" in found.traceback


def test_endless_recursion_is_a_failure() -> None:
    function = from_source("def transform(sample):\n    return transform(sample)\n")
    found = failure(lambda: function({}))
    assert found.message.startswith("sample 'a': RecursionError")
    assert found.traceback is not None
    assert "/home/user/story.py" in found.traceback


def test_running_out_of_memory_is_told_apart() -> None:
    assert failure(raising(MemoryError())).out_of_memory
    assert not failure(raising(ValueError())).out_of_memory


def test_a_traceback_has_the_clients_file_and_lines_and_no_path_of_this_machine() -> None:
    function = from_source(
        "import json\nimport numpy as np\n\ndef transform(sample):\n    if sample['n']:\n        np.load('/no/such.npy')\n"
        "    json.loads('{')\n"
    )
    for number, library in ((0, "json/decoder.py"), (1, "numpy/lib/_npyio_impl.py")):
        found = failure(lambda number=number: function({"n": number}))  # type: ignore[misc]
        assert found.traceback is not None
        assert 'File "/home/user/story.py", line ' in found.traceback
        assert ("json.loads('{')", "np.load('/no/such.npy')")[number] in found.traceback
        assert f'File "{library}"' in found.traceback
        for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), os.path.dirname(__file__)):
            # This file is the caller here.
            assert folder not in found.traceback.replace(__file__, "")


def test_a_message_of_an_import_names_no_path_of_this_machine() -> None:
    found = failure(lambda: from_source("from numpy import no_such_name\n"))
    text = str(found.__dict__)
    assert "no_such_name" in text
    assert sysconfig.get_path("purelib") not in text


def test_source_is_loaded_under_the_clients_name() -> None:
    function = from_source("X = 2\ndef transform(sample):\n    return {'n': sample['n'] * X, 'file': __file__}\n")
    assert function({"n": 21}) == {"n": 42, "file": "/home/user/story.py"}


def test_arguments_are_given_to_every_call() -> None:
    function = from_source("def transform(sample, factor, plus=0):\n    return sample * factor + plus\n")
    with pytest.raises(TypeError):
        function(3)
    bound = from_source(
        "def transform(sample, factor, plus=0):\n    return sample * factor + plus\n",
        arguments={"factor": 2, "plus": 1},
    )
    assert [bound(n) for n in (1, 2)] == [3, 5]


@pytest.mark.parametrize(
    ("encoding", "payload", "message"),
    [
        ("cloudpickle", b"", "cannot be loaded: EOFError"),
        ("cloudpickle", b"<html>", "cannot be loaded: UnpicklingError"),
        ("cloudpickle", pickle.dumps(5), "loads as int, which is not callable"),
        ("cloudpickle", b"cos\n_no_such\n.", "cannot be loaded: AttributeError"),
        ("cloudpickle", b"(" * 100 + b"]" * 100, "cannot be loaded"),
        ("source", b"{}", "cannot be loaded: KeyError"),
        ("source", b"\xff", "cannot be loaded: UnicodeDecodeError"),
    ],
)
def test_what_cannot_be_loaded_says_why(encoding: str, payload: bytes, message: str) -> None:
    with pytest.raises(SampleFailure, match=message):
        load_function(encoding, payload, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(sample): pass", "story.py defines no 'transform'"),
        ("def transform(:", "SyntaxError"),
        ("raise SystemExit('at once')", "SystemExit: at once"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("transform = 1", "not callable"),
    ],
)
def test_source_that_cannot_be_loaded_says_why(source: str, message: str) -> None:
    with pytest.raises(SampleFailure, match=message):
        from_source(source)


@pytest.fixture(autouse=True)
def module_is_forgotten() -> Any:
    yield
    sys.modules.pop("__shardmill_source__", None)
