"""A whole object through a command: its bytes on standard input, the output from standard output.

The command succeeded when it exits with status 0. What it started and left behind is ended with it.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from shardmill.worker.calls import MAX_MESSAGE, SampleFailure, without_own_paths
from shardmill.worker.exchange import ENCODE, USER, Exchange
from shardmill.worker.objects import file_of

STDERR_KEPT = 16 << 10  # bytes of its standard error, from the end
FED = 1 << 18  # bytes of input read at once; a pipe holds 64 KiB
SEED_BITS = 31  # of the seed that a command is given: what most take

_LAST_WORDS = 300  # characters of standard error in a message


class CommandTask:
    """Runs one command line.

    Args:
        items: The command and its arguments, each as text and names of values in turn.
        arguments: Values of the registration.
        path: Where commands are looked up, like PATH.

    Raises:
        SampleFailure: There is no such command.
    """

    def __init__(self, items: list[list[str]], arguments: Mapping[str, Any], path: str) -> None:
        self._items = items
        self._arguments = {name: _text(value) for name, value in arguments.items()}
        self._path = path
        self._needs_file = any("path" in item[1::2] for item in items)
        self._command = items[0][0]
        self._find()

    def __call__(self, exchange: Exchange, *, key: str, ref: str, seed: int) -> None:
        values = {"key": key, "name": key.rpartition("/")[2], "seed": str(seed >> (64 - SEED_BITS)), **self._arguments}
        with contextlib.ExitStack() as stack:
            if self._needs_file:
                values["path"] = stack.enter_context(file_of(exchange, key))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="command-", ignore_cleanup_errors=True))
            argv = self._build_argv(values)
            process = self._start(argv, folder)
            stack.callback(_end, process)
            transfer = _Transfer(process, exchange, feeds=not self._needs_file)
            transfer.run()
            folders = [folder, *([os.path.dirname(values["path"])] if self._needs_file else [])]
            _judge(os.path.basename(self._command), _end(process), transfer.stderr, folders)

    def _build_argv(self, values: Mapping[str, str]) -> list[str]:
        """The command line. A name is no option: who may store objects may not choose what a command does."""
        argv: list[str] = []
        for item in self._items:
            text = "".join(values[part] if place % 2 else part for place, part in enumerate(item))
            is_name = not item[0] and item[1:2] in (["key"], ["name"])
            if is_name and text.startswith("-") and "--" not in argv:
                raise SampleFailure(
                    f"the object's {item[1]} begins with '-', which {self._command!r} would take for an option; give "
                    f"the command '--' before {{{item[1]}}}"
                )
            argv.append(text)
        return argv

    def _find(self) -> str:
        """The command's file as of now: this process may outlive the installation of another."""
        found = shutil.which(self._command, path=self._path)
        if found is None:
            where = "is no executable file at the node" if "/" in self._command else "is not found in the node's PATH"
            raise SampleFailure(f"the command {self._command!r} {where}")
        return os.path.abspath(found)

    def _start(self, argv: list[str], folder: str) -> "subprocess.Popen[bytes]":
        executable = self._find()
        environment = {**os.environ, "PATH": self._path, "HOME": folder, "TMPDIR": folder, "XDG_CACHE_HOME": folder}
        try:
            return subprocess.Popen(
                argv,
                executable=executable,
                stdin=subprocess.DEVNULL if self._needs_file else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                bufsize=0,
                process_group=0,
            )
        except (OSError, ValueError) as error:
            raise SampleFailure(f"the command {argv[0]!r} cannot be started: {error}") from None


