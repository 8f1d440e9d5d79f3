"""Shard templates: bash braces, AIStore's `@` ranges and printf counters.

`{000000..000005}`, `{a,b}`, `{0..10..2}` and nested braces expand as bash does. `shard-@5.tar` counts 0 to 5 inclusive.
`shard-%06d.tar` matches keys of a listing and needs the bucket.
"""

import re
from collections.abc import Iterable, Iterator

import braceexpand

from shardmill.core.errors import BadRequest

MAX_NAMES = 1_000_000  # one expansion; a typo such as {0..999999999} must not fill the memory

_AT = re.compile(r"@(\d+)")
_PERCENT = re.compile(r"%(?:0(\d{1,2}))?d")
_BRACE_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


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
        width = match[1]
        pattern += re.escape(template[position : match.start()]) + (rf"\d{{{width},}}" if width else r"(?:0|[1-9]\d*)")
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
    bound = 1
    for first, last, step in _BRACE_RANGE.findall(text):
        bound *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        if bound > MAX_NAMES:
            raise BadRequest(f"template {template!r} stands for more than {MAX_NAMES} names")
    try:
        return list(braceexpand.braceexpand(text, escape=False))
    except ValueError as error:
        raise BadRequest(f"template {template!r} has unbalanced braces") from error
