"""Shard templates: bash braces, AIStore's `@` ranges and printf counters.

`{000000..000005}`, `{a,b}`, `{0..10..2}` and nested braces expand as bash does. `shard-@5.tar` counts 0 to 5 inclusive.
`shard-%06d.tar` matches keys of a listing and needs the bucket.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod

import braceexpand

from shardmill.core.errors import BadRequest

MAX_NAMES = 1_000_000  # one expansion; a typo such as {0..999999999} must not fill the memory

_MAX_DEPTH = 32  # of braces in braces
_MAX_DIGITS = 200  # of a range; a longer one is no range of names

_AT = re.compile(r"@([0-9]+)")
_PERCENT = re.compile(r"%(?:0([0-9]{1,2}))?d")
_NUMBERS = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?([0-9]+))?")


def needs_listing(template: str) -> bool:
    """Whether the template can only be expanded against the bucket's keys (`%06d`)."""
    return _PERCENT.search(template) is not None


def listing_prefix(template: str) -> str:
    """What all keys of a `%06d` template start with."""
    match = _PERCENT.search(template)
    return template[: match.start()] if match else template


def match_listing(template: str, keys: Iterable[str]) -> Iterator[str]:
    """The keys that a `%06d` template describes, in the order given."""
    pattern, position = "", 0
    for match in _PERCENT.finditer(template):
        width = int(match[1] or 1)
        # More digits than the width only without zeros before them.
        counter = f"(?:[0-9]{{{width}}}|[1-9][0-9]{{{width},}})"
        pattern += re.escape(template[position : match.start()]) + counter
        position = match.end()
    compiled = re.compile(pattern + re.escape(template[position:]))
    return (key for key in keys if compiled.fullmatch(key))


def expand(template: str) -> list[str]:
    """Every name of a template, in order; touches no network.

    Raises:
        BadRequest: Unbalanced braces, more than a million names, or a template that needs a listing.
    """
    if needs_listing(template):
        raise BadRequest(f"template {template!r} has a printf counter and needs the bucket's listing")
    text = _AT.sub(lambda match: "{0.." + match[1] + "}", template)
    # Counted first: an expansion that is given up half-way has filled the memory already.
    if _count(text, template, 0) > MAX_NAMES:
        raise BadRequest(f"template {template!r} stands for more than {MAX_NAMES} names")
    # An alternative that leaves nothing is no name, as an empty word is none to bash.
    return [name for name in braceexpand.braceexpand(text, escape=False) if name]


def _count(text: str, template: str, depth: int) -> int:
    """How many names a part of a template stands for."""
    if depth > _MAX_DEPTH:
        raise BadRequest(f"template {template!r} has braces nested more than {_MAX_DEPTH} deep")
    return prod(_count_group(group, template, depth) for group in _groups(text, template))


def _count_group(group: str, template: str, depth: int) -> int:
    numbers = _NUMBERS.fullmatch(group)
    if numbers is not None and len(group) > _MAX_DIGITS:
        return MAX_NAMES + 1
    if numbers is not None:
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    alternatives = _alternatives(group)
    return sum(_count(alternative, template, depth + 1) for alternative in alternatives)


def _groups(text: str, template: str) -> Iterator[str]:
    """What stands in the outermost braces."""
    depth = start = 0
    for position, character in enumerate(text):
        if character == "{":
            depth += 1
            start = position + 1 if depth == 1 else start
        elif character == "}":
            depth -= 1
            if depth == 0:
                yield text[start:position]
            elif depth < 0:
                break
    if depth:
        raise BadRequest(f"template {template!r} has unbalanced braces")


def _alternatives(group: str) -> Iterator[str]:
    """What commas part that stand in no inner braces."""
    depth = start = 0
    for position, character in enumerate(group):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            yield group[start:position]
            start = position + 1
    yield group[start:]
