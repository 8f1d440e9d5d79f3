"""What code does, told from its bytes alone: the node's own part of a version's identity.

A pickle is a program. It is followed here without being run: what it imports, calls and puts together is hashed in the
order in which it happens, and what only shows where the code came from (files, lines, names of modules, the order of a
set) is left out. Equal fingerprints are equal programs; equal functions that are pickled otherwise merely have two.
"""

import hashlib
import io
import json
import pickletools
import struct
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmill.core.api import Code

_CLOUDPICKLE = "cloudpickle.cloudpickle"
_MODULE_NAMES = frozenset({"__package__", "__name__", "__path__", "__file__"})
_FUNCTION_NAMES = frozenset({"__doc__", "__qualname__", "__module__"})
_CLASS_NAMES = _FUNCTION_NAMES | {"__firstlineno__", "__static_attributes__"}

# Of the arguments of `types.CodeType` since Python 3.11.
_CODE_ARGUMENTS = 18
_CODE_FLAGS, _CODE_NAME = 5, 11
_CODE_PLACE = frozenset({10, 12, 13, 14})  # file, qualified name, first line, table of lines
_FREE_FLAGS = 0x10 | 0x4000000  # nested in a function, has a docstring

MAX_STEPS = 2_000_000  # opcodes that are followed, some 3 µs each
_LONG = 256  # bytes; of longer literals the digest stands for them, however often they are used

_LAYOUT = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING})


def fingerprint(code: Code) -> str:
    """64 hex digits over what a version's code does."""
    match code.encoding:
        case "cloudpickle":
            return _of_pickle(code.payload)
        case "source":
            return _of_source(code.payload)
        case "pipeline":
            # Made by the node, of the digests of its parts.
            return code.form
    return _of_bytes(code.payload)


def _of_bytes(payload: bytes) -> str:
    return hashlib.sha256(b"bytes" + payload).hexdigest()


def _of_source(payload: bytes) -> str:
    """Without comments and layout. What is no Python here may be some of another version."""
    try:
        document = json.loads(payload)
        tokens = tokenize.generate_tokens(io.StringIO(document["source"]).readline)
        found = [[token.type, _text_of(token)] for token in tokens if token.type not in _LAYOUT]
        text = json.dumps([document["function"], found])
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError):
        return _of_bytes(payload)
    return hashlib.sha256(b"source" + text.encode()).hexdigest()


def _text_of(token: tokenize.TokenInfo) -> str:
    """How deep a block is indented is no matter, only that it is."""
    return "" if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE) else token.string


def _of_pickle(payload: bytes) -> str:
    program = _Program()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(payload)):
            if number >= MAX_STEPS:
                raise _NotFollowed("too long")
            program.step(opcode.name, argument)
    except (_NotFollowed, ValueError, IndexError, KeyError, AttributeError, TypeError, RecursionError):
        # No pickle of a client of ours: known by its very bytes.
        return _of_bytes(payload)
    return program.hash.hexdigest()


class _NotFollowed(Exception):
    """Something that no client of ours writes."""


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str


@dataclass(slots=True, eq=False)
class _Fixed:
    """What cannot be changed any more: a tuple, a frozen set, a code object, a long literal."""

    kind: str
    items: tuple[Any, ...]
    digest: bytes | None = None
    """Of what holds nothing that has an identity; taken once, so that what is used often costs no more."""
    number: int | None = None
    """Else, once it was met."""


@dataclass(slots=True, eq=False)
class _Object:
    """Something with an identity: a container, or what a call gave."""

    kind: str
    items: list[Any] = field(default_factory=list)
    """Of a list, set or bytearray; of a dictionary its pairs, as tuples."""
    number: int | None = None
    """Once something else has seen it; what is put into it later is an event of its own."""


_MARK = object()
_CONTAINERS = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FIXED_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADDITIONS = {"APPEND": "list", "APPENDS": "list", "SETITEM": "dict", "SETITEMS": "dict", "ADDITEMS": "set"}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS))
_CODE_TYPE, _MODULE_TYPE = (_Global("types", name) for name in ("CodeType", "ModuleType"))


