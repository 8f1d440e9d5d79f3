"""What decides a transformed object's bytes, as one string: `name@digest(,option=value)*`.

A spec has one spelling: options in the order of `OPTIONS`, each at most once, defaults left out, so equal specs
are equal URLs. `parse` is strict and names the canonical spelling when it refuses another.
"""

import re
from dataclasses import dataclass, replace

from shardmill.core.errors import BadRequest

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
OPTIONS = ("seed", "epoch", "errors", "start", "count", "args", "k")
MAX_INTEGER = 2**63 - 1
SPEC_DIGITS = 12  # hex digits of the digest that URLs carry; the server keys by all 64

# Wider than the canonical spelling, so that a refusal can name it.
_DIGEST = re.compile(r"[0-9a-fA-F]{12,64}")
_INTEGER = re.compile(r"0{0,99}[0-9]{1,19}")
_RATIO = re.compile(r"(0\.[0-9]{1,9}|1(\.0{1,9})?)")
_ARGS = re.compile(r"[0-9a-fA-F]{12}")
_K = re.compile(r"[0-9a-fA-F]{4,8}")


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """What a failing sample means: `fail`, or `skip:RATIO` with 0 < RATIO <= 1."""

    ratio: float | None = None
    """None: the first failure fails the run."""

    def __str__(self) -> str:
        if self.ratio is None:
            return "fail"
        return f"skip:{format(self.ratio, '.9f').rstrip('0').rstrip('.')}"

    @classmethod
    def parse(cls, text: str) -> "ErrorPolicy":
        """Parse `fail` or `skip:0.01`.

        Raises:
            BadRequest: Anything else.
        """
        if text == "fail":
            return cls()
        head, _, ratio = text.partition(":")
        if head == "skip" and _RATIO.fullmatch(ratio) and float(ratio) > 0:
            return cls(float(ratio))
        raise BadRequest(f"errors={text!r} is neither 'fail' nor 'skip:RATIO' with 0 < RATIO <= 1")


FAIL = ErrorPolicy()


@dataclass(frozen=True, slots=True)
class Spec:
    """A version of a transform plus options. `digest` None means the newest version of that name."""

    name: str
    digest: str | None = None
    """12 to 64 hex digits."""
    seed: int | None = None
    epoch: int = 0
    errors: ErrorPolicy = FAIL
    start: int = 0
    """First source sample, counted from 0."""
    count: int | None = None
    args: str | None = None
    """Hash of arguments stored beside the version."""
    k: str | None = None
    """Guards WebDataset's cache names; see `paths.folder_key`."""

    def __str__(self) -> str:
        head = self.name if self.digest is None else f"{self.name}@{self.digest}"
        return ",".join([head, *(f"{name}={value}" for name, value in self._options())])

    def _options(self) -> list[tuple[str, object]]:
        values: list[tuple[str, object, object]] = [
            ("seed", self.seed, None),
            ("epoch", self.epoch, 0),
            ("errors", self.errors, FAIL),
            ("start", self.start, 0),
            ("count", self.count, None),
            ("args", self.args, None),
            ("k", self.k, None),
        ]
        return [(name, value) for name, value, default in values if value != default]

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Parse a spec strictly.

        Raises:
            BadRequest: Not a spec, or not its canonical spelling (which is then named).
        """
        spec = cls._parse_loosely(text)
        if str(spec) != text:
            raise BadRequest(f"transform {text!r} is not spelled canonically; write {str(spec)!r}")
        return spec

    @classmethod
    def _parse_loosely(cls, text: str) -> "Spec":
        head, *pairs = text.split(",")
        name, at, digest = head.partition("@")
        check_name(name)
        if at and not _DIGEST.fullmatch(digest):
            raise BadRequest(f"transform {head!r}: the version after '@' is 12 to 64 hex digits")
        spec = cls(name, digest.lower() if at else None)
        seen: set[str] = set()
        for pair in pairs:
            option, equals, value = pair.partition("=")
            if not equals or option not in OPTIONS:
                raise BadRequest(f"transform {text!r}: unknown option {option!r}; known: {', '.join(OPTIONS)}")
            if option in seen:
                raise BadRequest(f"transform {text!r}: option {option!r} is given twice")
            seen.add(option)
            spec = _OPTION_PARSERS[option](spec, value)
        if "epoch" in seen and "seed" not in seen:
            raise BadRequest(f"transform {text!r}: epoch without seed; without a seed each read draws afresh")
        return spec

    def with_options(
        self,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
        k: str | None = None,
    ) -> "Spec":
        """This spec with the given options put in place of its own.

        Raises:
            BadRequest: A value out of range, or an epoch without a seed.
        """
        spec = self
        for name, value in (("seed", seed), ("epoch", epoch), ("start", start), ("count", count)):
            if value is not None:
                spec = _OPTION_PARSERS[name](spec, str(value))
        if epoch is not None and spec.seed is None:
            raise BadRequest("epoch without seed; without a seed each read draws afresh")
        return replace(spec, k=k) if k is not None else spec


def check_name(name: str) -> str:
    """The name of a transform itself if it is one.

    Raises:
        BadRequest: Names the rule.
    """
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"bad transform name {name!r}: 1 to 63 of a-z, 0-9, '.', '_', '-', starting with a letter or digit"
        )
    return name


def _integer(name: str, value: str, low: int = 0) -> int:
    if not _INTEGER.fullmatch(value) or not low <= int(value) <= MAX_INTEGER:
        raise BadRequest(f"{name}={value!r} is not an integer from {low} to 2^63-1")
    return int(value)


def _matched(pattern: re.Pattern[str], name: str, value: str) -> str:
    if not pattern.fullmatch(value):
        raise BadRequest(f"{name}={value!r} is not of the form {pattern.pattern.replace('A-F', '')}")
    return value.lower()


_OPTION_PARSERS = {
    "seed": lambda spec, value: replace(spec, seed=_integer("seed", value)),
    "epoch": lambda spec, value: replace(spec, epoch=_integer("epoch", value)),
    "errors": lambda spec, value: replace(spec, errors=ErrorPolicy.parse(value)),
    "start": lambda spec, value: replace(spec, start=_integer("start", value)),
    "count": lambda spec, value: replace(spec, count=_integer("count", value, low=1)),
    "args": lambda spec, value: replace(spec, args=_matched(_ARGS, "args", value)),
    "k": lambda spec, value: replace(spec, k=_matched(_K, "k", value)),
}
