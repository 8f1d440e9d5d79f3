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
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

from shardmill.client import arrays
from shardmill.client.ownership import is_own, is_own_name
from shardmill.client.parts import MODULE_NAMES, contents_of, defaults_of, members_of, reduce, submodules_along
from shardmill.client.reach import BodyImport, Chain, reach_of, stable_instructions
from shardmill.client.references import is_importable, shared_object
from shardmill.client.refusals import CannotShip, Place, check_is_there, check_may_leave, refuse
from shardmill.marking import MARK

FORM = b"shardmill form 1"
"""Raised with every change of what a digest is over."""

_UNSTABLE_FLAGS = 0x10 | 0x4000000  # of code: nested in a function, has a docstring
_CONSTANT = Place("a constant of the code", "constant")

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
        self._items: list[tuple[int, str, object]] = []
        self._heights: dict[int, int] = {}
        self._height = 0
        """Of sets in sets, in what is being visited."""
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
            around, self._height = self._height, 0
            known = self._sets[id(value)] = self.form(value, place)
            self._heights[id(value)] = self._height + 1
            if not _is_plain(value):
                self._items.append((self._height + 1, known, value))
            self._height = around
        self._height = max(self._height, self._heights.get(id(value), 0))
        return known

    @property
    def items_of_sets(self) -> list[object]:
        """What sets hold beside texts and numbers, in an order that is the same in every process: inner ones first."""
        return [item for *_, item in sorted(self._items, key=lambda found: found[:2])]


