"""Requirements of a transform: distributions by name, extras, versions and markers (PEP 508), and nothing else.

They reach a resolver as lines of a file in which options, paths and variables would mean something; none of these gets
through here. What is left, the resolver judges in its own words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shardmill.core.errors import BadRequest

MAX_REQUIREMENTS = 200
MAX_LENGTH = 500  # signs of one

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_CLAUSE = r"[<>=!~]{1,3} ?[A-Za-z0-9.*+!_-]+"
_FORM = re.compile(  # of a text without runs of spaces
    rf"(?P<name>{_NAME}) ?(?:\[(?P<extras>[A-Za-z0-9._, -]*)\] ?)?"
    rf"(?P<versions>\(? ?{_CLAUSE}(?: ?, ?{_CLAUSE})* ?,? ?\)? ?)?"
    r"(?:; ?(?P<marker>[A-Za-z0-9_.<>=!~()'\"*+ -]+))?"
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement. Equal ones are written alike."""

    name: str
    """Normalised: lower case, runs of `-`, `_` and `.` as one `-`."""
    text: str
    """As a line for a resolver."""

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Take it apart.

        Raises:
            BadRequest: It is a path, a URL, an option, or no requirement at all.
        """
        is_text = len(text) <= MAX_LENGTH and text.isprintable()
        match = _FORM.fullmatch(" ".join(text.split())) if is_text else None
        marker = (match["marker"] or "").strip() if match else ""
        if match is None or "--" in marker or (match["marker"] is not None and not marker):
            raise BadRequest(
                f"package {text[:100]!r} is not a requirement such as 'opencv-python-headless>=4.10'; paths, URLs and "
                "options are not taken: what no index has goes into a directory of wheels at the node ([packages] "
                "find_links)"
            )
        name = normal_name(match["name"])
        extras = sorted(normal_name(extra) for extra in (match["extras"] or "").split(",") if extra.strip())
        versions = sorted(part.strip() for part in (match["versions"] or "").strip("() ").split(",") if part.strip())
        line = name + (f"[{','.join(extras)}]" if extras else "") + ",".join(_squeezed(part) for part in versions)
        return cls(name, f"{line} ; {marker}" if marker else line)


def parse_requirements(texts: Iterable[str]) -> tuple[Requirement, ...]:
    """Requirements in a normal form: each once, in order of their text.

    Raises:
        BadRequest: One is none, or there are too many.
    """
    found = {requirement.text: requirement for requirement in map(Requirement.parse, texts)}
    if len(found) > MAX_REQUIREMENTS:
        raise BadRequest(f"{len(found)} packages; at most {MAX_REQUIREMENTS} can be asked for")
    return tuple(found[text] for text in sorted(found))


def normal_name(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _squeezed(part: str) -> str:
    return "".join(part.split())
