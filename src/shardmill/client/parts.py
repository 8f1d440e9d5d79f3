"""What functions, classes and objects consist of, in an order that depends on nothing but the code."""

import enum
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

import cloudpickle

REDUCE_PROTOCOL = 4  # the highest without buffers out of band

# Where a module lies and how it was started; not what it does.
MODULE_NAMES = {
    "__name__", "__file__", "__package__", "__path__", "__spec__", "__loader__", "__cached__", "__doc__",
    "__builtins__", "__annotations__", "__annotate__", "__conditional_annotations__",
}  # fmt: skip
_CLASS_NAMES = {
    "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__orig_bases__",
    "__parameters__", "_abc_impl", "__type_params__",
}  # fmt: skip


class Reduced(NamedTuple):
    """How an object says that it is made again."""

    make: Callable[..., Any]
    arguments: Any
    states: tuple[Any, ...]
    """One, or two where a class has slots."""
    items: list[Any]
    pairs: list[tuple[Any, Any]]


def defaults_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Arguments that have a default, with it."""
    code, defaults = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from sorted((function.__kwdefaults__ or {}).items())


def contents_of(cell: CellType) -> tuple[Any, ...]:
    """What is in a cell: nothing as long as the variable is unbound."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def members_of(kind: type) -> dict[str, Any]:
    """What a class defines itself, but for where it was defined; values of an enum's members under their names."""
    members = {
        name: value
        for name, value in vars(kind).items()
        if name not in _CLASS_NAMES and not isinstance(value, MemberDescriptorType | GetSetDescriptorType)
    }
    if not issubclass(kind, enum.Enum):
        return members
    named = {name: member.value for name, member in kind.__members__.items()}
    # As pairs, since the order in which an enum lists its members can be seen.
    own = {name: value for name, value in members.items() if name not in named and not _is_of_enum(name, value)}
    return {**own, "__members__": list(named.items())}


def submodules_along(module: ModuleType, names: tuple[str, ...]) -> set[str]:
    """Modules that attributes lead to, one below the other."""
    found = set()
    for name in names:
        inner = vars(module).get(name)
        if not isinstance(inner, ModuleType) or inner.__name__ != f"{module.__name__}.{name}":
            break
        found.add(inner.__name__)
        module = inner
    return found


def reduce(value: Any) -> str | Reduced:
    """How an object is made again, or the name that it goes by in its module; raises what the object raises."""
    make = cloudpickle.Pickler.dispatch_table.get(type(value))
    reduced: Any = make(value) if make is not None else value.__reduce_ex__(REDUCE_PROTOCOL)
    if isinstance(reduced, str):
        return reduced
    made, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    states = state if _is_slots_state(state) else (state,)
    return Reduced(made, arguments, states, list(items or ()), list(pairs or ()))


def _is_slots_state(state: object) -> bool:
    """The pair (attributes, slots) that classes with `__slots__` give."""
    return isinstance(state, tuple) and len(state) == 2 and all(part is None or type(part) is dict for part in state)


def _is_of_enum(name: str, value: object) -> bool:
    """What the machinery of enum keeps in each of its classes."""
    if name == "__new__" or (name.startswith("_") and not name.startswith("__")):
        function = getattr(value, "__func__", value)
        return not isinstance(function, FunctionType) or function.__module__ == "enum"
    return False