def _is_plain(value: object) -> bool:
    """Whether no part of it has an identity."""
    return type(value) in _SCALARS or (isinstance(value, tuple | frozenset) and all(map(_is_plain, value)))


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
            self._visit_items("tuple", value, place)
        elif kind in (set, frozenset):
            digests = sorted(self._walk.form_of_item(item, place) for item in value)
            self._put(kind.__name__, "".join(digests).encode())
        elif kind is CodeType:
            self._visit_code(value)
        elif not self._visit_by_name(value, place) and not self._is_known(value):
            self._visit_numbered(value, place)

    def _visit_by_name(self, value: Any, place: Place) -> bool:
        """Modules, functions and classes that are installed, and what else is never numbered."""
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
            self.visit(value.value if value.name is None else None, place)
        elif isinstance(value, logging.Logger):
            # Named after their module, which may be __main__; none decides what comes out.
            self._put("logger")
        elif isinstance(value, typing.TypeVar):
            self._put("typevar", value.__name__.encode())
        elif isinstance(value, re.Pattern):
            # By content, as equal ones are one object only as long as re's cache holds them.
            self._put("pattern", b"%d" % value.flags)
            self.visit(value.pattern, place)
        elif token := arrays.element_type(value):
            self._put(*token)
        else:
            return False
        return True

    def _visit_numbered(self, value: Any, place: Place) -> None:
        kind = type(value)
        if kind is list:
            self._visit_items("list", value, place)
        elif kind is dict or kind is MappingProxyType:
            self._visit_pairs(list(value.items()), place)
        elif kind is FunctionType:
            self._visit_function(value, place)
        elif kind is CellType:
            self._visit_items("cell", contents_of(value), place)
        elif isinstance(value, ModuleType):
            self._visit_whole_module(value, place)
        elif isinstance(value, type):
            self._visit_class(value, place)
        elif kind is MethodType:
            self._visit_items("method", (value.__func__, value.__self__), place)
        elif kind is dataclasses.Field:
            self._visit_members("field", {name: getattr(value, name, None) for name in _FIELD_NAMES}, place)
        elif kind is functools.cached_property:
            self._visit_items("cached property", (value.func,), place)
        elif kind is functools._lru_cache_wrapper:
            self._visit_items("cache", (value.__wrapped__, value.cache_parameters()), place)
        elif not self._visit_array(value, place):
            check_may_leave(value, place)
            self._visit_reduced(value, place)

    # Functions

    def _visit_function(self, function: FunctionType, place: Place) -> None:
        code, name = function.__code__, function.__name__
        reach = reach_of(code)
        self._walk.codes[code] = None
        self._put("function", name.encode())
        self._visit_code(code)
        for argument, default in defaults_of(function):
            self._put("default", argument.encode())
            self.visit(default, Place(f"default of `{argument}` of function `{name}`", argument, through=place))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            for content in contents_of(cell):
                self._put("captured", variable.encode())
                where = Place(f"captured variable `{variable}` of function `{name}`", variable, through=place)
                self._visit_used(content, reach.variables.get(variable, set()), where)
        for variable in sorted(reach.names.keys() - MODULE_NAMES):
            if variable in function.__globals__:
                self._put("global", variable.encode())
                where = Place(f"global `{variable}` of function `{name}`", variable, through=place)
                self._visit_used(function.__globals__[variable], reach.names[variable], where)
            elif not hasattr(builtins, variable):
                self._put("missing", variable.encode())
        for statement in reach.imports:
            self._visit_import(statement, function, place)
        attributes = {attribute: value for attribute, value in vars(function).items() if attribute != MARK}
        self._visit_members("attributes", attributes, place)

    def _visit_code(self, code: CodeType) -> None:
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & ~_UNSTABLE_FLAGS)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        instructions = list(stable_instructions(code))
        self._put("code", repr((code.co_name, numbers, names, len(instructions))).encode())
        self._put("handlers", code.co_exceptiontable)
        for instruction in instructions:
            self._put("do", f"{instruction.opname} {instruction.arg}".encode())
            if instruction.opcode in dis.hasconst:
                self.visit(instruction.argval, _CONSTANT)

    def _visit_import(self, statement: BodyImport, function: FunctionType, place: Place) -> None:
        """A statement inside a function: the module, if it is the user's own, as far as it is used."""
        name, by = statement.module, f"function `{function.__name__}`"
        if statement.level:
            package = function.__globals__.get("__package__") or ""
            name = importlib.util.resolve_name("." * statement.level + name, package)
        own = is_own_name(name.partition(".")[0])
        if not own:
            for full in [f"{name}.{bound}" for bound in statement.bound] if statement.is_from else [name]:
                check_is_there(full, Place(f"an import of {by}", full, through=place))
            if own is not None or not statement.guarded:
                self._walk.installed.add(name)
            return
        try:
            module = importlib.import_module(name)
            for bound in statement.bound if statement.is_from else ():
                if not hasattr(module, bound):
                    importlib.import_module(f"{name}.{bound}")
        except Exception as error:
            if statement.guarded and isinstance(error, ImportError):
                return
            raise CannotShip(f"{by} imports {name}, which cannot be imported here: {error}") from error
        self._take_import(name)
        for bound, chains in statement.bound.items():
            where = Place(f"`{bound}`, imported by {by}", bound, through=place)
            if not statement.is_from:
                self._visit_used(sys.modules[bound], chains, where)
            elif isinstance(getattr(module, bound), ModuleType):
                self._visit_used(module, {(bound, *chain) for chain in chains}, where)
            else:
                self._visit_used(module, {(bound,)}, where)

    def _take_import(self, name: str) -> None:
        """A module that will be imported by name, with the packages above it."""
        while name:
            module = self._walk.imported[name] = sys.modules[name]
            self._walk.attributes.setdefault(module, set())
            parent, _, child = name.rpartition(".")
            if parent:
                self._walk.attributes.setdefault(sys.modules[parent], set()).add(child)
            name = parent

    # Modules

    def _visit_used(self, value: Any, chains: set[Chain], place: Place) -> None:
        """The value of a variable; of a module of the user's own only what is named behind it."""
        if not isinstance(value, ModuleType):
            self.visit(value, place)
            return
        self._put("used", repr(sorted(chains)).encode())
        if not is_own(value):
            self._visit_by_name(value, place)
        for chain in sorted(chains):
            self._visit_chain(value, chain, place)

    def _visit_chain(self, module: ModuleType, chain: Chain, place: Place) -> None:
        if not is_own(module):
            self._walk.submodules |= submodules_along(module, chain)
            if chain:
                check_is_there(f"{module.__name__}.{chain[0]}", place.attribute(chain[0]))
        elif not chain:
            self.visit(module, place)
        elif hasattr(module, chain[0]):
            self._walk.attributes.setdefault(module, set()).add(chain[0])
            where = Place(f"`{chain[0]}` of module `{module.__name__}`", chain[0], through=place)
            self._visit_used(getattr(module, chain[0]), {chain[1:]}, where)
        else:
            self._put("missing", chain[0].encode())

    def _visit_whole_module(self, module: ModuleType, place: Place) -> None:
        """A module that is handed around: all that is in it."""
        names = sorted(vars(module).keys() - MODULE_NAMES)
        self._walk.attributes.setdefault(module, set()).update(names)
        self._put("own module", repr(names).encode())
        for name in names:
            where = Place(f"`{name}` of module `{module.__name__}`, which goes along whole,", name, through=place)
            self._visit_used(vars(module)[name], {()}, where)

    # Classes and objects

    def _visit_class(self, kind: type, place: Place) -> None:
        self._put("class", kind.__name__.encode())
        where = Place(f"class `{kind.__name__}`", kind.__name__, through=place)
        self._visit_items("bases", (type(kind), *kind.__bases__), where)
        self._visit_members("attributes", members_of(kind), where)

    def _visit_array(self, value: Any, place: Place) -> bool:
        if tokens := arrays.tensor(value, place):
            self.visit(type(value), place)
            self._visit_members("attributes", vars(value), place)
        elif not (tokens := arrays.array(value)):
            return False
        for token in tokens:
            self._put(*token)
        return True

    def _visit_reduced(self, value: Any, place: Place) -> None:
        """Anything else: as it says itself that it is made again."""
        try:
            reduced = reduce(value)
        except Exception as error:
            what = f"a {type(value).__qualname__} of {type(value).__module__}"
            raise refuse(place, what, f"create it inside the function ({error})") from error
        if isinstance(reduced, str):
            module = getattr(value, "__module__", None) or type(value).__module__
            check_is_there(module, place)
            self._put("named", f"{module}.{reduced}".encode())
            return
        self._walk.keep(reduced)
        self._put("object", b"%d" % len(reduced.states))
        self.visit(reduced.make, place)
        # A bound method of compiled code is made from the object that it belongs to.
        self.visit(reduced.arguments, place.attribute("__self__") if type(value) is BuiltinFunctionType else place)
        for state in reduced.states:
            if isinstance(state, dict) and all(type(name) is str for name in state):
                self._visit_members("state", state, place)
            else:
                self.visit(state, place)
        self._visit_items("items", reduced.items, place)
        self._visit_pairs(reduced.pairs, place)

    # Tokens. What has parts says first how many, so that no two trees write the same bytes.

    def _visit_members(self, what: str, members: dict[str, Any], place: Place) -> None:
        """Named values, whose order does not count."""
        self._put(what, b"%d" % len(members))
        for name in sorted(members):
            self._put("member", name.encode())
            self.visit(members[name], place.attribute(name))

    def _visit_pairs(self, pairs: Sequence[tuple[Any, Any]], place: Place) -> None:
        self._put("pairs", b"%d" % len(pairs))
        for key, value in pairs:
            self.visit(key, place)
            self.visit(value, place.item(key))

    def _visit_items(self, what: str, items: Sequence[Any], place: Place) -> None:
        self._put(what, b"%d" % len(items))
        for number, item in enumerate(items):
            encode = _SCALARS.get(type(item))
            if encode is not None:
                self._put(type(item).__name__, encode(item))
            else:
                self.visit(item, place.item(number))

    def _put(self, what: str, data: bytes = b"") -> None:
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


def form_of_source(source: str, function: str, filename: str) -> str:
    """The form of a function in a file's text, which is compiled, not run: that of the whole file's code.

    Raises:
        SyntaxError: The text is not Python.
    """
    form = _Form(Walk())
    form.visit(("source", function, compile(source, filename, "exec", dont_inherit=True)), _CONSTANT)
    return form.digest()
