"""Writes the checked-in pages of the reference that are made from the program: commands, settings, errors.

Run it with `make docs-generate`; a test fails while a page is older than what it describes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from typer.main import get_command

from shardmill.cli.main import app
from shardmill.config import SECTIONS, BucketSettings, EnvironmentSettings
from shardmill.core.errors import ShardmillError, error_types
from shardmill.core.values import Seconds, Size

REFERENCE = Path(__file__).parent / "reference"

UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def build_cli() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        "Data goes to standard output, words to standard error. The exit status is 0 when it is done, 1 when the",
        "operation failed and 2 when the call was wrong; a closed pipe ends a command as SIGPIPE does.",
        "`shardmill --install-completion` sets up completion for the shell in use.",
        "",
    ]
    for name, command in walk_commands(get_command(app), "shardmill"):
        usage = " ".join([name, *(_usage(parameter) for parameter in _arguments(command)), "[OPTIONS]"])
        lines += [f"## {name}", "", "```", usage, "```", "", _sentence(command.help or ""), ""]
        rows = [(_parameter_name(parameter), _sentence(_help(parameter))) for parameter in visible(command)]
        if rows:
            lines += ["| argument or option | |", "|---|---|"]
            lines += [*(f"| `{_cell(label)}` | {_cell(text)} |" for label, text in rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def walk_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and those below it, each with the words that call it."""
    yield name, command
    for below, found in getattr(command, "commands", {}).items():
        yield from walk_commands(found, f"{name} {below}")


def visible(command: Any) -> list[Any]:
    """Arguments and options of a command that are its own."""
    shared = {"help", "install_completion", "show_completion"}
    return [found for found in command.params if found.name not in shared and not getattr(found, "hidden", False)]


def build_settings() -> str:
    """Every setting of a node, with the three ways to give it."""
    lines = [
        "# Settings",
        "",
        "A setting is read from the file of `serve --config FILE` (TOML), then from the environment, then from",
        "the command's flags; the last one given counts. All that is wrong is said at once, and then the node does",
        "not start. Sizes are bytes, or carry a unit (`64MiB`, `1GB`); so do durations (`500ms`, `5m`).",
        "The file knows all of them; [`serve`](cli.md#shardmill-serve) lists the flags.",
        "",
    ]
    for section, settings in SECTIONS.items():
        lines += _section(f"[{section}]", settings, f"SHARDMILL_{section.upper()}_")
    lines += _section("[[bucket]]", BucketSettings, None)
    lines += _section("[[env]]", EnvironmentSettings, None)
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, settings: type, prefix: str | None) -> list[str]:
    about = re.sub(r"^`\[+\w+\]+`: ", "", settings.__doc__ or "")
    lines = [f"## {title}", "", _sentence(about[:1].upper() + about[1:]), ""]
    columns = ["setting", "environment", "default", "meaning"] if prefix else ["setting", "default", "meaning"]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    kinds = get_type_hints(settings)
    for item in fields(settings):
        row = [f"`{item.name}`"]
        if prefix:
            row.append(f"`{prefix}{item.name.upper()}`")
        row += [_default(kinds[item.name], item.default), _cell(_sentence(item.metadata["doc"]))]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def _default(kind: Any, value: Any) -> str:
    if value is MISSING or value is None or value in ("", (), Path()):
        return ""
    if kind is bool:
        return "`true`" if value else "`false`"
    if kind is Size:
        unit, size = next(((unit, size) for unit, size in UNITS if value and value % size == 0), ("", 1))
        return f"`{value // size}{unit}`"
    if kind is Seconds:
        return f"`{value:g}s`"
    return f"`{value}`"


def build_errors() -> str:
    """The error tree as answered and as raised."""
    lines = [
        "# Errors",
        "",
        "A node answers an error with a JSON body, `{code, message, request_id}`, and for a user's own function also",
        "`traceback`; the client raises the class. Stock loaders try 5xx and 429 again, so what a further try cannot",
        "mend is 4xx: an exception in a transform is 422. A class in brackets is the builtin that it also is.",
        "",
        "| code | status | class | tried again by the client |",
        "|---|---|---|---|",
    ]
    for code, error in sorted(error_types().items(), key=lambda item: (item[1].status, item[0])):
        builtin = next(
            (base.__name__ for base in error.__mro__ if not issubclass(base, ShardmillError) and base is not object), ""
        )
        also = f" ({builtin})" if builtin not in ("", "Exception") else ""
        lines.append(f"| `{code}` | {error.status} | `{error.__name__}`{also} | {'yes' if error.retryable else 'no'} |")
    return "\n".join(lines) + "\n"


def _arguments(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "argument"]


def _usage(parameter: Any) -> str:
    text = str(parameter.metavar or parameter.name.upper())
    return text if parameter.required or text.startswith("[") else f"[{text}]"


def _parameter_name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _usage(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'VALUE'}"


def _help(parameter: Any) -> str:
    return str(getattr(parameter, "help", None) or "")


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if not text or text.endswith((".", ":", "…")) else f"{text}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {"cli.md": build_cli, "settings.md": build_settings, "errors.md": build_errors}


def main() -> None:
    """Write the pages."""
    for name, build in PAGES.items():
        (REFERENCE / name).write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main()
