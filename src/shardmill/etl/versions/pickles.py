"""A pickle is a program for a small machine with a stack. It is followed here without being run.

What it imports, calls and puts together is hashed in the order in which it happens. Left out is only what tells where
code came from (files, lines, names of modules), where cloudpickle's makers take it and where it is of the kind that
these expect; of a set, the order. Whatever else is on the stack is hashed once it is used, or dropped.
"""

import hashlib
import json
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_STEPS = 2_000_000  # opcodes that are followed, some 3 µs each
_MAX_DEPTH = 100  # of containers in containers; Python's own limit depends on who calls
_MAX_LINES = 1 << 20  # that tracebacks may show
_LONG = 256  # bytes; of longer literals the digest stands for them, however often they are used
_PROTOCOL = 5  # another one reads names otherwise

_CLOUDPICKLE = "cloudpickle.cloudpickle"

# Of the arguments of `types.CodeType` since Python 3.11.
_CODE_ARGUMENTS = 18
_CODE_FLAGS, _CODE_NAME = 5, 11
_FREE_FLAGS = 0x10 | 0x4000000  # nested in a function, has a docstring


class NotFollowed(Exception):
    """Something that no client of ours writes."""


def follow(payload: bytes) -> str:
    """64 hex digits over what a pickle does.

    Raises:
        NotFollowed: It holds something that no client of ours writes.
        ValueError, LookupError, AttributeError, TypeError: So does it, or it is no pickle.
    """
    program = _Program()
    for number, (opcode, argument, position) in enumerate(pickletools.genops(payload)):
        if number >= MAX_STEPS:
            raise NotFollowed("too long")
        if number == 0:
            if (opcode.name, argument) != ("PROTO", _PROTOCOL):
                raise NotFollowed("another protocol")
        elif opcode.name != "FRAME":
            program.step(opcode.name, argument)
        elif not isinstance(argument, int) or (position or 0) + 9 + argument > len(payload):
            raise NotFollowed("cut")
    return program.hash.hexdigest()


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str
    turn: int
    """How often it was imported before: what is behind a name may have changed meanwhile."""

    @property
    def path(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass(slots=True, eq=False)
class _Fixed:
    """What cannot be changed any more: a tuple, a frozen set, a code object, a long literal."""

    kind: str
    items: tuple[Any, ...]
    digest: bytes | None = None
    """Of what holds nothing that has an identity; taken once, so that what is used often costs no more."""
    like: bytes | None = None
    """The same for all that are equal to it; None: those have its digest."""
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


class _Program:
    """A pickle that is followed, opcode by opcode, as `pickle.Unpickler` would."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"pickle 2")
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._numbers = 0
        self._turns: dict[tuple[str, str], int] = {}
        self._made: list[_Object] = []  # kept, so that no other has the id of one of them
        self._unpackers: set[int] = set()
        self._modules: set[int] = set()
        self._trackers: dict[str, int] = {}
        self._depth = 0

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(_literal(argument))
        elif name == "MEMOIZE":
            self._memo.append(self._top())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_Object(_CONTAINERS[name]))
        elif name == "BYTEARRAY8":
            stack.append(_Object("bytearray", [_literal(bytes(argument))]))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(self._fixed("tuple", self._pop_to_mark()))
        elif name in _FIXED_TUPLES:
            stack.append(self._fixed("tuple", self._pop_many(_FIXED_TUPLES[name])))
        elif name == "FROZENSET":
            items = self._pop_to_mark()
            self._use_as_keys(items)
            stack.append(self._fixed("frozenset", items))
        elif name in _ADDITIONS:
            self._add(name)
        elif name == "STACK_GLOBAL":
            stack.append(self._import(*self._pop_many(2)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self._call(name, *self._pop_many(3 if name == "NEWOBJ_EX" else 2))
        elif name == "BUILD":
            self._build(*self._pop_many(2))
        elif name == "POP":
            self._event("pop", *self._pop_many(1))
        elif name == "POP_MARK":
            self._event("pop", *self._pop_to_mark())
        elif name == "STOP":
            self._event("stop", *self._pop_many(1))
            if stack:
                raise NotFollowed("something is left over")
        else:
            raise NotFollowed(name)

    # What happens

    def _import(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise NotFollowed("a name that is no short text")
        turn = self._turns.get((module, name), 0)
        self._turns[module, name] = turn + 1
        found = _Global(module, name, turn)
        self._event("import", found)
        return found

    def _call(self, how: str, function: Any, *arguments: Any) -> None:
        if not isinstance(arguments[0], _Fixed) or arguments[0].kind != "tuple":
            raise NotFollowed("arguments that are no tuple")
        given = arguments[0].items
        path = function.path if how == "REDUCE" and isinstance(function, _Global) else ("", "")
        if path == ("types", "CodeType"):
            self._stack.append(self._fixed("code", _without_place_of_code(given)))
            return
        if path[0] == _CLOUDPICKLE:
            arguments = (self._fixed("tuple", self._without_place(path[1], given)),)
        elif id(function) in self._unpackers and len(given) == 5 and _are_lines(given[3]):
            # The client's lines of code, for tracebacks; see `client.pickling`, whose code is hashed as well.
            arguments = (self._fixed("tuple", (*given[:3], None, given[4])),)
        self._event(how, function, *arguments)
        if path == (_CLOUDPICKLE, "_builtin_type") and len(given) == 1:
            self._stack.append(self._import("types", given[0]))
            return
        made = _Object("result")
        self._number(made)
        if path == (_CLOUDPICKLE, "_make_function") and _name_of(given[0]) == "_unpack":
            self._unpackers.add(id(made))
        elif path == ("types", "ModuleType"):
            self._modules.add(id(made))
        self._made.append(made)
        self._stack.append(made)

    def _without_place(self, name: str, given: Sequence[Any]) -> Sequence[Any]:
        """Arguments of cloudpickle's makers, without what tells where something was defined."""
        arguments = list(given)
        match name:
            case "_make_function":
                _leave_out(arguments[1], _OF_MODULES)
            case "_function_setstate":
                _leave_out(arguments[1].items[1], _OF_FUNCTIONS)
            case "_class_setstate":
                _leave_out(arguments[1].items[0], _OF_CLASSES)
            case "_make_skeleton_class":
                _leave_out(arguments[3], _OF_BARE_CLASSES)
                arguments[4] = self._tracker(arguments[4])
            case "_make_typevar":
                arguments[5] = self._tracker(arguments[5])
            case "_make_skeleton_enum":
                for place in (2, 4):
                    arguments[place] = None if is_plain_text(arguments[place]) else arguments[place]
                arguments[5] = self._tracker(arguments[5])
        return arguments

    def _tracker(self, drawn: Any) -> int:
        """A number in place of what cloudpickle draws for a class in each process."""
        if not isinstance(drawn, str):
            raise NotFollowed("an identity that is no text")
        return self._trackers.setdefault(drawn, len(self._trackers))

    def _build(self, target: Any, state: Any) -> None:
        if id(target) in self._modules:
            _leave_out(state, _OF_MODULES)
        self._event("build", target, state)
        self._stack.append(target)

    def _add(self, name: str) -> None:
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        items = self._pop_many(count) if count else self._pop_to_mark()
        target, kind = self._top(), _ADDITIONS[name]
        if kind == "dict":
            self._use_as_keys(items[::2])
            items = [self._fixed("tuple", pair) for pair in zip(items[::2], items[1::2], strict=True)]
        elif kind == "set":
            self._use_as_keys(items)
        is_plain = isinstance(target, _Object) and target.kind == kind
        if is_plain and target.number is None:
            target.items += items
        else:
            self._event(name, target, self._fixed("frozenset" if kind == "set" and is_plain else "tuple", items))

    def _use_as_keys(self, items: Sequence[Any]) -> None:
        """What has an identity may have a hash of its own, which depends on what was done to it until now."""
        if keys := [item for item in items if _has_identity(item)]:
            self._event("hash", self._fixed("frozenset", keys))

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise NotFollowed("the stack is empty")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        start = len(stack) - 1
        while start >= 0 and stack[start] is not _MARK:
            start -= 1
        if start < 0:
            raise NotFollowed("no mark")
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def _pop_many(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        items = self._stack[max(start, 0) :]
        if start < 0 or any(item is _MARK for item in items):
            raise NotFollowed("the stack is empty")
        del self._stack[start:]
        return items

    # What is hashed

    def _event(self, what: str, *values: Any) -> None:
        put = writer(self.hash.update)
        put("event", f"{what} {len(values)}".encode())
        for value in values:
            self._write(value, put)

    def _fixed(self, kind: str, items: Sequence[Any]) -> _Fixed:
        value = _Fixed(kind, tuple(items))
        if not any(_has_identity(item) for item in items):
            digest = hashlib.sha256()
            self._write_items(value, writer(digest.update))
            value.digest = digest.digest()
            if kind in ("tuple", "frozenset") and any(_like(item) is not None for item in items):
                likes = [(_like(item) or self._digest(item)).hex() for item in items]
                text = " ".join(sorted(likes) if kind == "frozenset" else likes)
                value.like = hashlib.sha256(f"{kind} {text}".encode()).digest()
        return value

    def _digest(self, value: Any) -> bytes:
        digest = hashlib.sha256()
        self._write(value, writer(digest.update))
        return digest.digest()

    def _write(self, value: Any, put: Callable[[str, bytes], None]) -> None:
        if isinstance(value, _Fixed) and value.digest is not None:
            put("fixed", value.digest)
        elif isinstance(value, _Fixed | _Object):
            if value.number is not None:
                put("again", b"%d" % value.number)
            else:
                self._number(value)
                self._write_items(value, put)
        elif isinstance(value, _Global):
            put("global", json.dumps([value.module, value.name, value.turn]).encode())
        elif isinstance(value, float):
            put("float", struct.pack(">d", value))
        elif isinstance(value, str):
            put("str", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes):
            put("bytes", value)
        elif isinstance(value, int) or value is None:
            put(type(value).__name__, repr(value).encode())
        else:
            raise NotFollowed(type(value).__name__)

    def _write_items(self, value: _Fixed | _Object, put: Callable[[str, bytes], None]) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotFollowed("deeply nested")
        # What gets its number here gets it in order, so that later mentions say which one of the set it was.
        if value.kind in ("set", "frozenset") and not any(_is_new(item) for item in value.items):
            put(value.kind, self._sorted(value.items))
        else:
            put(value.kind, b"%d" % len(value.items))
            for item in value.items:
                self._write(item, put)
        self._depth -= 1

    def _sorted(self, items: Sequence[Any]) -> bytes:
        """Digests of what has no order."""
        digests = [self._digest(item) for item in items]
        likes = {_like(item) or digest for item, digest in zip(items, digests, strict=True)}
        if len(likes) < len(digests):
            raise NotFollowed("two are equal, and the first of them stays")
        return b"".join(sorted(digests))

    def _number(self, value: _Object | _Fixed) -> None:
        value.number = self._numbers
        self._numbers += 1


def writer(update: Callable[[bytes], None]) -> Callable[[str, bytes], None]:
    """Into a hash, with what it is and its length, so that no two programs write the same bytes."""

    def put(what: str, data: bytes) -> None:
        update(f"{what} {len(data)}:".encode())
        update(data)

    return put


def _literal(value: Any) -> Any:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    if isinstance(value, int) and value.bit_length() > 8 * _LONG:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if isinstance(data, bytes) and len(data) > _LONG:
        kind = type(value).__name__
        is_odd = isinstance(value, str) and not is_plain_text(value)
        return _Fixed("odd str" if is_odd else kind, (), hashlib.sha256(kind.encode() + data).digest())
    return value


def _text_of_number(value: float) -> str:
    """Equal for equal numbers of whatever type; not a number, since these can be chosen to have one hash."""
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def _like(value: Any) -> bytes | None:
    """What equal numbers, and equal tuples of them, have in common though their digests differ; None: nothing."""
    if isinstance(value, int | float):
        return f"number {_text_of_number(value)}".encode()
    return value.like if isinstance(value, _Fixed) else None


def _has_identity(value: Any) -> bool:
    return isinstance(value, _Object) or (isinstance(value, _Fixed) and value.digest is None)


def _is_new(value: Any) -> bool:
    return _has_identity(value) and value.number is None


# What tells where something came from, by its name; and what it must be, for its maker to take it whatever it says.


def is_plain_text(value: Any) -> bool:
    """Whether it is text that can be printed and stand for a file's name."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, _Fixed) and value.kind == "str"


def _is_text_or_none(value: Any) -> bool:
    return value is None or is_plain_text(value)


def _is_nothing(value: Any) -> bool:
    """A package counts: what a function imports relatively is found by it."""
    return value is None or value == ""


def _are_texts(value: Any) -> bool:
    is_row = isinstance(value, _Object | _Fixed) and value.kind in ("list", "tuple")
    return is_row and all(is_plain_text(item) for item in value.items)


def _is_line_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


_OF_MODULES = {
    "__package__": _is_nothing, "__name__": _is_text_or_none, "__path__": _are_texts, "__file__": _is_text_or_none,
}  # fmt: skip
_OF_FUNCTIONS = {"__doc__": _is_text_or_none, "__qualname__": is_plain_text, "__module__": _is_text_or_none}
_OF_CLASSES = {**_OF_FUNCTIONS, "__firstlineno__": _is_line_number, "__static_attributes__": _are_texts}
_OF_BARE_CLASSES = {"__module__": _is_text_or_none}


def _leave_out(target: Any, places: Mapping[str, Callable[[Any], bool]]) -> None:
    """Entries of a dictionary that nothing has seen yet. One that takes the place of another counts: so does that."""

    def is_place(key: Any, value: Any) -> bool:
        return isinstance(key, str) and key in places and places[key](value) and keys.count(key) == 1

    if isinstance(target, _Object) and target.kind == "dict" and target.number is None:
        keys = [pair.items[0] for pair in target.items]
        target.items = [pair for pair in target.items if not is_place(*pair.items)]


def _name_of(code: Any) -> Any:
    return code.items[_CODE_NAME] if isinstance(code, _Fixed) and code.kind == "code" else None


def _without_place_of_code(arguments: Sequence[Any]) -> Sequence[Any]:
    """Of a code object, what decides what it does: without file, qualified name, first line and table of lines."""
    if len(arguments) != _CODE_ARGUMENTS or not isinstance(arguments[_CODE_FLAGS], int):
        return arguments
    kept = list(arguments)
    for place, is_expected in {10: is_plain_text, 12: is_plain_text, 13: _is_line_number, 14: _are_bytes}.items():
        kept[place] = None if is_expected(kept[place]) else kept[place]
    kept[_CODE_FLAGS] &= ~_FREE_FLAGS
    return kept


def _are_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, _Fixed) and value.kind == "bytes")


def _are_lines(value: Any) -> bool:
    """Lines of source by file: lists of pairs, of the number of lines before some, and these."""
    if not (isinstance(value, _Object) and value.kind == "dict"):
        return False
    count = 0
    for name, parts in (pair.items for pair in value.items):
        if not (is_plain_text(name) and isinstance(parts, _Object) and parts.kind == "list" and parts.items):
            return False
        if not all(_is_part(part) for part in parts.items):
            return False
        count += max(part.items[0] + len(part.items[1].items) for part in parts.items)
    return count <= _MAX_LINES


def _is_part(value: Any) -> bool:
    is_pair = isinstance(value, _Fixed) and value.kind == "tuple" and len(value.items) == 2
    return is_pair and _is_line_number(value.items[0]) and _are_texts(value.items[1])
