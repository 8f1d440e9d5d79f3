"""The bytes that a function travels as: cloudpickle's, with the user's own modules by value.

They load in any interpreter that has cloudpickle and what is installed by name; nothing of this package is needed.
"""

import contextlib
import functools
import io
import linecache
import sys
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from shardmill.client import arrays
from shardmill.client.normal_form import Walk
from shardmill.client.ownership import is_own
from shardmill.client.reach import nested_codes, reach_of
from shardmill.client.references import shared_object

# cloudpickle's table of modules that go by value is one for the process.
_registry_lock = threading.RLock()


def pickle_function(function: object, walk: Walk) -> tuple[bytes, set[str]]:
    """The pickled function, and the modules that its bytes name.

    Args:
        function: What to ship; `walk` has visited it.
        walk: Which attributes of the user's own modules are taken along.
    """
    with _registry_lock, _own_modules_by_value() as register:
        stream = io.BytesIO()
        pickler = _Pickler(stream, walk, register)
        pickler.dump(_Parcel(function, walk))
    return stream.getvalue(), pickler.named


class _Parcel:
    """The function with what must be in place before it is called."""

    def __init__(self, function: object, walk: Walk) -> None:
        # The modules first: their functions then find them made. So are what sets hold, whose own order depends on
        # addresses and on the hash seed.
        items = [_Mention(item) if type(item) in (tuple, frozenset) else item for item in walk.items_of_sets]
        made = [*walk.attributes, *items]
        self._contents = (made, walk.imported, sorted(walk.submodules), _lines_of(walk.codes), function)

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionType(_unpack.__code__, {}, "_unpack"), self._contents


class _Mention:
    """A call with a tuple, which a node numbers when something is done with it, not when it is made."""

    def __init__(self, item: object) -> None:
        self._item = item

    def __reduce__(self) -> tuple[Any, ...]:
        return id, (self._item,)


def _unpack(
    _made: Sequence[Any],
    imported: Mapping[str, Any],
    submodules: Sequence[str],
    sources: Mapping[str, Sequence[tuple[int, list[str]]]],
    function: object,
) -> object:
    # Runs where nothing of this module exists.
    import importlib
    import linecache
    import sys

    sys.modules.update(imported)
    for name in submodules:
        importlib.import_module(name)
    for filename, parts in sources.items():
        # Tracebacks then show the client's lines, though the file is not here.
        text = ["\n"] * max(start + len(lines) for start, lines in parts)
        for start, lines in parts:
            text[start : start + len(lines)] = lines
        linecache.cache[filename] = (sum(map(len, text)), None, text, filename)
    return function


