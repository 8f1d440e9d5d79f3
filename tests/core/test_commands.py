"""Command lines with placeholders: parsed once, checked before anything runs."""

import msgspec
import pytest

from shardmill.core.commands import check_command, parse_argv
from shardmill.core.errors import BadRequest


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("", [""]),
        ("-c", ["-c"]),
        ("{key}", ["", "key", ""]),
        ("-q{level}", ["-q", "level", ""]),
        ("scale={w}:{h}", ["scale=", "w", ":", "h", ""]),
        ("{{key}}", ["{key}"]),
        ("{{key}}{key}", ["{key}", "key", ""]),
        ("{print $1}", ["{print $1}"]),
        ("{}", ["{}"]),
        ("{0}", ["{0}"]),
        ("a{b", ["a{b"]),
        ("${HOME}", ["$", "HOME", ""]),
        ("{größe}", ["", "größe", ""]),
    ],
)
def test_an_item_is_text_and_names_in_turn(item: str, parts: list[str]) -> None:
    assert parse_argv([item]) == [parts]


def payload(*argv: str) -> bytes:
    return msgspec.json.encode(parse_argv(argv))


def test_a_good_command_is_what_was_parsed() -> None:
    argv = ["ffmpeg", "-i", "{path}", "-ss", "{start}", "-metadata", "title={name} {{name}}", "-"]
    assert check_command(payload(*argv), {"start": 3}) == parse_argv(argv)
    assert check_command(payload("/usr/bin/env", "true"), {})


@pytest.mark.parametrize(
    ("data", "args", "message"),
    [
        (b"", {}, "not a command line"),
        (b"[]", {}, "it is empty"),
        (b'["gzip"]', {}, "not a command line"),
        (b'[["gzip", "key"]]', {}, "does not end with text"),
        (b"[[]]", {}, "does not end with text"),
        (payload(""), {}, "the command itself"),
        (payload("{key}"), {}, "without placeholders"),
        (payload("./tool"), {}, "neither a plain name nor an absolute path"),
        (payload("bin/tool"), {}, "neither a plain name nor an absolute path"),
        (payload("echo", "a\0b"), {}, "NUL"),
        (payload("echo", "{nme}"), {}, "{nme}, which nothing stands for; known: key, name, seed, path"),
        (payload("echo", "{level}"), {"levle": 1}, "known: key, name, seed, path, levle"),
        (payload("echo"), {"level": 1}, "no {level}"),
        (payload("echo", "{key}"), {"key": "x"}, "'key', which every command is given by itself"),
    ],
)
def test_a_wrong_command_is_refused_with_what_is_wrong(data: bytes, args: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_command(data, args)
    assert message in caught.value.message
