"""The documentation says what the program does: every command, option, setting and error, and nothing that is not so."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from typer.main import get_command

from docs.generate import PAGES, REFERENCE, visible, walk_commands
from shardmill.cli.main import app
from shardmill.config import SECTIONS, BucketSettings, EnvironmentSettings
from shardmill.core.errors import error_types

ROOT = Path(__file__).parent.parent
PAGES_OF_PEOPLE = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "reference"),
]
COMMANDS = dict(walk_commands(get_command(app), "shardmill"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_program_says(page: str) -> None:
    assert (REFERENCE / page).read_text() == PAGES[page](), "run make docs-generate"


def test_every_command_and_option_says_what_it_does() -> None:
    silent = [name for name, command in COMMANDS.items() if not command.help]
    silent += [
        f"{name} {parameter.name}"
        for name, command in COMMANDS.items()
        for parameter in visible(command)
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_every_setting_and_error_is_on_its_page() -> None:
    settings = (REFERENCE / "settings.md").read_text()
    for section in (*SECTIONS.values(), BucketSettings, EnvironmentSettings):
        for item in fields(section):
            assert item.metadata.get("doc"), f"{section.__name__}.{item.name} has no sentence"
            assert f"`{item.name}`" in settings
    errors = (REFERENCE / "errors.md").read_text()
    for code in error_types():
        assert f"`{code}`" in errors


@pytest.mark.parametrize("path", PAGES_OF_PEOPLE, ids=name_of)
def test_shown_commands_exist_with_their_options(path: Path) -> None:
    wrong = []
    for block in blocks(path, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:\||&&|&)(?:\s|$)", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                if words[:1] == ["shardmill"] and (reason := _wrong_call(words)):
                    wrong.append(f"{line}: {reason}")
    assert wrong == []


def _wrong_call(words: list[str]) -> str | None:
    """What is wrong with a command line, if anything."""
    command: Any = COMMANDS["shardmill"]
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        word = rest.pop(0)
        if word in ("--version", "--help", "--install-completion"):
            return None
        if word not in command.commands:
            return f"no command {word}"
        command = command.commands[word]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    # What follows -- is another program's.
    own = rest[: rest.index("--")] if "--" in rest else rest
    given = {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)}
    unknown = given - options - {"--help"}
    return f"no option {', '.join(sorted(unknown))}" if unknown else None


def test_a_wrong_command_is_found() -> None:
    assert _wrong_call(["shardmill", "serve", "--listen", "127.0.0.1:0", "dir"]) is None
    assert _wrong_call(["shardmill", "transform", "ls"]) is None
    assert _wrong_call(["shardmill", "transform", "add-command", "zip", "--", "gzip", "--best"]) is None
    assert _wrong_call(["shardmill", "transform", "add-command", "zip", "--best"]) == "no option --best"
    assert _wrong_call(["shardmill", "served"]) == "no command served"
    assert _wrong_call(["shardmill", "serve", "--lisen=1"]) == "no option --lisen"


@pytest.mark.parametrize("path", PAGES_OF_PEOPLE, ids=name_of)
def test_shown_python_is_python(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("path", PAGES_OF_PEOPLE, ids=name_of)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (path.parent / unquote(target)).exists()]
    assert missing == []


def test_shown_settings_exist() -> None:
    """Names of environment variables in the guide are those of settings, of the client, or of the tests."""
    known = {
        f"SHARDMILL_{section.upper()}_{item.name.upper()}" for section in SECTIONS for item in fields(SECTIONS[section])
    }
    known |= {
        "SHARDMILL_ENDPOINT",
        "SHARDMILL_TOKEN",
        "SHARDMILL_TEST_SHARDS",
        "SHARDMILL_TEST_SERVER_PYTHON",
        "SHARDMILL_STORY",
    }
    shown = {name for path in PAGES_OF_PEOPLE for name in re.findall(r"\bSHARDMILL_[A-Z_]+[A-Z]\b", path.read_text())}
    assert shown - known == set()
