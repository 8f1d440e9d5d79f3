"""What code reaches by name, read from its instructions: globals, attributes of them, imports inside bodies.

A module is only taken along as far as its attributes are named: `helpers.scale(x)` reaches `scale` of `helpers`. A
module that is used in any other way (handed to a function, kept in a variable) is reached as a whole.
"""

import dis
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

Chain = tuple[str, ...]
"""Attributes named one after the other behind a variable; the empty one is a use of the variable itself."""

Uses = dict[str, set[Chain]]

_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_CELLS = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"}

# Stored by the body of a class; they tell where it stands, not what it is.
_POSITIONS = {"__qualname__", "__firstlineno__", "__static_attributes__"}


@dataclass(frozen=True, slots=True)
class BodyImport:
    """One `import` statement inside a function."""

    module: str
    """As written; empty for `from . import name`."""
    level: int
    """Leading dots."""
    bound: dict[str, set[Chain]]
    """What a variable was bound to, with how the variable is used: names of `from module import name`; else one entry,
    the dotted module."""
    is_from: bool
    guarded: bool
    """Inside a `try`, so that it may fail."""


@dataclass(slots=True)
class Reach:
    """Names that a code object and those nested in it use."""

    names: Uses = field(default_factory=dict)
    """Globals, and what may be one."""
    variables: Uses = field(default_factory=dict)
    """Local and captured variables."""
    imports: list[BodyImport] = field(default_factory=list)


@lru_cache(maxsize=1024)
def reach_of(code: CodeType) -> Reach:
    """What the code reaches; the answer is shared, not to be changed."""
    reach = Reach()
    instructions = list(dis.get_instructions(code))
    cells = {*code.co_cellvars, *code.co_freevars}
    for position, instruction in enumerate(instructions):
        chain = _chain_behind(instructions, position)
        if instruction.opname in _GLOBALS:
            reach.names.setdefault(instruction.argval, set()).add(chain)
        if instruction.opname in _CELLS or instruction.opname == "LOAD_NAME":
            reach.variables.setdefault(instruction.argval, set()).add(chain)
        # Newer versions load a cell, to hand it to a nested function, as if it were a plain variable.
        loaded = [name for name in _fast_loads(instruction) if name not in cells]
        for name in loaded[:-1]:
            reach.variables.setdefault(name, set()).add(())
        for name in loaded[-1:]:
            reach.variables.setdefault(name, set()).add(chain)
    for nested in nested_codes(code):
        _merge(reach, reach_of(nested), nested)
    reach.imports += _imports(code, instructions, reach)
    return reach


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """Code objects directly inside one: functions, classes, comprehensions."""
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


def stable_instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions, without those that only tell where a class stands."""
    pending: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME" and instruction.argval in _POSITIONS:
            pending = None
            continue
        if pending is not None:
            yield pending
        pending = instruction
    if pending is not None:
        yield pending


def _merge(reach: Reach, nested: Reach, code: CodeType) -> None:
    for name, chains in nested.names.items():
        reach.names.setdefault(name, set()).update(chains)
    for name in code.co_freevars:
        reach.variables.setdefault(name, set()).update(nested.variables.get(name, ()))
    reach.imports += nested.imports


def _fast_loads(instruction: dis.Instruction) -> list[str]:
    """Plain local variables that an instruction loads, in order; newer versions join two into one instruction."""
    if not instruction.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD_FAST")):
        return []
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return list(names[1:] if instruction.opname.startswith("STORE") else names)


def _chain_behind(instructions: list[dis.Instruction], position: int) -> Chain:
    chain = []
    for instruction in instructions[position + 1 :]:
        if instruction.opname not in _ATTRIBUTES:
            break
        chain.append(instruction.argval)
    return tuple(chain)


def _imports(code: CodeType, instructions: list[dis.Instruction], reach: Reach) -> Iterator[BodyImport]:
    guarded = [range(entry.start, entry.end) for entry in getattr(dis.Bytecode(code), "exception_entries", ())]
    for position, instruction in enumerate(instructions):
        if instruction.opname != "IMPORT_NAME":
            continue
        level, names = instructions[position - 2].argval, instructions[position - 1].argval
        stores = _stores_behind(instructions, position)
        module = instruction.argval
        if names:
            bound = {name: _uses_of(stores.get(name), reach) for name in names}
        else:
            # `import a.b` binds a, `import a.b as c` binds a.b.
            renamed = instructions[position + 1].opname == "IMPORT_FROM"
            name = module if renamed else module.partition(".")[0]
            bound = {name: _uses_of(next(iter(stores.values()), None), reach)}
        is_guarded = any(instruction.offset in part for part in guarded)
        yield BodyImport(module, level, bound, bool(names), is_guarded)


def _stores_behind(instructions: list[dis.Instruction], position: int) -> dict[str, dis.Instruction]:
    """What an import statement stores: by the name it was taken from, empty for the module itself."""
    stores: dict[str, dis.Instruction] = {}
    taken = ""
    for instruction in instructions[position + 1 :]:
        if instruction.opname == "IMPORT_FROM":
            taken = instruction.argval
        elif instruction.opname.startswith("STORE_"):
            stores[taken] = instruction
            if taken == "":
                break
        elif stores or instruction.opname not in ("SWAP", "POP_TOP", "EXTENDED_ARG"):
            break
    return stores


def _uses_of(store: dis.Instruction | None, reach: Reach) -> set[Chain]:
    if store is None:
        return set()
    if store.opname == "STORE_GLOBAL":
        return {()}
    name = store.argval[0] if isinstance(store.argval, tuple) else store.argval
    return reach.variables.get(name, set())
