"""Pickles that are made to look like others: what does something else, or does not load at all, is known as another."""

import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shardmill.client.shipping import PYTHON, ship
from shardmill.core.api import Code
from shardmill.etl.versions.fingerprints import fingerprint
from shardmill.etl.versions.pickles import NotFollowed, follow
from tests.client.processes import ship_from

START = b"\x80\x05"


def of(payload: bytes) -> str:
    return fingerprint(Code("cloudpickle", payload, "0" * 64, PYTHON))


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"\x8c" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def get(place: int) -> bytes:
    return b"h" + bytes([place])


class Keyed:
    """Its hash is another after its state was set."""

    value = 0

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return self is other


class Doer:
    """Whose methods may be called while it is unpickled."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def act(cls, *values: Any) -> Any:
        cls.seen.append(values)
        return values


HERE = __name__
KEYED = name(HERE, "Keyed") + b")\x81"
ACT = name(HERE, "Doer.act")

# What does one thing, and what does another with the same objects and calls.
PAIRS: dict[str, tuple[bytes, bytes]] = {
    "a key is put in before or after its state is set": (
        KEYED + b"\x94" + b"}" + text("value") + b"K\x07sb" + b"0}" + get(0) + b"K\x01s\x94" + b"0" + get(1) + b".",
        KEYED + b"\x94" + b"0}" + get(0) + b"K\x01s\x94" + b"0" + get(0) + b"}" + text("value") + b"K\x07sb" + b"0" + get(1) + b".",
    ),
    "which tuple of a set is mentioned again": (
        # Tuples of two objects in a set, and the first of them.
        b"]\x940" + KEYED + b"\x94" + KEYED + b"\x94" + b"00(" + get(1) + b"\x85\x94" + get(2) + b"\x85\x94" + b"\x91" + get(3) + b"\x86.",
        b"]\x940" + KEYED + b"\x94" + KEYED + b"\x94" + b"00(" + get(2) + b"\x85\x94" + get(1) + b"\x85\x94" + b"\x91" + get(3) + b"\x86.",
    ),
    "what a name stands for after a call": (
        name("sys", "flags") + b"\x940" + ACT + b"\x94)R0" + get(0) + b".",
        ACT + b"\x94)R0" + name("sys", "flags") + b"\x94" + b".",
    ),
    "which of two imports of one name is used": (
        name("sys", "flags") + b"\x940" + ACT + b"\x94)R0" + name("sys", "flags") + b"\x940" + get(0) + b".",
        name("sys", "flags") + b"\x940" + ACT + b"\x94)R0" + name("sys", "flags") + b"\x940" + get(2) + b".",
    ),
    "equal numbers in a set": (b"(K\x01\x88\x91.", b"(\x88K\x01\x91."),
    "equal tuples in a set": (b"(K\x01\x85\x88\x85\x91.", b"(\x88\x85K\x01\x85\x91."),
    "equal sets of equal tuples in a set": (
        b"((K\x01N\x86\x91(\x88N\x86\x91\x91.", b"((\x88N\x86\x91(K\x01N\x86\x91\x91.",
    ),
    "zeros in a set": (b"(G" + struct.pack(">d", 0.0) + b"G" + struct.pack(">d", -0.0) + b"\x91.", b"(G" + struct.pack(">d", -0.0) + b"G" + struct.pack(">d", 0.0) + b"\x91."),
    "a set that is filled after it was used": (
        b"\x8f\x940" + ACT + get(0) + b"\x85R0" + get(0) + b"(K\x01\x90.", b"\x8f\x94(K\x01\x900" + ACT + get(0) + b"\x85R0" + get(0) + b".",
    ),
    "a bytearray or bytes": (b"\x96" + struct.pack("<Q", 3) + b"abc.", b"C\x03abc."),
    "a name with a dot": (name("os", "path.join") + b".", name("os.path", "join") + b"."),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_what_does_something_else_is_another(case: str) -> None:
    one, other = (START + program for program in PAIRS[case])
    pickle.loads(one)
    pickle.loads(other)
    assert of(one) != of(other)


# Put before any program: nothing is left of it, but it cannot be loaded.
NOTHING_BUT_AN_ERROR: dict[str, bytes] = {
    "a mark is remembered": b"(\x940",
    "a list in a frozen set": b"(]\x910",
    "a list in a set": b"\x8f(]\x900",
    "a list as a key": b"}]Ns0",
    "a list in a tuple as a key": b"}]\x85Ns0",
    "more than there is": b"0",
    "a frame beyond the end": b"\x95" + struct.pack("<Q", 1 << 20),
    "attributes of None": b"N}" + text("x") + b"K\x01sb0",
    "an item of None": b"NK\x01a0",
    "a code object of nothing": name("types", "CodeType") + b")R0",
    "a type that there is not": name("cloudpickle.cloudpickle", "_builtin_type") + text("nothing") + b"\x85R0",
    "arguments that are a list": name("cloudpickle.cloudpickle", "_make_empty_cell") + b"]R0",
}


@pytest.mark.parametrize("case", NOTHING_BUT_AN_ERROR)
def test_what_does_not_load_is_not_known_as_what_does(case: str) -> None:
    body = KEYED + b"."
    pickle.loads(START + body)
    broken = START + NOTHING_BUT_AN_ERROR[case] + body
    with pytest.raises((pickle.UnpicklingError, TypeError, AttributeError, EOFError)):
        pickle.loads(broken)
    assert of(broken) != of(START + body)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04N.",  # names are read otherwise by other protocols
        b"N.",
        b"\x80\x05\x80\x02N.",
        b"\x80\x05cos\nge\\x74pid\n.",  # the standard library's own reader of opcodes undoes escapes in names
        b"\x80\x05NN.",
        b"\x80\x05K\x01q\x00.",
        b"\x80\x05" + b"]\x85" * 5000 + b"N" + b".",
        b"\x80\x05" + b"]" * 500 + b"a" * 499 + b".",
        b"\x80\x05" + b"(" + text("a") + b"C\x01b" + b"\x93.",
        b"\x80\x05" + name("os", "getpid") + b"K\x01R.",
        b"\x80\x05]K\x01K\x02K\x03u.",
    ],
)
def test_what_no_client_writes_is_not_followed(payload: bytes) -> None:
    with pytest.raises((NotFollowed, ValueError)):
        follow(payload)
    assert of(payload) != of(payload + b" ")


def test_numbers_made_to_have_one_hash_keep_nobody_busy() -> None:
    numbers = [step * ((1 << 61) - 1) for step in range(1, 100_000)]
    rows = [b"\x8a" + bytes([len(data)]) + data for data in (n.to_bytes(12, "little") for n in numbers)]
    assert len(follow(START + b"(" + b"".join(rows) + b"\x91.")) == 64


# Changes of what is left out, in a function as it travels


def unframed(payload: bytes) -> list[bytes]:
    """Its opcodes, but for frames."""
    found = [(opcode.name, position or 0) for opcode, _, position in pickletools.genops(payload)]
    stops = [position for _, position in found[1:]] + [len(payload)]
    return [payload[start:stop] for (kind, start), stop in zip(found, stops, strict=True) if kind != "FRAME"]


def changed(payload: bytes, old: bytes, new: bytes, *, nth: int = 0) -> bytes:
    """With another opcode in one place."""
    opcodes = unframed(payload)
    places = [number for number, opcode in enumerate(opcodes) if opcode == old]
    opcodes[places[nth]] = new
    return b"".join(opcodes)


def shipped(source: str, place: str = "/some/place.py", **names: Any) -> bytes:
    namespace: dict[str, Any] = {"__name__": "some_place", **names}
    exec(compile(source, place, "exec"), namespace)
    return ship(namespace["work"]).payload


PLAIN = (
    "\n" * 75 + "class Level:\n    def scale(self):\n        return 3\ndef work(sample):\n    return Level().scale()\n"
)
NUMBER_TOO_LARGE = b"\x8a\x05\xff\xff\xff\xff\x7f"


def test_frames_are_no_matter() -> None:
    payload = shipped(PLAIN)
    assert of(b"".join(unframed(payload))) == of(payload)
    follow(payload)


@pytest.mark.parametrize(
    ("old", "new", "is_loaded"),
    [
        (text("Level.scale"), text("Another.scale"), True),
        (text("/some/place.py"), text("/other.py"), True),
        (text("some_place"), text("other_place"), True),
        (text("Level.scale"), b"K\x01", False),
        (text("/some/place.py"), b"K\x01", False),
        (b"K\x4d", NUMBER_TOO_LARGE, False),
    ],
)
def test_what_tells_where_it_comes_from_is_left_out_where_it_is_of_the_kind_expected(
    old: bytes, new: bytes, is_loaded: bool
) -> None:
    payload = shipped(PLAIN)
    other = changed(payload, old, new)
    if is_loaded:
        assert pickle.loads(other)({}) == 3
    else:
        with pytest.raises((TypeError, OverflowError)):
            pickle.loads(other)
    assert (of(other) == of(payload)) == is_loaded


class Told:
    """An attribute of a class, told of it while the class is made."""

    def __set_name__(self, owner: type, name: str) -> None:
        raise OSError(name)


def bare_class(*entries: bytes) -> bytes:
    make = name("cloudpickle.cloudpickle", "_make_skeleton_class")
    return (
        START
        + make
        + b"("
        + name("builtins", "type")
        + text("X")
        + b")}("
        + b"".join(entries)
        + b"u"
        + text("1")
        + b"NtR."
    )


def test_a_class_is_made_of_nothing_that_is_left_out() -> None:
    plain, other = bare_class(text("__module__") + text("a")), bare_class(text("__module__") + text("b"))
    assert pickle.loads(plain).__name__ == pickle.loads(other).__name__ == "X"
    assert of(plain) == of(other)
    follow(plain)
    number = text("__module__") + b"K\x01"
    # The later of two entries is what stays.
    assert of(bare_class(number)) != of(bare_class(number, text("__module__") + text("a")))
    told = name(HERE, "Told") + b")\x81"
    for entry in (told, text("\ud800")):
        broken = bare_class(text("__module__") + text("a"), text("__doc__") + entry)
        with pytest.raises((RuntimeError, OSError, UnicodeEncodeError)):
            pickle.loads(broken)
        assert of(broken) != of(plain)


def test_lines_for_tracebacks_are_left_out_only_where_they_are_lines(tmp_path: Path) -> None:
    script = "def augment(sample):\n    return 7\n"
    one = ship_from(tmp_path / "one", script)
    two = ship_from(tmp_path / "two", f"# Further down.\n{script}")
    assert one.payload.read_bytes() != two.payload.read_bytes()
    assert one.fingerprint == two.fingerprint
    payload = one.payload.read_bytes()
    opcodes = unframed(payload)
    place = max(number for number, opcode in enumerate(opcodes) if opcode == text("    return 7\n"))
    for new in (b"K\x01", b"]", b"N"):
        assert of(b"".join([*opcodes[:place], new, *opcodes[place + 1 :]])) != one.fingerprint


def test_relative_imports_make_the_package_count(tmp_path: Path) -> None:
    """They are resolved by it; another package may have a module of the same name."""
    relative = {"pack/__init__.py": "", "pack/part.py": "def level():\n    return 4\n"}
    files = {**relative, "pack/job.py": "def augment(sample):\n    from .part import level\n    return level()\n"}
    found = ship_from(tmp_path / "one", "from pack.job import augment\n", files)
    assert found.call({}) == 4
    payload = found.payload.read_bytes()
    other = changed(payload, text("pack"), text("json"), nth=-1)
    assert of(other) != found.fingerprint
    moved = ship_from(tmp_path / "two", "# Elsewhere.\nfrom pack.job import augment\n", files)
    assert moved.fingerprint == found.fingerprint


@pytest.mark.parametrize("package", [None, "", "pack"])
def test_without_relative_imports_the_package_is_no_matter(package: str | None) -> None:
    """The same file is run as a script, and with `python -m`."""
    assert of(shipped(PLAIN, __package__=package)) == of(shipped(PLAIN))


def test_deep_stacks_of_the_caller_change_nothing() -> None:
    nested: Any = None
    for _ in range(90):
        nested = [nested]
    payload = pickle.dumps(nested, 5)

    def deep(depth: int, then: Callable[[], str]) -> str:
        return then() if depth == 0 else deep(depth - 1, then)

    assert deep(400, lambda: of(payload)) == of(payload) == follow(payload)
