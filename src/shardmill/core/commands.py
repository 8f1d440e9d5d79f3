"""Command lines with placeholders, as they are registered: parsed once by the client, checked by the node.

`{key}`, `{name}`, `{seed}` and `{path}` stand for the object's key and file name, the seed of this object and the path
of a file that has its bytes; any other `{name}` for an argument of the registration. `{{name}}` is `{name}` itself, and
braces around anything but a word are just braces.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec

from shardmill.core.errors import BadRequest

VALUES = ("key", "name", "seed", "path")
"""What every command can be given, beside its arguments."""

_PLACEHOLDER = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")
_ESCAPED = re.compile(r"\{(\{\w+\})\}")


def parse_argv(argv: Sequence[str]) -> list[list[str]]:
    """Each item as text and names in turn, beginning and ending with text: `-q{level}` is `["-q", "level", ""]`."""
    return [
        [part if number % 2 else _ESCAPED.sub(r"\1", part) for number, part in enumerate(_PLACEHOLDER.split(item))]
        for item in argv
    ]


def check_command(payload: bytes, args: Mapping[str, object]) -> list[list[str]]:
    """The items of a command as it travels, if it can be run at all.

    Args:
        payload: JSON of what `parse_argv` returns.
        args: Of the registration.

    Raises:
        BadRequest: Says what is wrong.
    """
    try:
        items = msgspec.json.decode(payload, type=list[list[str]])
    except msgspec.DecodeError as error:
        raise BadRequest(f"code.payload is not a command line: {error}") from None
    if not items or not all(len(item) % 2 for item in items):
        raise BadRequest("code.payload is not a command line: it is empty, or an item does not end with text")
    if any("\0" in part for item in items for part in item):
        raise BadRequest("a command line cannot hold a NUL")
    command = items[0][0]
    if len(items[0]) > 1 or not command:
        raise BadRequest("the first item of a command line is the command itself, without placeholders")
    if "/" in command and not command.startswith("/"):
        raise BadRequest(f"the command {command!r} is neither a plain name nor an absolute path")
    named = {name for item in items for name in item[1::2]}
    taken = sorted(set(args) & set(VALUES))
    if taken:
        raise BadRequest(f"args has {taken[0]!r}, which every command is given by itself")
    unknown = sorted(named - set(VALUES) - set(args))
    if unknown:
        known = ", ".join([*VALUES, *sorted(args)])
        raise BadRequest(f"the command line has {{{unknown[0]}}}, which nothing stands for; known: {known}")
    unused = sorted(set(args) - named)
    if unused:
        raise BadRequest(f"args has {unused[0]!r}, but the command line has no {{{unused[0]}}}")
    return items
