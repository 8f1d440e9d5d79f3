"""What the node knows code by: equal for equal functions, another for whatever would do something else."""

import asyncio
import json
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shardmill.client.shipping import PYTHON, ship
from shardmill.core.api import Code, TransformRequest
from shardmill.etl.engine import Engine
from shardmill.etl.versions.fingerprints import fingerprint
from shardmill.etl.versions.registry import Version
from tests.client.test_normal_form import DISTINCT
from tests.etl.support import members, open_engine, read, register_request, request_for, write_shard

SCALE = 2


def of(payload: bytes) -> str:
    return fingerprint(Code("cloudpickle", payload, "0" * 64, PYTHON))


def of_value(value: object) -> str:
    return of(ship(lambda sample: (sample, value)).payload)


def of_source(source: str, function: str = "f", filename: object = "/x.py") -> str:
    payload = json.dumps({"source": source, "function": function, "filename": filename}).encode()
    return fingerprint(Code("source", payload, "0" * 64, PYTHON))


def test_different_values_have_different_fingerprints() -> None:
    found = [of_value(value) for value in DISTINCT]
    assert len(set(found)) == len(DISTINCT)


def test_what_is_equal_has_one_fingerprint() -> None:
    def fresh() -> list[object]:
        letters = [chr(ordinal) for ordinal in range(ord("a"), ord("z"))]
        backwards = letters[::-1]
        return [
            {letter: {letter} for letter in letters},
            set(letters), set(backwards), frozenset(letters), frozenset(backwards),
            np.arange(5), "".join(letters), (1, "a", (2, b"b")), [[], []],
        ]  # fmt: skip

    assert of_value(fresh()) == of_value(fresh())
    one: list[object] = []
    assert of_value([one, one]) != of_value([[], []])
    assert of_value({"a": 1, "b": 2}) != of_value({"b": 2, "a": 1})


def test_docstrings_aside_a_function_is_known_by_what_it_does_not_by_where_it_stands() -> None:
    source = "import math\nLIMIT = {'low', 'high'}\nclass Level:\n    scale = 3\ndef work(sample):\n    return sample * Level.scale, sorted(LIMIT), math.pi\n"
    texts = {
        source: "/first.py",
        f"# Shifted.\n\n{source}": "/second/place.py",
        source.replace("(sample)", "(sample: 'int') -> 'list'"): "<ipython-input-3>",
    }
    found = set()
    for number, (text, file) in enumerate([*texts.items(), (source.replace("scale = 3", "scale = 4"), "/first.py")]):
        namespace: dict[str, Any] = {"__name__": f"place{number}"}
        exec(compile(text, file, "exec"), namespace)
        found.add(of(ship(namespace["work"]).payload))
    assert len(found) == 2


class Called:
    """Unpickling calls a function, and perhaps another whose result nobody wants."""

    def __init__(self, *calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        self.calls = calls

    def __reduce__(self) -> Any:
        return self.calls[0]


def test_calls_count_even_if_nothing_is_left_of_them() -> None:
    plain = pickle.dumps(Called((len, ("abc",))), 5)
    other = pickle.dumps(Called((len, ("abd",))), 5)
    # The other call first, its result dropped.
    body, dropped = plain[2:], other[2:-1]
    assert body.startswith(b"\x95")
    assert other.endswith(b".")
    hidden = b"\x80\x05" + _without_frame(dropped) + b"0" + _without_frame(body)
    assert pickle.loads(hidden) == pickle.loads(plain) == 3
    assert len({of(plain), of(other), of(hidden)}) == 3
    assert of(b"\x80\x05" + _without_frame(body)) == of(plain)


def _without_frame(data: bytes) -> bytes:
    return data[9:] if data.startswith(b"\x95") else data


def test_what_is_put_into_a_container_after_it_was_used_counts() -> None:
    """A list is handed to a call, and changed only then."""
    call = b"\x8c\x08builtins\x8c\x03len\x93"
    for late in (b"\x8c\x01x", b"\x8c\x01y"):
        before = b"\x80\x05]\x94" + late + b"a0" + call + b"h\x00\x85R."
        after = b"\x80\x05]\x940" + call + b"h\x00\x85R0h\x00" + late + b"a."
        assert pickle.loads(before) == 1
        assert pickle.loads(after) == [late[2:].decode()]
        assert of(before) != of(after)
    assert of(b"\x80\x05]\x940" + call + b"h\x00\x85R0h\x00\x8c\x01xa.") != of(
        b"\x80\x05]\x940" + call + b"h\x00\x85R0h\x00\x8c\x01ya."
    )


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x80\x05", b"\x80\x05N", b"t.", b"\x80\x05(.", b"\x80\x05h\x07.", b"I1\n.", b"\x80\x05\x8c\x01xQ.", b"\x80\x05\x97.",
     pickle.dumps([1, 2], 0), b"no pickle at all"],
)  # fmt: skip
def test_what_cannot_be_followed_is_known_by_its_bytes(payload: bytes) -> None:
    assert of(payload) == of(bytes(bytearray(payload)))
    assert of(payload) != of(payload + b"x")


