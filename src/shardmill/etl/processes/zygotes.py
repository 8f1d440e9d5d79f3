"""A zygote process seen from the node: started, asked, and gone when it dies."""

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmill.core.errors import Busy, TransformFailed
from shardmill.etl.processes.channel import Channel
from shardmill.etl.processes.output import PrintedOutput
from shardmill.etl.processes.staging import BOOT
from shardmill.worker import installed, wire

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
_ANSWER_SECONDS = 20.0
_QUIT_SECONDS = 5.0

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(slots=True)
class Forked:
    """A worker process just forked. `pidfd` is owned by the receiver."""

    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class Preload:
    """What a zygote has imported by now."""

    modules: tuple[str, ...]
    failed: dict[str, str]
    threads: tuple[str, ...]
    """Names of threads that the imports started; with any, it may not fork."""


class Zygote:
    """One running zygote. Start it with `Zygote.start`, end it with `close`."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        output: PrintedOutput,
        *,
        scratch: Path,
        built: str | None,
    ) -> None:
        self.name = name
        self.scratch = scratch
        """Where its workers have their scratch directories."""
        self._built = built
        self._process = process
        self._output = output
        self._channel = Channel(sock, self._on_frame, self._on_closed, takes_descriptors=True)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._is_closing = False
        self.gone = asyncio.Event()
        self.workers = 0
        """Live workers that were forked from it."""
        self.is_retired = False
        """Nothing new is to be done with it: another has taken its place."""

    @classmethod
    async def start(
        cls, name: str, interpreter: Path, stage: Path, scratch: Path, *, built: str | None = None
    ) -> "Zygote":
        """Start one and wait for its greeting.

        Args:
            name: Of the environment.
            interpreter: To run it.
            stage: The staged code of this node.
            scratch: Its home, below which are those of its workers.
            built: Key of what the node has built the environment of. Such a zygote is confined like a worker, before
                the first of its distributions runs.

        Raises:
            TransformFailed: The interpreter cannot run it; the message has what it printed.
        """
        # Without `site` no file of a distribution runs before the zygote is confined, which then imports it.
        flags, confined = (["-s", "-P"], []) if built is None else (["-s", "-P", "-S"], [str(scratch)])
        ours, theirs = socket.socketpair()
        output = PrintedOutput()
        try:
            # The environment is built from nothing: no secret of the node's reaches user code.
            # Forked by this very thread, whose end is the zygote's death signal.
            process = subprocess.Popen(  # noqa: ASYNC220
                [interpreter, *flags, "-c", BOOT, stage, str(theirs.fileno()), str(os.getpid()), *confined],
                stdin=subprocess.DEVNULL,
                stdout=output.writer,
                stderr=output.writer,
                cwd=scratch,
                env=_environment(scratch) | ({"PYTHONDONTWRITEBYTECODE": "1"} if built is not None else {}),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            output.close()
            raise TransformFailed(
                f"environment {name!r}: the interpreter cannot be started: {error.strerror}"
            ) from None
        finally:
            theirs.close()
            os.close(output.writer)
        zygote = cls(name, process, ours, output, scratch=scratch, built=built)
        try:
            zygote.about = await asyncio.wait_for(asyncio.shield(zygote._hello), START_SECONDS)
        except BaseException as error:
            tail = output.tail()
            await zygote.close()
            if isinstance(error, (TimeoutError, ConnectionError)):
                raise TransformFailed(f"environment {name!r} does not start: {tail or 'no word from it'}") from None
            raise
        return zygote

    about: dict[str, Any]
    """Its greeting: python, id, distributions, pid, and what was installed then."""

    @property
    def environment_id(self) -> str:
        """What it found when it started; whatever is imported later must be the same."""
        found = str(self.about["id"])
        # What the node has built it knows by the hashes of the files, not only by their versions.
        return found if self._built is None else hashlib.sha256(f"{found}{self._built}".encode()).hexdigest()

    def was_installed_into(self) -> bool:
        """Whether the distributions that it could import are others than when it started. Blocks for a few stats."""
        paths, now = self.about["paths"], installed.stamps(self.about["paths"])
        if now == self.about["stamps"]:
            return False
        if installed.fingerprint(paths) != self.about["fingerprint"]:
            return True
        self.about["stamps"] = now
        return False

    async def find_missing(self, modules: tuple[str, ...]) -> list[str]:
        """Those of the top-level modules that are not installed there."""
        answer = await self._ask({"t": "find", "modules": list(modules)}, seconds=_ANSWER_SECONDS)
        return [str(name) for name in answer["missing"]]

    async def preload(self, modules: tuple[str, ...], *, seconds: float) -> Preload:
        """Import modules for all workers to come."""
        answer = await self._ask({"t": "preload", "modules": list(modules)}, seconds=seconds)
        return Preload(tuple(answer["modules"]), dict(answer["failed"]), tuple(answer["threads"]))

    async def fork(
        self, sock: socket.socket, arena: int, output: int, *, arena_size: int, memory: int, scratch: Path
    ) -> Forked:
        """Fork one worker that gets the three descriptors; the caller closes its own copies."""
        request = {"t": "fork", "arena": arena_size, "memory": memory, "scratch": str(scratch)}
        answer = await self._ask(request, descriptors=(sock.fileno(), arena, output), seconds=_ANSWER_SECONDS)
        if answer["t"] == "refused":
            raise Busy(f"environment {self.name!r} cannot start a worker: {answer['message']}", retry_after=5)
        self._exits[answer["pid"]] = asyncio.get_running_loop().create_future()
        self.workers += 1
        return Forked(answer["pid"], answer["pidfd"])

    async def wait_exit(self, pid: int, seconds: float) -> int | None:
        """Exit status of a worker (negative: signal), or None if it is not known in time."""
        future = self._exits.get(pid)
        if future is None:
            return None
        with contextlib.suppress(TimeoutError, ConnectionError):
            return await asyncio.wait_for(asyncio.shield(future), seconds)
        return None

    def forget(self, pid: int) -> None:
        """A worker's handle is done with it."""
        future = self._exits.pop(pid, None)
        if future is not None:
            self.workers -= 1
            future.cancel()

    async def close(self) -> None:
        """Ask → kill. Workers die with it."""
        self._is_closing = True
        if self._channel.is_open:
            self._channel.send({"t": "quit"})
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self._process.wait, _QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._channel.close()
            self._lose("closed")
            self._output.close()

    async def _ask(self, head: dict[str, Any], *, seconds: float, descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
        if not self._channel.is_open:
            raise ConnectionError(f"the zygote of environment {self.name!r} is gone")
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self._channel.send({**head, "id": number}, descriptors=descriptors)
        try:
            async with asyncio.timeout(seconds):
                return await future
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                # It came in the very moment in which nobody waits any more.
                _give_up(future.result())
            if isinstance(error, TimeoutError):
                message = f"the zygote of environment {self.name!r} gave no answer for {seconds:g} s"
                raise TimeoutError(message) from None
            raise
        finally:
            self._answers.pop(number, None)

    def _on_frame(self, frame: wire.Frame) -> None:
        head = frame.head
        match head["t"]:
            case "hello":
                if not self._hello.done():
                    self._hello.set_result(head)
            case "exit":
                future = self._exits.get(head["pid"])
                if future is not None and not future.done():
                    future.set_result(head["status"])
            case kind:
                if kind == "forked":
                    head["pidfd"] = self._channel.descriptors.popleft()
                waiting = self._answers.get(head["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(head)
                else:
                    _give_up(head)

    def _on_closed(self, reason: str) -> None:
        if not self._is_closing:
            logger.warning(
                "zygote of environment %s is gone: %s; %s",
                self.name,
                reason,
                self._output.tail() or "it printed nothing",
            )
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.gone.set()
        error = ConnectionError(f"the zygote of environment {self.name!r} is gone: {reason}")
        waiting: list[asyncio.Future[Any]] = [self._hello, *self._answers.values(), *self._exits.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # marks it retrieved: nobody may be waiting


def _give_up(answer: dict[str, Any]) -> None:
    """Whoever asked has left; a worker that nobody knows must not live."""
    if answer["t"] == "forked":
        # It may have ended by itself: the other end of its socket is gone with whoever asked.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(answer["pidfd"], signal.SIGKILL)
        os.close(answer["pidfd"])


def _environment(scratch: Path) -> dict[str, str]:
    folder = str(scratch)
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": folder,
        "TMPDIR": folder,
        "XDG_CACHE_HOME": folder,
        "MPLCONFIGDIR": folder,
        "NUMBA_CACHE_DIR": folder,
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(_THREAD_VARIABLES, "1"),
    }
