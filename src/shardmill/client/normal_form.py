"""The normal form of a function: what its digest is over.

A walk over all that would be shipped by value, in an order that depends on nothing but the code: code objects without
file names and lines, sets as sorted digests of their items, classes and instances by sorted attributes, what is
installed by its name. Equal code gives equal forms in every process, directory, notebook and hash seed. The order of a
dictionary counts, since a function can see it. An object met again is a number, so cycles end.
"""

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import logging
import re
import struct
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import cloudpickle

from shardmill.client.ownership import is_own, is_own_name
from shardmill.client.reach import BodyImport, Chain, reach_of, stable_instructions
from shardmill.client.references import is_importable, shared_object
from shardmill.client.refusals import CannotShip, Place, check_is_there, check_may_leave, refuse
from shardmill.marking import MARK

FORM = b"shardmill form 1"
"""Raised with every change of what a digest is over."""

_REDUCE_PROTOCOL = 4  # the highest without buffers out of band
_UNSTABLE_FLAGS = 0x10 | 0x4000000  # of code: nested in a function, has a docstring

# Where a module lies and how it was started; not what it does.
_MODULE_NAMES = {
    "__name__", "__file__", "__package__", "__path__", "__spec__", "__loader__", "__cached__", "__doc__",
    "__builtins__", "__annotations__", "__annotate__", "__conditional_annotations__",
}  # fmt: skip
_CLASS_NAMES = {
    "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__orig_bases__",
    "__parameters__", "_abc_impl", "__type_params__",
}  # fmt: skip
_FIELD_NAMES = ("name", "default", "default_factory", "init", "repr", "hash", "compare", "metadata", "kw_only")