def _make_storage(data: bytearray, dtype: object) -> object:
    # Runs where nothing of this module exists, but torch.
    import importlib

    torch = importlib.import_module("torch")
    plain = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
    return plain if dtype is None else torch.TypedStorage(wrap_storage=plain, dtype=dtype, _internal=True)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def __init__(self, stream: io.BytesIO, walk: Walk, register: "_Register") -> None:
        super().__init__(stream)
        self.named: set[str] = set()
        self._walk = walk
        self._globals = {id(vars(module)): _Globals(module) for module in walk.attributes}
        self._register = register
        self._is_relative = any(found.level for code in walk.codes for found in reach_of(code).imports)

    def reducer_override(self, value: Any) -> Any:
        if shared := shared_object(value):
            return getattr, (sys.modules[shared[0]], shared[1])
        if (storage := arrays.storage(value)) is not None:
            return FunctionType(_make_storage.__code__, {}, "_make_storage"), storage
        if isinstance(value, ModuleType) and is_own(value):
            return ModuleType, (value.__name__,), self._reached(value)
        if isinstance(value, type | FunctionType):
            self._register(getattr(value, "__module__", None))
        reduced = super().reducer_override(value)
        if isinstance(value, FunctionType) and reduced is not NotImplemented:
            return self._of_names(value, reduced)
        if reduced is NotImplemented:
            self._note(value)
        return reduced

    def _reached(self, module: ModuleType) -> dict[str, Any]:
        names = {"__package__", "__file__"} | self._walk.attributes.get(module, set())
        return {name: getattr(module, name) for name in sorted(names) if hasattr(module, name)}

    def _of_names(self, function: FunctionType, reduced: Any) -> Any:
        """A function by value: with the globals that it really reaches, and without annotations.

        Annotations are not needed to run it, and may name what only the client has.
        """
        make, (code, plain, *others), (attributes, slots), *rest = reduced
        if not self._is_relative:
            # Of no use then, and another when the same file is run in another way (`python -m`).
            plain.pop("__package__", None)
        shared = self._globals.get(id(function.__globals__), plain)
        names = reach_of(function.__code__).names.keys()
        slots = {
            **slots,
            "__annotations__": {},
            "__globals__": {name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())},
            # cloudpickle gives them in the order in which this process has imported them.
            "_cloudpickle_submodules": sorted(
                slots["_cloudpickle_submodules"], key=lambda module: str(module.__name__)
            ),
        }
        return make, (code, shared, *others), (attributes, slots), *rest

    def _note(self, value: Any) -> None:
        """Remember what a worker must be able to import."""
        names = [value.__name__] if isinstance(value, ModuleType) else [_module_of(value), _module_of(type(value))]
        # Some types name a module that cannot be imported, such as one that a compiler made up.
        loaded = [module for name in names if getattr(module := sys.modules.get(name), "__spec__", None)]
        self.named.update(module.__name__ for module in loaded if module is not None and not is_own(module))


class _Globals:
    """The globals of a module that goes along: its own dictionary, so that what either binds the other sees."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return vars, (self._module,)


def _module_of(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else ""


def _reduce_code(code: CodeType) -> Any:
    """As cloudpickle's, but under the client's file name, which tracebacks show."""
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if argument == "<dynamic-code>" else argument for argument in arguments)


def _reduce_cached_property(value: Any) -> Any:
    return functools.cached_property, (value.func,), {"attrname": value.attrname}


def _reduce_cache(value: Any) -> Any:
    """A function under `lru_cache`, with an empty cache."""
    parameters = value.cache_parameters()
    arguments = (value.__wrapped__, parameters["maxsize"], parameters["typed"], functools._CacheInfo)
    return functools._lru_cache_wrapper, arguments, vars(value)


_Pickler.dispatch_table = ChainMap(
    {
        CodeType: _reduce_code,
        functools.cached_property: _reduce_cached_property,
        functools._lru_cache_wrapper: _reduce_cache,
    },
    cloudpickle.Pickler.dispatch_table,
)


class _Register:
    """Makes modules go by value, until it is undone."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}

    def __call__(self, name: str | None) -> None:
        module = sys.modules.get(name or "")
        if module is None or name in self._modules or name in cloudpickle.list_registry_pickle_by_value():
            return
        if name != "__main__" and module.__name__ == name and is_own(module):
            cloudpickle.register_pickle_by_value(module)
            self._modules[module.__name__] = module

    def undo(self) -> None:
        for module in self._modules.values():
            cloudpickle.unregister_pickle_by_value(module)


@contextlib.contextmanager
def _own_modules_by_value() -> Iterator[_Register]:
    register = _Register()
    try:
        yield register
    finally:
        register.undo()


def _lines_of(codes: Mapping[CodeType, None]) -> dict[str, list[tuple[int, list[str]]]]:
    """Source lines of functions by file: parts of it, each with the number of lines before it."""
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for code in codes:
        text = linecache.getlines(code.co_filename)
        numbers = set(_line_numbers(code))
        if text and numbers and max(numbers) <= len(text):
            start, stop = min(numbers) - 1, max(numbers)
            found.setdefault(code.co_filename, []).append((start, text[start:stop]))
    return found


def _line_numbers(code: CodeType) -> Iterator[int]:
    yield from (line for *_, line in code.co_lines() if line)
    for nested in nested_codes(code):
        yield from _line_numbers(nested)
