"""A real node for tests: `shardmill serve` as a child process on a free loopback port.

Leaving the context stops the process whatever happened in it.
"""

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 40.0  # a drain may take 30
END_SECONDS = 5.0
KEPT_LINES = 2000  # of what it printed

_URL = re.compile(r"(https?)://[^\s/]*:([1-9][0-9]*)")


class NodeFailed(RuntimeError):
    """The node did not come up or ended by itself; the message holds what it printed."""


class RunningNode:
    """A node's process, with what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str], data: Path, host: str) -> None:
        self.process = process
        self._host = host
        self.data = data
        """Its data directory."""
        self.endpoint = ""
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._has_url = threading.Event()
        self._reader = threading.Thread(target=self._read_output, name=f"output of node {process.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """What it printed, standard output and error in one."""
        return "".join(list(self._lines))

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when it answers `/readyz`.

        Raises:
            NodeFailed: It ended, or did not print its URL in time.
        """
        if not self._has_url.wait(seconds) or not self.endpoint:
            # Its output may end a moment before it does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS if self._has_url.is_set() else 0)
            ended = self.process.poll()
            what = f"did not start within {seconds:.0f} s" if ended is None else f"ended with status {ended}"
            raise NodeFailed(f"the node {what}:\n{self.output}")
        if self.endpoint.startswith("https"):
            return  # whoever serves TLS also knows which certificate to trust
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            opener.open(f"{self.endpoint}/readyz", timeout=seconds).close()
        except urllib.error.URLError as error:
            raise NodeFailed(f"{self.endpoint}/readyz: {error}\n{self.output}") from error

    def terminate(self) -> int:
        """SIGTERM: drain and end. Returns its exit status."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: end at once, as a crash does."""
        self.process.kill()
        self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end; killed if that takes too long."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(STOP_SECONDS)
        return status

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self._lines.append(line)
                match = _URL.search(line)
                if match and not self.endpoint:
                    self.endpoint = f"{match[1]}://{self._host}:{match[2]}"
                    self._has_url.set()
        self._has_url.set()


@contextlib.contextmanager
def running_node(
    *flags: str | os.PathLike[str],
    data: Path | None = None,
    python: str | os.PathLike[str] = sys.executable,
    listen: str = "127.0.0.1:0",
    environ: Mapping[str, str] | None = None,
) -> Iterator[RunningNode]:
    """Run `shardmill serve` with these flags until the context is left.

    Args:
        flags: As on the command line, e.g. a directory, or `--bucket`, `gs://b=dir:PATH`.
        data: Data directory, kept; default: a temporary one that is removed.
        python: Interpreter with `shardmill[server]`.
        listen: Address; port 0 takes a free one.
        environ: Variables beside this process's own (without its `SHARDMILL_*`).

    Raises:
        NodeFailed: It did not come up.
    """
    with contextlib.ExitStack() as stack:
        if data is None:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardmill-node-")))
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SHARDMILL_")}
        variables |= {"PYTHONUNBUFFERED": "1", **(environ or {})}
        command = [str(python), "-m", "shardmill.cli", "serve", "--listen", listen, "--data", str(data)]
        process = subprocess.Popen(
            [*command, *map(str, flags)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=variables,
        )
        # Whatever it listens on, this machine reaches it by loopback.
        node = RunningNode(process, data, "[::1]" if listen.startswith("[") else "127.0.0.1")
        try:
            node.wait_ready()
            yield node
        finally:
            if process.poll() is None:
                # Held connections would make a drain take its whole time; a test that is about draining asks itself.
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
            node.wait()
