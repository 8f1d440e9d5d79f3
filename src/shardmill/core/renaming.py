"""How the keys of a job's results are made from those of its sources: a template with fields in braces.

`{key}` is the whole key; `{path}` what follows the last `/` of the prefix, or of the template before its first brace;
`{name}` the file name, `{stem}` and `{ext}` its two parts at the last dot (which goes with `{ext}`), `{dirs}` what
stands before the name (with its `/`); `{index}` counts the job's objects from 0, `{index:06d}` with six digits. Braces
are written `{{` and `}}`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardmill.core.errors import BadRequest

FIELDS = ("key", "path", "name", "stem", "ext", "dirs", "index")

_PART = re.compile(r"\{\{|\}\}|\{(\w+)(?::0?(\d{1,2})d)?\}|[^{}]+")


@dataclass(frozen=True, slots=True)
class Renaming:
    """A template, parsed. Use `Renaming.parse`."""

    parts: tuple[tuple[str, str | None, int], ...]
    """Text, or the name of a field and its width."""

    @classmethod
    def parse(cls, template: str) -> "Renaming":
        """Parse a template.

        Raises:
            BadRequest: It is none; the message says which fields there are.
        """
        parts: list[tuple[str, str | None, int]] = []
        position = 0
        while position < len(template):
            match = _PART.match(template, position)
            field = match[1] if match else None
            width = match[2] if match else None
            if match is None or (field is not None and (field not in FIELDS or (width and field != "index"))):
                known = ", ".join(f"{{{name}}}" for name in FIELDS)
                raise BadRequest(
                    f"rename {template!r}: at {template[position : position + 20]!r} there is no field of {known} "
                    "({index:06d} has digits); write {{ and }} for braces"
                )
            text = match[0][0] if match[0] in ("{{", "}}") else match[0]
            parts.append((text, field, int(width or 0)))
            position = match.end()
        return cls(tuple(parts))

    def rename(self, key: str, *, base: str, index: int) -> str:
        """The new key; it may still be none, and is not checked.

        Args:
            key: Of the source.
            base: Start of the key that `{path}` leaves out.
            index: Of the source among the job's.
        """
        dirs, slash, name = key.rpartition("/")
        stem, dot, ext = name.rpartition(".")
        values = {
            "key": key,
            "path": key.removeprefix(base),
            "name": name,
            "stem": stem if dot else name,
            "ext": dot + ext if dot else "",
            "dirs": dirs + slash,
        }
        return "".join(
            text if field is None else str(index).zfill(width) if field == "index" else values[field]
            for text, field, width in self.parts
        )


def rename_all(template: str, keys: Sequence[str], *, base: str) -> list[str]:
    """The new keys, in order.

    Args:
        template: See the module.
        keys: Of the sources.
        base: See `Renaming.rename`.

    Raises:
        BadRequest: The template is none, or gives two sources one key.
    """
    renaming = Renaming.parse(template)
    found: dict[str, str] = {}
    for index, key in enumerate(keys):
        target = renaming.rename(key, base=base, index=index)
        if target in found:
            raise BadRequest(
                f"rename {template!r} makes {target!r} of both {found[target]!r} and {key!r}; "
                "use {path}, {stem} or {index} to tell them apart"
            )
        found[target] = key
    return list(found)


def literal(text: str) -> str:
    """A template that gives just this text."""
    return text.replace("{", "{{").replace("}", "}}")
