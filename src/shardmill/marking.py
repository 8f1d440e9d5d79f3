"""`@transform`: a function that says by itself how it wants to be registered.

Standard library only: a worker runs the user's file where nothing of shardmill but this module, `shards` and `worker`
exists. The mark is an attribute; the function itself is returned unchanged.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, cast, overload

MARK = "__shardmill_transform__"

_Function = TypeVar("_Function", bound=Callable[..., Any])
_HOMES = ("shardmill", "shardmill.marking")
_FIELDS = ("name", "kind", "by_path", "decoder", "fields", "env", "packages", "errors")


class Marks(TypedDict, total=False):
    """What a function says of its registration; arguments of a call come first."""

    name: str
    kind: str
    by_path: bool
    decoder: str | None
    fields: list[str] | None
    env: str | None
    packages: list[str]
    errors: str


@overload
def transform(function: _Function, /) -> _Function: ...


@overload
def transform(
    *,
    name: str = ...,
    kind: str = ...,
    by_path: bool = ...,
    decoder: str | None = ...,
    fields: Sequence[str] | None = ...,
    env: str | None = ...,
    packages: Sequence[str] = ...,
    errors: str = ...,
) -> Callable[[_Function], _Function]: ...


def transform(function: Callable[..., Any] | None = None, /, **marks: Any) -> Any:
    """Mark a function with the name, kind, decoder, fields, environment, packages and error policy to register it with.

    `@transform`, `@transform(name="imagenet-train", decoder="pil")` and `@transform(kind="bytes")` are all right. What
    is not given stays as the registration has it.
    """
    unknown = set(marks) - set(_FIELDS)
    if unknown:
        raise TypeError(f"transform() has no argument {', '.join(sorted(unknown))}; known: {', '.join(_FIELDS)}")
    for name in ("fields", "packages"):
        if marks.get(name) is not None:
            marks[name] = list(marks[name])

    def mark(marked: _Function) -> _Function:
        setattr(marked, MARK, marks)
        return marked

    return mark if function is None else mark(function)


def marks_of(function: object) -> Marks:
    """The marks of a function; empty if it has none."""
    return cast(Marks, getattr(function, MARK, {}))


def marks_in_source(source: str, function: str) -> Marks:
    """The marks of a function in a file's text, without running it; only literal arguments are seen."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return _marks_of_decorators(node.decorator_list, names_of_mark(tree))
    return {}


def names_of_mark(tree: ast.Module) -> frozenset[str]:
    """What `transform` is called in a file, by its imports; another library's `transform` is none of ours."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module in _HOMES:
            names.update(alias.asname or alias.name for alias in node.names if alias.name in ("transform", "*"))
        elif isinstance(node, ast.Import):
            names.update(f"{alias.asname or alias.name}.transform" for alias in node.names if alias.name in _HOMES)
    return frozenset("transform" if name == "*" else name for name in names)


def _marks_of_decorators(decorators: Sequence[ast.expr], names: frozenset[str]) -> Marks:
    marks: dict[str, Any] = {}
    for decorator in decorators:
        if not isinstance(decorator, ast.Call):
            continue
        if ast.unparse(decorator.func) not in names:
            continue
        for keyword in decorator.keywords:
            if keyword.arg in _FIELDS:
                try:
                    marks[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError:
                    continue
    return cast(Marks, marks)