def test_no_literal_of_a_shipped_function_may_be_another() -> None:
    """Each text, number and name in the bytes, changed by itself, but for those that say where the function stands."""

    def work(sample: Any, *, level: int = 7, names: Any = ("one", "two")) -> Any:
        return [sample, level, names, SCALE, np.zeros(3).sum(), b"raw", 2.5]

    payload = ship(work).payload
    expected = of(payload)
    same = []
    for opcode, argument, position in pickletools.genops(payload):
        if opcode.name not in ("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT1", "BINFLOAT"):
            continue
        if isinstance(argument, (str, bytes)):
            size = len(argument.encode() if isinstance(argument, str) else argument)
            start = (position or 0) + (2 if opcode.name.startswith("SHORT") else 5)
        else:
            size, start = {"BININT1": 1, "BINFLOAT": 8}[opcode.name], (position or 0) + 1
        if size:
            changed = bytearray(payload)
            changed[start + size - 1] ^= 1
            if of(bytes(changed)) == expected:
                same.append(argument)
    texts = [text for text in same if isinstance(text, str)]
    # Files, qualified names, the module and its names, and the lines of source for tracebacks.
    assert {"/", "_"} & {text[0] for text in texts if text}
    for text in ("one", "two", "level", "names", "numpy", "zeros", "SCALE", "sample", "work", "sum"):
        assert text not in texts
    assert not [number for number in same if isinstance(number, int) and number == 7]
    assert b"raw" not in same
    assert 2.5 not in same


def test_a_file_is_known_by_its_code_without_comments_and_layout() -> None:
    source = "def f(sample):\n    if sample:\n        sample = g(sample, 'a b')\n    return sample\n"
    same = [
        "# A comment.\n\n" + source,
        source.replace("    ", "  "),
        source.replace("if sample:", "if sample:  # here"),
        source.replace("g(sample, 'a b')", "g( sample,\n  'a b' )"),
    ]
    assert {of_source(text) for text in same} == {of_source(source)}
    other = [
        source.replace("'a b'", "'a  b'"),
        source.replace("    return", "        return"),
        source.replace("if", "while"),
        source + "x = 1\n",
        "\n    def f(sample): (\n",
    ]
    assert len({of_source(text) for text in [source, *other]}) == 6
    assert of_source(source) != of_source(source, "g")


QUIET = "def f(sample):\n    if sample:\n        x = 1\n    return sample  # as it is\n"


@pytest.mark.parametrize(
    "other",
    [
        QUIET.replace("  # as it is\n", "  # as it is\rf = print\n"),  # a line ends here, too
        QUIET + "# More.\rf = print\n",
        QUIET.replace("    return", "\\\n    return"),
        QUIET.replace("    return", "\\\n        return"),
        QUIET.replace("    return", "\treturn"),
        QUIET.replace("as it is", "as\0it is"),
        QUIET.replace("as it is", "as it is \ud800"),
        QUIET.replace("if sample", "if sample\f"),
        "\ufeff" + QUIET,
        QUIET + "\x1a",
        QUIET.replace("x = 1", "x = 1.0"),
        QUIET.replace("x = 1", "x = True"),
        QUIET.replace("x = 1", "x = b'1'"),
        QUIET.replace("x = 1", "x = '1'"),
        QUIET.replace("x = 1", "x = 1j"),
        QUIET.replace("x = 1", "x = None"),
        QUIET.replace("x = 1", "x = ..."),
        QUIET.replace("x = 1", "x = -1"),
        QUIET.replace("x = 1", "'x = 1'"),
        QUIET.replace("f(sample)", "f(sample, /)"),
        QUIET.replace("f(sample)", "f(sample=lambda: 0)"),
        QUIET.replace("f(sample)", "f(*sample)"),
        QUIET.replace("def", "async def"),
        "from __future__ import annotations\n" + QUIET,
    ],
)
def test_what_is_compiled_otherwise_is_another_file(other: str) -> None:
    """Or it cannot be compiled at all."""

    def compiled(source: str) -> object:
        namespace: dict[str, Any] = {}
        try:
            exec(compile(source, "/x.py", "exec", dont_inherit=True), namespace)
        except (SyntaxError, ValueError):
            return None
        code = namespace["f"].__code__ if namespace["f"] is not print else None
        counts = code and (code.co_argcount, code.co_posonlyargcount, code.co_flags)
        return code and (code.co_code, repr(code.co_consts), counts, repr(namespace["f"].__defaults__))

    if compiled(other) == compiled(QUIET):
        # The tree is what is compiled, whatever was between its words.
        assert of_source(other) == of_source(QUIET)
    else:
        assert of_source(other) != of_source(QUIET)


def test_a_file_is_known_by_one_fingerprint_to_nodes_of_every_python() -> None:
    """Among what they parse otherwise: formats of formats, fields that are new, constants."""
    source = (
        "import a.b as c\nfrom . import d\n@c\nclass E(d, metaclass=c):\n    x: int = -1\n"
        "    async def f(self, *a, k=1e400, **b):\n        'What it does.'\n        return f'{a!r:{b}} {k:>{a}x}{{' u'é\\ud800', b'\\0'\n"
        "def f(s):\n    match s:\n        case [1, *_] | {'a': None}:\n            return lambda: (yield)\n    return s[1:, ...], f'{s}'\n"
    )
    assert of_source(source) == "a9d45358a8ab8be3b73af344f52bfc4a5ee04898326676d30e449c1847d71af6"


