"""Ship a function: its bytes, by value, and the normal form that its digest is over.

Nothing of the user's is run here, except that modules of their own which a function imports in its body are imported.
"""

import ast
import functools
import inspect
import json
import os
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardmill.client.normal_form import Walk, form_of_source
from shardmill.client.ownership import installed_names, is_staged
from shardmill.client.pickling import pickle_function
from shardmill.client.refusals import CannotShip, Place
from shardmill.core.api import Kind
from shardmill.core.errors import BadRequest
from shardmill.marking import names_of_mark

__all__ = ["CannotShip", "Shipment", "check_call", "ship", "ship_file"]

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class Shipment:
    """A function as it travels; see `core.api.Code`."""

    encoding: Literal["cloudpickle", "source"]
    payload: bytes
    form: str
    """64 hex digits: hash of the code's normal form."""
    python: str
    """This Python's minor, e.g. `3.11`."""
    modules: Sequence[str]
    """Top-level installed modules that the code imports."""
    label: str
    """`file:line` of the function."""
    name: str
    """The function's own; empty for a lambda."""
    signature: inspect.Signature | None = None
    """How it can be called; None: that is not known."""


def ship(function: Callable[..., Any]) -> Shipment:
    """Take a function, lambda, closure or callable object by value, with the user's own modules as far as it reaches.

    Raises:
        CannotShip: It holds something that cannot leave this process; the message says what and where.
    """
    name = _name_of(function)
    if not callable(function):
        raise CannotShip(f"{type(function).__name__} is not callable; give a function that takes a sample")
    if inspect.iscoroutinefunction(function):
        raise CannotShip(f"function `{name}` is async; samples come one by one to a plain function")
    walk = Walk()
    place = Place(f"the transform `{name}`" if name else "the transform", name or "transform")
    try:
        form = walk.form(function, place)
        payload, named = pickle_function(function, walk)
    except RecursionError:
        raise CannotShip(f"{place} holds objects that are nested too deeply to be shipped") from None
    except CannotShip as refusal:
        # The walk's own frames tell nothing that the message does not.
        raise refusal.with_traceback(None) from None
    except Exception as error:
        # Objects of the user's own say how they are pickled, and may raise anything.
        raise CannotShip(f"{place} cannot be shipped: {error}") from error
    modules = installed_names({*named, *walk.installed, *walk.submodules})
    label, signature = _label_of(function), _signature_of(function)
    return Shipment("cloudpickle", payload, form, PYTHON, modules, label, name, signature)


def check_call(shipment: Shipment, kind: Kind, args: Mapping[str, object]) -> None:
    """See now, not at the first sample, that a function takes what it will be called with.

    Raises:
        BadRequest: It does not.
    """
    signature = shipment.signature
    if signature is None:
        return
    given = dict(args)
    if kind != "sample" and "ref" in signature.parameters:
        given.setdefault("ref", "")
    positional = {"stream": ["reader", "writer"], "bytes": ["the object"]}.get(kind, ["a sample"])
    try:
        signature.bind(*positional, **given)
    except TypeError as error:
        name, given_names = shipment.name or "<lambda>", f" and args {', '.join(args)}" if args else ""
        raise BadRequest(
            f"function `{name}` cannot be called with {' and '.join(positional)}{given_names}: {error}"
        ) from None