_SCALARS: dict[type, Callable[[Any], bytes]] = {
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: hex(value).encode(),
    float: lambda value: struct.pack(">d", value),
    complex: lambda value: struct.pack(">dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: bytes,
    bytearray: bytes,
    memoryview: bytes,
    type(None): lambda _: b"",
    type(...): lambda _: b"",
    type(NotImplemented): lambda _: b"",
}


class Walk:
    """What a walk came by; `form` is complete after `visit`."""

    def __init__(self) -> None:
        self.attributes: dict[ModuleType, set[str]] = {}
        """Own modules, with those of their attributes that are reached."""
        self.imported: dict[str, ModuleType] = {}
        """Own modules that functions import when they run, under their full names."""
        self.installed: set[str] = set()
        """Other modules that functions import when they run."""
        self.submodules: set[str] = set()
        """Installed modules reached as attributes of their package."""
        self.codes: dict[CodeType, None] = {}
        """Code of functions that go by value."""
        self._sets: dict[int, str] = {}
        self._kept: list[object] = []

    def form(self, value: object, place: Place) -> str:
        """The digest of a value's normal form: 64 hex digits.

        Raises:
            CannotShip: The value holds something that cannot leave this process.
        """
        form = _Form(self)
        form.visit(value, place)
        return form.digest()

    def keep(self, value: object) -> None:
        """Hold on to an object, so that no other one gets its id."""
        self._kept.append(value)

    def form_of_item(self, value: object, place: Place) -> str:
        """Of an item of a set: by itself, since sets have no order to number things in."""
        known = self._sets.get(id(value))
        if known is None:
            self._sets[id(value)] = "cycle"
            self.keep(value)
            known = self._sets[id(value)] = self.form(value, place)
        return known


class _Form:
    """One digest under way."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._hash = hashlib.sha256(FORM)
        self._numbers: dict[int, int] = {}

    def digest(self) -> str:
        return self._hash.hexdigest()

    def visit(self, value: Any, place: Place) -> None:
        kind = type(value)
        encode = _SCALARS.get(kind)
        if encode is not None:
            self._put(kind.__name__, encode(value))
        elif kind is tuple:
            self._put_items("tuple", value, place)
        elif kind in (set, frozenset):
            digests = sorted(self._walk.form_of_item(item, place) for item in value)
            self._put(kind.__name__, "".join(digests).encode())
        elif kind is CodeType:
            self._visit_code(value)
        elif not self._visit_by_name(value, place) and not self._is_known(value):
            self._visit_numbered(value, place)

    def _visit_by_name(self, value: Any, place: Place) -> bool:
        """Modules, functions and classes that are installed, and the like."""
        if shared := shared_object(value):
            self._put("shared", ".".join(shared).encode())
        elif isinstance(value, FunctionType | type) and is_importable(value):
            check_is_there(value.__module__, place)
            self._put("named", f"{value.__module__}.{value.__qualname__}".encode())
        elif isinstance(value, ModuleType) and not is_own(value):
            check_is_there(value.__name__, place)
            self._put("module", value.__name__.encode())
        elif isinstance(value, enum.Enum):
            self._put("enum", str(value.name).encode())
            self.visit(type(value), place)
            if value.name is None:
                self.visit(value.value, place)
        elif isinstance(value, logging.Logger):
            # Named after their module, which may be __main__; none decides what comes out.
            self._put("logger")
        elif isinstance(value, typing.TypeVar):
            self._put("typevar", value.__name__.encode())
        elif isinstance(value, re.Pattern):
            # By content, as equal ones are one object only as long as re's cache holds them.
            self._put("pattern", b"%d" % value.flags)
            self.visit(value.pattern, place)
        else:
            return self._visit_array_type(value)
        return True

    def _visit_numbered(self, value: Any, place: Place) -> None:
        kind = type(value)
        if kind is list:
            self._put_items("list", value, place)
        elif kind is dict or kind is MappingProxyType:
            self._visit_pairs("dict", value.items(), place)
        elif kind is FunctionType:
            self._visit_function(value, place)
        elif kind is CellType:
            self._put("cell")
            for content in _contents(value):
                self.visit(content, place)
        elif isinstance(value, ModuleType):
            self._visit_whole_module(value, place)
        elif isinstance(value, type):
            self._visit_class(value, place)
        elif kind is MethodType:
            self._put("method")
            self.visit(value.__func__, place)
            self.visit(value.__self__, place)
        elif kind is dataclasses.Field:
            self._visit_members("field", {name: getattr(value, name, None) for name in _FIELD_NAMES}, place)
        elif kind is functools.cached_property:
            self._put("cached property")
            self.visit(value.func, place)
        elif kind is functools._lru_cache_wrapper:
            self._put("cache")
            self.visit((value.__wrapped__, value.cache_parameters()), place)
        else:
            check_may_leave(value, place)
            if not self._visit_array(value, place):
                self._visit_reduced(value, place)

    # Functions

    def _visit_function(self, function: FunctionType, place: Place) -> None:
        code = function.__code__
        reach = reach_of(code)
        self._walk.codes[code] = None
        name = function.__name__
        self._put("function", name.encode())
        self._visit_code(code)
        for argument, default in _defaults_of(function):
            self._put("default", argument.encode())
            self.visit(default, Place(f"default of `{argument}` of function `{name}`", argument, through=place))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._put("captured", variable.encode())
            for content in _contents(cell):
                where = Place(f"captured variable `{variable}` of function `{name}`", variable, through=place)
                self._visit_used(content, reach.variables.get(variable, set()), where)
        for variable in sorted(reach.names):
            if variable in _MODULE_NAMES:
                continue
            if variable in function.__globals__:
                self._put("global", variable.encode())
                where = Place(f"global `{variable}` of function `{name}`", variable, through=place)
                self._visit_used(function.__globals__[variable], reach.names[variable], where)
            elif not hasattr(builtins, variable):
                self._put("missing", variable.encode())
        for statement in reach.imports:
            self._visit_import(statement, function, place)
        self._visit_members(
            "attributes", {name: value for name, value in vars(function).items() if name != MARK}, place
        )

    def _visit_used(self, value: Any, chains: set[Chain], place: Place) -> None:
        """The value of a variable; of a module only what is named behind it."""
        if not isinstance(value, ModuleType):
            self.visit(value, place)
            return
        if not is_own(value):
            self.visit(value, place)
        for chain in sorted(chains):
            self._put("chain", ".".join(chain).encode())
            self._visit_chain(value, chain, place)

    def _visit_chain(self, module: ModuleType, chain: Chain, place: Place) -> None:
        if not is_own(module):
            self._walk.submodules |= _submodules_along(module, chain)
            if module.__name__ == "shardmill" and chain:
                self.visit(getattr(module, chain[0], None), place.attribute(chain[0]))
            return
        if not chain:
            self.visit(module, place)
            return
        name, *rest = chain
        if not hasattr(module, name):
            self._put("missing", name.encode())
            return
        value = getattr(module, name)
        self._walk.attributes.setdefault(module, set()).add(name)
        where = Place(f"`{name}` of module `{module.__name__}`", name, through=place)
        if isinstance(value, ModuleType):
            self._visit_used(value, {tuple(rest)}, where)
        else:
            self.visit(value, where)

    def _visit_whole_module(self, module: ModuleType, place: Place) -> None:
        """A module that is handed around: all that is in it."""
        names = sorted(vars(module).keys() - _MODULE_NAMES)
        self._walk.attributes.setdefault(module, set()).update(names)
        self._put("own module", " ".join(names).encode())
        for name in names:
            where = Place(f"`{name}` of module `{module.__name__}`, which goes along whole,", name, through=place)
            self._visit_used(vars(module)[name], {()}, where)

    def _visit_import(self, statement: BodyImport, function: FunctionType, place: Place) -> None:
        name, by = statement.module, f"function `{function.__name__}`"
        if statement.level:
            package = function.__globals__.get("__package__") or ""
            name = importlib.util.resolve_name("." * statement.level + name, package)
        top = name.partition(".")[0]
        own = is_own_name(top)
        if not own:
            check_is_there(name, Place(f"{name}, imported by {by},", name, through=place))
            if own is not None or not statement.guarded:
                self._walk.installed.add(name)
            return
        try:
            module = importlib.import_module(name)
        except Exception as error:
            if statement.guarded and isinstance(error, ImportError):
                return
            raise CannotShip(f"{by} imports {name}, which cannot be imported here: {error}") from error
        parents = name.split(".")
        for length in range(1, len(parents) + 1):
            self._take_import(".".join(parents[:length]))
        for bound, chains in statement.bound.items():
            where = Place(f"`{bound}`, imported by {by}", bound, through=place)
            if not statement.is_from:
                self._visit_used(sys.modules[bound], chains, where)
                continue
            if not hasattr(module, bound) and is_own_name(top):
                importlib.import_module(f"{name}.{bound}")
            if isinstance(getattr(module, bound), ModuleType):
                for chain in chains:
                    self._visit_chain(module, (bound, *chain), where)
            else:
                self._visit_chain(module, (bound,), where)

    def _take_import(self, name: str) -> None:
        module = sys.modules[name]
        self._walk.imported[name] = module
        self._walk.attributes.setdefault(module, set())
        parent, _, child = name.rpartition(".")
        if parent:
            self._walk.attributes.setdefault(sys.modules[parent], set()).add(child)

    def _visit_code(self, code: CodeType) -> None:
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & ~_UNSTABLE_FLAGS)
        self._put("code", repr((code.co_name, *numbers)).encode())
        for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
            self._put("names", " ".join(names).encode())
        self._put("handlers", code.co_exceptiontable)
        for instruction in stable_instructions(code):
            self._put("do", instruction.opname.encode())
            if instruction.opcode in dis.hasconst:
                self.visit(instruction.argval, _CONSTANT)
            elif instruction.arg is not None:
                self._put("argument", b"%d" % instruction.arg)

    # Classes and objects

    def _visit_class(self, kind: type, place: Place) -> None:
        self._put("class", kind.__name__.encode())
        where = Place(f"class `{kind.__name__}`", kind.__name__, through=place)
        for base in (type(kind), *kind.__bases__):
            self.visit(base, where)
        members = {
            name: value
            for name, value in vars(kind).items()
            if name not in _CLASS_NAMES and not isinstance(value, MemberDescriptorType | GetSetDescriptorType)
        }
        if issubclass(kind, enum.Enum):
            named = kind.__members__
            self._visit_pairs("members", ((name, member.value) for name, member in named.items()), where)
            members = {
                name: value for name, value in members.items() if name not in named and not _is_of_enum(name, value)
            }
        self._visit_members("attributes", members, where)

    def _visit_array_type(self, value: Any) -> bool:
        """Types of elements, which are no classes, and of which there may be several equal ones."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and isinstance(value, numpy.dtype):
            self._put("dtype", repr((type(value).__name__, numpy.lib.format.dtype_to_descr(value))).encode())
        elif torch is not None and isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            self._put("torch", str(value).encode())
        else:
            return False
        return True

    def _visit_array(self, value: Any, place: Place) -> bool:
        """Arrays and tensors, by type, shape and bytes: how they pickle differs between versions and processes."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and type(value) is numpy.ndarray and not value.dtype.hasobject:
            self._put("array", repr((numpy.lib.format.dtype_to_descr(value.dtype), value.shape)).encode())
            self._put("bytes", value.tobytes())
        elif numpy is not None and isinstance(value, numpy.generic) and not value.dtype.hasobject:
            self._put("scalar", repr(numpy.lib.format.dtype_to_descr(value.dtype)).encode())
            self._put("bytes", value.tobytes())
        elif torch is not None and isinstance(value, torch.Tensor):
            self._visit_tensor(torch, value, place)
        else:
            return False
        return True

    def _visit_tensor(self, torch: Any, tensor: Any, place: Place) -> None:
        if tensor.device.type != "cpu":
            device = tensor.device.type.upper() if tensor.device.type == "cuda" else tensor.device.type
            raise refuse(place, f"a {device} tensor", "capture its .cpu()")
        self._put("tensor", repr((str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)).encode())
        self.visit(type(tensor), place)
        dense = tensor.detach()
        if dense.layout != torch.strided:
            self._put("layout", str(dense.layout).encode())
            dense = dense.to_dense()
        if dense.is_quantized:
            self._put("quantizer", repr((str(dense.qscheme()), dense.dequantize().tolist())).encode())
            dense = dense.int_repr()
        plain = dense.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
        self._put("bytes", plain.view(torch.uint8).numpy().tobytes())
        self._visit_members("attributes", vars(tensor), place)

    def _visit_reduced(self, value: Any, place: Place) -> None:
        """Anything else: as it says itself that it is made again."""
        reduce = cloudpickle.Pickler.dispatch_table.get(type(value))
        try:
            reduced: Any = reduce(value) if reduce is not None else value.__reduce_ex__(_REDUCE_PROTOCOL)
        except CannotShip:
            raise
        except Exception as error:
            what = f"a {type(value).__qualname__} of {type(value).__module__}"
            raise refuse(place, what, f"create it inside the function ({error})") from error
        if isinstance(reduced, str):
            module = getattr(value, "__module__", None) or type(value).__module__
            check_is_there(module, place)
            self._put("named", f"{module}.{reduced}".encode())
            return
        self._walk.keep(reduced)
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self._put("object")
        self.visit(make, place)
        bound = isinstance(value, BuiltinFunctionType)
        self.visit(arguments, place.attribute("__self__") if bound else place)
        for part in state if _is_slots_state(state) else (state,):
            if isinstance(part, dict) and all(type(name) is str for name in part):
                self._visit_members("state", part, place)
            else:
                self.visit(part, place)
        if items is not None:
            self._put_items("items", list(items), place)
        if pairs is not None:
            self._visit_pairs("pairs", pairs, place)

    # Tokens

    def _visit_members(self, what: str, members: dict[str, Any], place: Place) -> None:
        """Named values, whose order does not count."""
        self._put(what, b"%d" % len(members))
        for name in sorted(members):
            self._put("member", name.encode())
            self.visit(members[name], place.attribute(name))

    def _visit_pairs(self, what: str, pairs: Iterable[tuple[Any, Any]], place: Place) -> None:
        for key, value in pairs:
            self._put("key")
            self.visit(key, place)
            self.visit(value, place.item(key))
        self._put(what)

    def _put_items(self, what: str, items: Iterable[Any], place: Place) -> None:
        for number, item in enumerate(items):
            encode = _SCALARS.get(type(item))
            if encode is not None:
                self._put(type(item).__name__, encode(item))
            else:
                self.visit(item, place.item(number))
        self._put(what)

    def _put(self, what: str, data: bytes = b"") -> None:
        # Lengths keep neighbours apart, so that no two trees write the same bytes.
        self._hash.update(f"{what} {len(data)}:".encode())
        self._hash.update(data)

    def _is_known(self, value: object) -> bool:
        number = self._numbers.get(id(value))
        if number is not None:
            self._put("again", b"%d" % number)
            return True
        self._numbers[id(value)] = len(self._numbers)
        self._walk.keep(value)
        return False


_CONSTANT = Place("a constant of the code", "constant")


def form_of_source(source: str, function: str, filename: str) -> str:
    """The form of a function in a file's text, which is compiled, not run: that of the whole file's code.

    Raises:
        SyntaxError: The text is not Python.
    """
    form = _Form(Walk())
    form.visit(("source", function, compile(source, filename, "exec", dont_inherit=True)), _CONSTANT)
    return form.digest()


def _defaults_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Arguments that have a default, with it."""
    code, defaults = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from sorted((function.__kwdefaults__ or {}).items())


def _contents(cell: CellType) -> tuple[Any, ...]:
    """What is in a cell: nothing as long as the variable is unbound."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _submodules_along(module: ModuleType, chain: Chain) -> set[str]:
    found = set()
    for name in chain:
        inner = vars(module).get(name)
        if not isinstance(inner, ModuleType) or inner.__name__ != f"{module.__name__}.{name}":
            break
        found.add(inner.__name__)
        module = inner
    return found


def _is_slots_state(state: object) -> bool:
    """The pair (attributes, slots) that classes with `__slots__` give."""
    return isinstance(state, tuple) and len(state) == 2 and all(part is None or type(part) is dict for part in state)


def _is_of_enum(name: str, value: object) -> bool:
    """What the machinery of enum keeps in each of its classes."""
    if name == "__new__" or (name.startswith("_") and not name.startswith("__")):
        function = getattr(value, "__func__", value)
        return not isinstance(function, FunctionType) or function.__module__ == "enum"
    return False