class _Program:
    """A pickle that is followed, opcode by opcode, as `pickle.Unpickler` would."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"pickle 1")
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._numbers = 0
        self._imported: set[_Global] = set()
        self._made: list[_Object] = []  # kept, so that no other has the id of one of them
        self._unpackers: set[int] = set()
        self._modules: set[int] = set()
        self._trackers: dict[str, int] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(self._literal(argument))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_Object(_CONTAINERS[name]))
        elif name == "BYTEARRAY8":
            stack.append(_Object("bytearray", [bytes(argument)]))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(self._fixed("tuple", self._pop_to_mark()))
        elif name in _FIXED_TUPLES:
            stack.append(self._fixed("tuple", self._pop_many(_FIXED_TUPLES[name])))
        elif name == "FROZENSET":
            stack.append(self._fixed("frozenset", self._pop_to_mark()))
        elif name in _ADDITIONS:
            self._add(name)
        elif name == "STACK_GLOBAL":
            stack.append(self._import(*self._pop_many(2)))
        elif name == "GLOBAL":
            stack.append(self._import(*argument.split(" ", 1)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self._call(name, *self._pop_many(3 if name == "NEWOBJ_EX" else 2))
        elif name == "BUILD":
            self._build(*self._pop_many(2))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "STOP":
            self._event("stop", stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise _NotFollowed(name)

    # What happens

    def _import(self, module: str, name: str) -> _Global:
        found = _Global(module, name)
        if found not in self._imported:
            self._imported.add(found)
            self._event("import", found)
        return found

    def _call(self, how: str, function: Any, *arguments: Any) -> None:
        given = arguments[0].items
        if how == "REDUCE" and isinstance(function, _Global) and function.module == _CLOUDPICKLE:
            if function.name == "_builtin_type" and len(given) == 1 and isinstance(given[0], str):
                self._stack.append(_Global("types", given[0]))
                return
            arguments = (self._fixed("tuple", self._without_place(function.name, given)),)
        elif how == "REDUCE" and function == _CODE_TYPE:
            self._stack.append(self._fixed("code", given))
            return
        elif id(function) in self._unpackers and len(given) == 5:
            # The client's lines of code, for tracebacks; see `client.pickling`, whose code is hashed as well.
            arguments = (self._fixed("tuple", (*given[:3], None, given[4])),)
        self._event(how, function, *arguments)
        made = _Object("result")
        self._number(made)
        if function == _Global(_CLOUDPICKLE, "_make_function") and _name_of(given[0]) == "_unpack":
            self._unpackers.add(id(made))
        elif function == _MODULE_TYPE:
            self._modules.add(id(made))
        self._made.append(made)
        self._stack.append(made)

    def _without_place(self, name: str, given: Sequence[Any]) -> Sequence[Any]:
        """Arguments of cloudpickle's makers, without what tells where something was defined."""
        arguments = list(given)
        match name:
            case "_make_function":
                _leave_out(arguments[1], _MODULE_NAMES)
            case "_function_setstate":
                _leave_out(arguments[1].items[1], _FUNCTION_NAMES)
            case "_class_setstate":
                _leave_out(arguments[1].items[0], _CLASS_NAMES)
            case "_make_skeleton_class":
                _leave_out(arguments[3], _CLASS_NAMES)
                arguments[4] = self._tracker(arguments[4])
            case "_make_typevar":
                arguments[5] = self._tracker(arguments[5])
            case "_make_skeleton_enum":
                arguments[2] = arguments[4] = None
                arguments[5] = self._tracker(arguments[5])
        return arguments

    def _tracker(self, drawn: Any) -> int:
        """A number in place of what cloudpickle draws for a class in each process."""
        if not isinstance(drawn, str):
            raise _NotFollowed("an identity that is no text")
        return self._trackers.setdefault(drawn, len(self._trackers))

    def _build(self, target: Any, state: Any) -> None:
        if id(target) in self._modules:
            _leave_out(state, _MODULE_NAMES)
        self._event("build", target, state)
        self._stack.append(target)

    def _add(self, name: str) -> None:
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        items = self._pop_many(count) if count else self._pop_to_mark()
        target, kind = self._stack[-1], _ADDITIONS[name]
        if kind == "dict":
            added = [self._fixed("tuple", pair) for pair in zip(items[::2], items[1::2], strict=True)]
        else:
            added = items
        if isinstance(target, _Object) and target.number is None and target.kind == kind:
            target.items += added
        else:
            self._event(name, target, self._fixed("frozenset" if kind == "set" else "tuple", added))

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise _NotFollowed("no mark")
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def _pop_many(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        items = self._stack[max(start, 0) :]
        if start < 0 or any(item is _MARK for item in items):
            raise _NotFollowed("the stack is empty")
        del self._stack[start:]
        return items

    # What is hashed

    def _event(self, what: str, *values: Any) -> None:
        put = _writer(self.hash.update)
        put("event", f"{what} {len(values)}".encode())
        for value in values:
            self._write(value, put)

    def _literal(self, value: Any) -> Any:
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if isinstance(value, int) and value.bit_length() > 8 * _LONG:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if isinstance(data, bytes) and len(data) > _LONG:
            return _Fixed(type(value).__name__, (), hashlib.sha256(type(value).__name__.encode() + data).digest())
        return value

    def _fixed(self, kind: str, items: Sequence[Any]) -> _Fixed:
        value = _Fixed(kind, tuple(items))
        if not any(isinstance(item, _Object) or (isinstance(item, _Fixed) and not item.digest) for item in items):
            digest = hashlib.sha256()
            self._write_items(value, _writer(digest.update))
            value.digest = digest.digest()
        return value

    def _write(self, value: Any, put: Callable[[str, bytes], None]) -> None:
        if isinstance(value, _Fixed):
            if value.digest is not None:
                put("fixed", value.digest)
            elif value.number is not None:
                put("again", b"%d" % value.number)
            else:
                self._number(value)
                self._write_items(value, put)
        elif isinstance(value, _Object):
            self._write_object(value, put)
        elif isinstance(value, _Global):
            put("global", json.dumps([value.module, value.name]).encode())
        elif isinstance(value, float):
            put("float", struct.pack(">d", value))
        elif isinstance(value, str):
            put("str", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes):
            put("bytes", value)
        elif isinstance(value, int) or value is None:
            put(type(value).__name__, repr(value).encode())
        else:
            raise _NotFollowed(type(value).__name__)

    def _write_items(self, value: _Fixed, put: Callable[[str, bytes], None]) -> None:
        if value.kind == "frozenset":
            put("frozenset", self._sorted(value.items))
            return
        items = _without_lines(value.items) if value.kind == "code" else value.items
        put(value.kind, b"%d" % len(items))
        for item in items:
            self._write(item, put)

    def _write_object(self, value: _Object, put: Callable[[str, bytes], None]) -> None:
        if value.number is not None:
            put("again", b"%d" % value.number)
            return
        self._number(value)
        if value.kind == "set":
            put("set", self._sorted(value.items))
            return
        put(value.kind, b"%d" % len(value.items))
        for item in value.items:
            self._write(item, put)

    def _sorted(self, items: Iterable[Any]) -> bytes:
        """Digests of what has no order."""
        digests = []
        for item in items:
            digest = hashlib.sha256()
            self._write(item, _writer(digest.update))
            digests.append(digest.digest())
        return b"".join(sorted(digests))

    def _number(self, value: _Object | _Fixed) -> None:
        value.number = self._numbers
        self._numbers += 1


def _writer(update: Callable[[bytes], None]) -> Callable[[str, bytes], None]:
    def put(what: str, data: bytes) -> None:
        # With its length, so that no two programs write the same bytes.
        update(f"{what} {len(data)}:".encode())
        update(data)

    return put


def _leave_out(target: Any, names: frozenset[str]) -> None:
    """Entries of a dictionary that nothing has seen yet."""
    if isinstance(target, _Object) and target.kind == "dict" and target.number is None:
        target.items = [pair for pair in target.items if not _is_named(pair.items[0], names)]


def _is_named(key: Any, names: frozenset[str]) -> bool:
    return isinstance(key, str) and key in names


def _name_of(code: Any) -> Any:
    return code.items[_CODE_NAME] if isinstance(code, _Fixed) and code.kind == "code" else None


def _without_lines(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a code object, what decides what it does."""
    if len(arguments) != _CODE_ARGUMENTS or not isinstance(arguments[_CODE_FLAGS], int):
        return arguments
    kept = [None if number in _CODE_PLACE else value for number, value in enumerate(arguments)]
    kept[_CODE_FLAGS] = arguments[_CODE_FLAGS] & ~_FREE_FLAGS
    return tuple(kept)