def test_where_a_file_lies_is_no_matter_unless_it_may_look() -> None:
    assert of_source(QUIET, filename="/elsewhere/y.py") == of_source(QUIET)
    looking = QUIET.replace("x = 1", "x = __file__")
    assert of_source(looking, filename="/elsewhere/y.py") != of_source(looking)
    for filename in (None, 1, "/x\0.py", "/\ud800.py", ["/x.py"]):
        assert of_source(QUIET, filename=filename) != of_source(QUIET)


def test_a_file_with_doubtful_escapes_is_known_by_its_code_all_the_same() -> None:
    source = 'def f(sample):\n    return re.match("\\d", sample)\n'
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert of_source(source) == of_source("# Before.\n" + source)
    assert told == []


@pytest.mark.parametrize(
    "source",
    ["x = " + "-" * 100_000 + "1", "x = a" + ".b" * 100_000, "x = " + "(" * 100_000, "x = 1\n" * 60_000, "x = " + "9" * 5000],
)  # fmt: skip
def test_a_file_made_to_keep_the_node_busy_does_not(source: str) -> None:
    assert of_source(source) != of_source(source + "\n")


def test_code_of_one_encoding_is_none_of_another() -> None:
    payload = b"no code in any of them"
    assert (
        len({fingerprint(Code(kind, payload, "0" * 64, PYTHON)) for kind in ("cloudpickle", "source", "command")}) == 3
    )


def test_a_payload_made_to_keep_the_node_busy_does_not() -> None:
    """What is used twice at each of a thousand steps, long texts used again and again, endless opcodes."""
    for seed in (b"N", b"]", b"\x8c\x01x"):
        nested = bytearray(b"\x80\x05" + seed + b"\x94")
        for step in range(200):
            nested += b"h%ch%c\x86\x94" % (step, step)
        payload = bytes(nested) + b"."
        assert of(payload) != of(payload.replace(b"\x80\x05" + seed, b"\x80\x05K\x01"))
    text = b"\x80\x05B" + (50_000_000).to_bytes(4, "little") + bytes(50_000_000) + b"\x94]" + b"h\x00a" * 100_000 + b"."
    assert len(of(text)) == 64
    assert len(of(b"\x80\x05" + b"N0" * 30_000_000 + b"N.")) == 64


HONEST = "def transform(sample):\n    sample['txt'] = b'honest'\n    return sample\n"
FORGED = HONEST.replace("honest", "forged")


def shipped(word: str) -> TransformRequest:
    namespace: dict[str, Any] = {}
    exec(HONEST.replace("honest", word), namespace)
    shipment = ship(namespace["transform"])
    code = Code("cloudpickle", shipment.payload, shipment.form, shipment.python, list(shipment.modules))
    return TransformRequest("t", code, decoder=None)


def from_file(word: str) -> TransformRequest:
    return request_for(HONEST.replace("honest", word), decoder=None)


@pytest.mark.parametrize("make", [shipped, from_file])
@pytest.mark.parametrize("is_forged_first", [False, True])
def test_code_that_claims_the_form_of_other_code_takes_nothing_of_its_place(
    tmp_path: Path, make: Callable[[str], TransformRequest], is_forged_first: bool
) -> None:
    """Neither its URL, nor its workers, nor its results; under the same name or another, before or after it."""
    shard = write_shard(tmp_path / "s.tar", [{"txt": b"x"}] * 3)
    honest = make("honest")
    code = msgspec.structs.replace(honest.code, payload=make("forged").code.payload)
    forgeries = [msgspec.structs.replace(honest, name=name, code=code) for name in ("t", "u")]
    requests = [*forgeries, honest] if is_forged_first else [honest, *forgeries]

    async def words(engine: Engine, version: Version) -> set[bytes]:
        return set(members(await read(engine, version, shard, ",seed=1")).values())

    async def main() -> None:
        async with open_engine(tmp_path / "data") as engine:
            versions = [await register_request(engine, request) for request in requests]
            # The forger's own worker is not in the way either.
            for version in versions:
                word = b"honest" if version.code.payload == honest.code.payload else b"forged"
                assert await words(engine, version) == {word}
            by_word = {version.code.payload: version.info.digest for version in versions}
            assert len(set(by_word.values())) == 2
            one = next(version for version in versions if version.code.payload == honest.code.payload)
            await engine.versions.remove("t", one.info.digest)
            again = await register_request(engine, forgeries[0])
            assert again.info.digest != one.info.digest
            assert await words(engine, await register_request(engine, honest)) == {b"honest"}
        async with open_engine(tmp_path / "data") as engine:
            known = engine.versions.get("t", one.info.digest)
            assert await words(engine, known) == {b"honest"}

    asyncio.run(main())