def ship_file(target: str) -> Shipment:
    """Take a function of a file as the file's text, which is not run here.

    Args:
        target: `file.py:function`.

    Raises:
        BadRequest: The target has no function, or the file does not define it.
        CannotShip: The file is not Python.
    """
    file, colon, function = target.rpartition(":")
    if not colon or not file or not function.isidentifier():
        raise BadRequest(f"{target!r} is not FILE.py:FUNCTION")
    filename = os.path.abspath(file)
    try:
        with tokenize.open(file) as text:
            source = text.read()
        tree = ast.parse(source, filename)
        form = form_of_source(source, function, filename)
    except (SyntaxError, ValueError) as error:
        line, reason = getattr(error, "lineno", None), getattr(error, "msg", None) or error
        raise CannotShip(f"{file}{f':{line}' if line else ''} is not Python: {reason}") from error
    defined = dict(_definitions(tree.body))
    if function not in defined:
        known = ", ".join(name for name, node in defined.items() if isinstance(node, ast.FunctionDef))
        raise BadRequest(f"{file} defines no {function!r}" + (f"; it defines {known}" if known else ""))
    signature = _signature_in(tree, function)
    imports = list(_imports(_reached_from(function, tree)))
    for name, line in imports:
        _check_import(name, Path(filename).parent, f"{file}:{line}")
    payload = json.dumps({"source": source, "function": function, "filename": filename}).encode()
    modules = installed_names(name for name, _ in imports)
    label = f"{filename}:{defined[function].lineno}"
    return Shipment("source", payload, form, PYTHON, modules, label, function, signature)


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "" if name == "<lambda>" else str(name)


def _signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        # Of what a decorator wraps only the wrapper is called.
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None  # some builtins do not tell


def _signature_in(tree: ast.Module, function: str) -> inspect.Signature | None:
    """Of a function of a file that is not run: None if it is decorated, but for marks, or not just defined once.

    Raises:
        CannotShip: It is async.
    """
    found = [node for name, node in _definitions(tree.body) if name == function]
    node = found[-1]
    if len(found) > 1 or node not in tree.body or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    decorators = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    if any(ast.unparse(item) not in names_of_mark(tree) for item in decorators):
        return None
    if isinstance(node, ast.AsyncFunctionDef):
        raise CannotShip(f"function `{function}` is async; samples come one by one to a plain function")
    return _signature_from(node.args)


def _signature_from(arguments: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parameters = [
        inspect.Parameter(
            item.arg,
            kinds.POSITIONAL_ONLY if number < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if number < required else None,
        )
        for number, item in enumerate(positional)
    ]
    if arguments.vararg is not None:
        parameters.append(inspect.Parameter(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        inspect.Parameter(item.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _label_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not isinstance(function, type):
        function = type(function).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def _definitions(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that the top level of a file binds."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, part, []))
        else:
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    yield target.id, node


def _reached_from(function: str, tree: ast.Module) -> ast.Module:
    """The file without its functions that nothing names which runs: other transforms, which may need other modules."""
    waiting = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list
    }
    reached: list[ast.AST] = [node for node in tree.body if node not in waiting.values()]
    if function in waiting:
        reached.append(waiting.pop(function))
    for part in reached:  # which grows meanwhile
        for node in ast.walk(part):
            if isinstance(node, ast.Name) and node.id in waiting:
                reached.append(waiting.pop(node.id))
    return ast.Module([node for node in tree.body if node not in waiting.values()], [])


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a file imports with their lines, also inside functions; not those that it can do without."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif not _is_optional(node):
            yield from _imports(node)


def _check_import(name: str, directory: Path, where: str) -> None:
    top = name.partition(".")[0]
    if not top or (directory / f"{top}.py").is_file() or (directory / top / "__init__.py").is_file():
        raise CannotShip(
            f"{where} imports {name.strip('.')}, another file of yours, and a file goes alone; put what it needs into "
            "one file, or register the function from Python, which takes your modules along"
        )
    if not is_staged(name):
        raise CannotShip(
            f"{where} imports {name}, which does not exist where functions run; import it below "
            'if __name__ == "__main__":'
        )


def _is_optional(node: ast.AST) -> bool:
    """What is not run where functions are, and what may fail."""
    if isinstance(node, ast.If):
        return any(name in ast.unparse(node.test) for name in ("TYPE_CHECKING", "__name__"))
    return isinstance(node, ast.Try) and any(_catches_imports(handler) for handler in node.handlers)


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type is not None else "Exception"
    return any(name in caught for name in ("ImportError", "ModuleNotFoundError", "Exception"))