class _Transfer:
    """Moves bytes between one process and the exchange until both are done."""

    def __init__(self, process: "subprocess.Popen[bytes]", exchange: Exchange, *, feeds: bool) -> None:
        self._process = process
        self._exchange = exchange
        self._selector = selectors.DefaultSelector()
        self._input = process.stdin if feeds else None
        self._pending = memoryview(b"")
        self._position = 0
        self.stderr = bytearray()
        """The end of what it wrote there."""
        self._has_output = True
        self._is_running = True

    def run(self) -> None:
        """Return when the command has ended and all its output was taken."""
        process, exchange = self._process, self._exchange
        exchange.take_messages()
        assert process.stdout is not None and process.stderr is not None
        handle = os.pidfd_open(process.pid)
        try:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    os.set_blocking(pipe.fileno(), False)
            with self._selector as selector:
                selector.register(exchange.messages, selectors.EVENT_READ)
                selector.register(process.stderr, selectors.EVENT_READ)
                # It stays a zombie until `_end`, so that its process group is still its own.
                selector.register(handle, selectors.EVENT_READ)
                while self._is_running or self._has_output:
                    self._step(handle, process.stdout, process.stderr)
        finally:
            os.close(handle)
        self._read_stderr(process.stderr)

    def _step(self, handle: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """Wait until something can be moved, and move it."""
        exchange = self._exchange
        room = exchange.room() if self._has_output else None
        self._watch(stdout, selectors.EVENT_READ, room is not None)
        if self._input is not None:
            self._prepare_input(self._input)
        # What it has started may keep its output open; of that only what is there already is taken.
        is_last = room is not None and not self._is_running
        ready = {key.fileobj for key, _ in self._selector.select(0 if is_last else exchange.flush_due)}
        if self._has_output and room is None:
            # Readers were waited for, and meanwhile the command for them.
            exchange.skip_lap()
        else:
            exchange.lap(USER)
        if exchange.messages in ready:
            exchange.take_messages()
        if self._input is not None and self._input in ready:
            self._feed(self._input)
        if stderr in ready and not self._read_stderr(stderr):
            self._selector.unregister(stderr)
        if room is not None:
            with room:
                count = _read_output(stdout, room) if stdout in ready or is_last else None
            if count:
                exchange.advance(count)
                exchange.lap(ENCODE)
            if count == 0 or (count is None and is_last):
                self._has_output = False
                self._watch(stdout, selectors.EVENT_READ, False)
        if exchange.flush_due == 0:
            exchange.flush()
        if handle in ready:
            self._is_running = False
            self._selector.unregister(handle)

    def _watch(self, pipe: IO[bytes], event: int, wanted: bool) -> None:
        is_watched = pipe in self._selector.get_map()
        if wanted and not is_watched:
            self._selector.register(pipe, event)
        elif is_watched and not wanted:
            self._selector.unregister(pipe)

    def _prepare_input(self, stdin: IO[bytes]) -> None:
        exchange = self._exchange
        if not self._pending and self._position < exchange.size:
            stop = min(exchange.size, self._position + FED)
            if exchange.is_available(stop):
                self._pending = memoryview(exchange.read(self._position, stop - self._position))
                self._position = stop
        if not self._pending and self._position == exchange.size:
            self._end_input(stdin)
        else:
            self._watch(stdin, selectors.EVENT_WRITE, bool(self._pending))

    def _feed(self, stdin: IO[bytes]) -> None:
        try:
            self._pending = self._pending[os.write(stdin.fileno(), self._pending) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # It has read what it needs; whether that is right its exit status says.
            self._end_input(stdin)

    def _end_input(self, stdin: IO[bytes]) -> None:
        self._watch(stdin, selectors.EVENT_WRITE, False)
        stdin.close()
        self._input = None

    def _read_stderr(self, stderr: IO[bytes]) -> bool:
        """Read what is there; False at its end."""
        try:
            # As much as a pipe holds, and no more: it may write faster than this reads.
            data = os.read(stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self.stderr += data
        del self.stderr[:-STDERR_KEPT]
        return bool(data)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read_output(stdout: IO[bytes], room: memoryview) -> int | None:
    try:
        return os.readv(stdout.fileno(), [room])
    except BlockingIOError:
        return None


def _end(process: "subprocess.Popen[bytes]") -> int:
    """End the command if it still runs, and all that it has left in its group; returns its exit status."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return process.wait()


def _judge(name: str, status: int, stderr: bytes | bytearray, folders: Sequence[str]) -> None:
    """Raise SampleFailure unless it succeeded; `folders` are its own, of which nothing is said."""
    if status == 0:
        return
    text = stderr.decode("utf-8", "replace").strip()
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(folder, ".")
    text = without_own_paths(text)
    how = f"exited with status {status}" if status > 0 else f"was killed by {_signal_name(-status)}"
    words = text.splitlines()[-1].strip()[-_LAST_WORDS:] if text else "it wrote nothing to its standard error"
    raise SampleFailure(f"{name} {how}: {words}"[:MAX_MESSAGE], output=text or None)
