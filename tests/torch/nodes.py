"""Nodes for the torch suite: one whose own interpreter has no torch but is told of one that has, and one that has it."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from shardmill.testing.node import RunningNode, running_node

Script = subprocess.Popen[str]
Arrangement = Literal["torch elsewhere", "torch in the server"]

ROOT = Path(__file__).parent.parent.parent
BUCKET = "gs://sharded-imagenet"
TORCH_PYTHON = sys.executable
SERVER_PYTHON = os.environ.get("SHARDMILL_TEST_SERVER_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
SOURCES = {"PYTHONPATH": str(ROOT / "src")}  # shardmill itself need not be installed in either
SCRIPT_SECONDS = 240.0  # torch is imported several times, on a machine that may be busy


@contextlib.contextmanager
def torch_node(arrangement: Arrangement, shards: Path) -> Iterator[RunningNode]:
    """Serve shards as `gs://sharded-imagenet`, from an interpreter that has or has not torch."""
    bucket = ("--bucket", f"{BUCKET}=dir:{shards}", "--workers", "2")
    if arrangement == "torch in the server":
        assert importlib.util.find_spec("torch")
        with running_node(*bucket, python=TORCH_PYTHON, environ=SOURCES) as node:
            yield node
        return
    _check_has_no_torch(SERVER_PYTHON)
    with running_node(*bucket, "--env", f"torch={TORCH_PYTHON}", python=SERVER_PYTHON, environ=SOURCES) as node:
        yield node


def start_script(script: Path, arguments: Sequence[str], directory: Path, *, processes: int = 1) -> Script:
    """Start a user's script, by `torchrun` where it is to run in several processes."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SHARDMILL_")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [TORCH_PYTHON, "-X", "faulthandler", *(launcher if processes > 1 else ()), str(script), *arguments],
        cwd=directory,
        env=variables | SOURCES | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_script(script: Path, arguments: Sequence[str], directory: Path, *, processes: int = 1) -> tuple[str, str]:
    """Run a user's script to its end; gives what it printed to standard output and to standard error."""
    with start_script(script, arguments, directory, processes=processes) as process:
        try:
            printed, said = process.communicate(timeout=SCRIPT_SECONDS)
        except subprocess.TimeoutExpired:
            # Each of its processes says where it hangs.
            os.killpg(process.pid, signal.SIGABRT)
            printed, said = process.communicate()
    assert process.returncode == 0, f"{script.name} ended with {process.returncode}:\n{printed}\n{said}"
    return printed, said


def kill_tree(process: Script) -> None:
    """SIGKILL, to the script and to all that it has started, at once."""
    pids, pending = [process.pid], [process.pid]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                below = [int(pid) for pid in task.read_text().split()]
                pids += below
                pending += below
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _check_has_no_torch(python: str) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "None\n", f"{python} has torch; SHARDMILL_TEST_SERVER_PYTHON is to name one that has not"
