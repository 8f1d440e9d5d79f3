"""The user's function as a worker sees it: loaded from bytes, called, and what it raises told apart from what breaks.

This is one of the two places that catch everything: around user code.
"""

import base64
import functools
import json
import linecache
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

MAX_MESSAGE = 4096  # characters
MAX_TRACEBACK = 16384  # characters

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_OWN_FOLDERS = tuple(os.path.join(_ROOT, "shardmill", name) + os.sep for name in ("worker", "shards"))
_STANDARD_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))


class SampleFailure(Exception):
    """One sample's failure, as it is kept and shown."""

    def __init__(
        self,
        message: str,
        traceback_text: str | None = None,
        *,
        out_of_memory: bool = False,
        output: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.traceback = traceback_text
        self.out_of_memory = out_of_memory
        self.output = output
        """What a command wrote to its standard error."""


def load_function(encoding: str, payload: bytes, arguments: dict[str, Any] | None) -> Function:
    """The user's function from its shipped form.

    Args:
        encoding: `cloudpickle`, or `source` (JSON with source, function and filename).
        payload: The bytes as registered.
        arguments: Keyword arguments for every call.

    Raises:
        SampleFailure: The code cannot be loaded here; the message says why.
    """
    try:
        function = _load_source(payload) if encoding == "source" else pickle.loads(payload)
    except BaseException as error:
        raise failure_of(error, "the function cannot be loaded") from None
    if not callable(function):
        raise SampleFailure(f"the code loads as {type(function).__name__}, which is not callable")
    # A partial keeps the signature, by which a function says whether it wants to know its object.
    return functools.partial(function, **arguments) if arguments else function


def load_functions(encoding: str, payload: bytes, arguments: dict[str, Any] | None) -> list[Function]:
    """The functions of a version, which follow one another; one, unless it is a pipeline.

    Raises:
        SampleFailure: As `load_function`.
    """
    if encoding != "pipeline":
        return [load_function(encoding, payload, arguments)]
    parts = json.loads(payload)
    return [load_function(part["encoding"], base64.b64decode(part["payload"]), part["args"]) for part in parts]


def failure_of(error: BaseException, what: str) -> SampleFailure:
    """A failure with the user's traceback; robust against exceptions whose own methods raise or are huge."""
    message = without_own_paths(f"{what}: {_text_of(error)}")[:MAX_MESSAGE]
    try:
        text = "".join(_lines_of(error))
    except BaseException:
        text = f"{_name_of(error)} (its traceback cannot be printed)"
    if len(text) > MAX_TRACEBACK:
        text = f"{text[: MAX_TRACEBACK // 4]}\n…\n{text[-MAX_TRACEBACK * 3 // 4 :]}"
    return SampleFailure(message, without_own_paths(text), out_of_memory=isinstance(error, MemoryError))


def _text_of(error: BaseException) -> str:
    name = _name_of(error)
    try:
        # A slice is a plain str, whatever class of its own the exception gives.
        text = str.__getitem__(str(error), slice(MAX_MESSAGE))
    except BaseException:
        return f"{name} (its message cannot be printed)"
    return f"{name}: {text}" if text else name


def _name_of(error: BaseException) -> str:
    # Not by attribute: a metaclass may define its own __name__.
    return str(type.__dict__["__name__"].__get__(type(error)))


def without_own_paths(text: str) -> str:
    """Files of libraries by their place in the library: where this interpreter lies is nobody's business."""
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    for folder in (*folders, _STANDARD_LIBRARY, _ROOT, os.environ.get("HOME", "")):
        if len(folder) > 1:
            text = text.replace(f"{folder}{os.sep}", "")
    return text


def _lines_of(error: BaseException) -> list[str]:
    """The traceback without this program's own frames."""
    stack = traceback.TracebackException.from_exception(error, limit=64, capture_locals=False)
    seen: set[int] = set()
    pending: list[traceback.TracebackException | None] = [stack]
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        part.stack[:] = [frame for frame in part.stack if not frame.filename.startswith(_OWN_FOLDERS)]
        pending += [part.__cause__, part.__context__]
    return list(stack.format())


def _load_source(payload: bytes) -> Any:
    document = json.loads(payload)
    filename, source = document["filename"], document["source"]
    module = types.ModuleType("__shardmill_source__")
    module.__file__ = filename
    sys.modules[module.__name__] = module
    # Tracebacks then show the client's lines, though the file is not here.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    try:
        return module.__dict__[document["function"]]
    except KeyError:
        raise NameError(f"{filename} defines no {document['function']!r}") from None
