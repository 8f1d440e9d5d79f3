"""The guide's first page, done word for word against a real node."""

import os
import re
import subprocess
import sys
from pathlib import Path

from shardmill.testing.node import running_node

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "getting-started.md"
DEFAULT_ENDPOINT = "http://localhost:51080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_every_step_works_as_shown(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(shards)
    serve = next(line for block in blocks("sh") for line in block.splitlines() if line.startswith("shardmill serve"))
    flags = [flag.replace("dir:shards", f"dir:{shards}") for flag in serve.split()[2:]]
    python_code = "\n".join(blocks("python"))
    commands = [
        line
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("shardmill") and not line.startswith("shardmill serve")
    ]
    assert len(commands) >= 5

    with running_node(*flags) as node:
        environment = {
            **os.environ,
            "SHARDMILL_ENDPOINT": node.endpoint,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        script = tmp_path / "script.py"
        script.write_text(python_code.replace(DEFAULT_ENDPOINT, node.endpoint))
        printed = _run([sys.executable, str(script)], tmp_path, environment)
        for command in commands:
            shown = _run(["bash", "-o", "pipefail", "-c", command], tmp_path, environment)
            assert shown.strip(), f"{command} printed nothing"

    lines = printed.splitlines()
    expected = blocks("text")[0].splitlines()
    assert lines[: len(expected) - 1] == expected[:-1]
    assert re.fullmatch(re.escape(expected[-1]).replace("…", "[0-9a-f]{12}"), lines[len(expected) - 1])
    count, names = lines[-1].split(" ", 1)
    assert int(count) >= 2
    assert ".cls" in names


def _run(command: list[str], directory: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    # `head` closes the pipe early, which ends its writers as SIGPIPE does.
    assert done.returncode in (0, 141), f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
