"""One process per environment that has imported what transforms need; workers are forked from it.

It stays single-threaded (a fork with threads can deadlock), runs no user code, and is the parent of every worker: it
reaps them, kills what they leave behind, and dies with the node.
"""

import contextlib
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import select
import signal
import site
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shardmill.worker import heap, installed, limits, wire
from shardmill.worker.loop import serve
from shardmill.worker.orphans import children, kill

QUIT_SECONDS = 10

# Threads that are known to survive a fork: their libraries install fork handlers of their own.
HARMLESS_THREADS = ("jemalloc_bg_thd",)


def main() -> None:
    """Entry point: `zygote.main()` with the socket's descriptor and the parent's pid as arguments.

    A third, a directory, confines it to writing there, for an interpreter started without `site`: what the
    distributions of its environment run when they are imported is then no freer than a function.
    """
    descriptor, parent, *confined = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    # Not SIGKILL: what functions have left running is to be ended too, and only this process would find it. The socket
    # says that the node is gone; should an import keep it from being read, that may take no longer than this.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(QUIT_SECONDS))
    limits.die_with_parent(parent, signal.SIGTERM)
    limits.adopt_orphans()
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    heap.keep_what_is_freed()
    if confined:
        limits.confine_zygote(*confined)
        site.main()
    Zygote(wire.Connection(sock)).run()


class Zygote:
    """Answers `find`, `preload`, `fork`, `quit` and reports `exit`."""

    def __init__(self, connection: wire.Connection) -> None:
        self._connection = connection
        self._workers: set[int] = set()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._preloaded: list[str] = []

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._send({"t": "hello", "version": wire.VERSION, **installed_now(), **describe()})
        poller = select.poll()
        poller.register(self._connection.sock, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            poller.poll(limits.SWEEP_SECONDS * 1000 if self._workers else None)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            self._reap()
            while (frame := self._connection.receive_nowait()) is not None:
                if not self._handle(frame):
                    self._quit()
                    return
            if self._closed():
                self._quit()
                return

    def _closed(self) -> bool:
        try:
            return self._connection.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False

    def _handle(self, frame: wire.Frame) -> bool:
        head = frame.head
        match head["t"]:
            case "find":
                self._send(
                    {"t": "found", "id": head["id"], "missing": [m for m in head["modules"] if not _is_found(m)]}
                )
            case "preload":
                self._preload(head)
            case "fork":
                self._fork(head)
            case "quit":
                return False
        return True

    def _preload(self, head: dict[str, Any]) -> None:
        failed: dict[str, str] = {}
        for name in head["modules"]:
            try:
                importlib.import_module(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
            else:
                if name not in self._preloaded:
                    self._preloaded.append(name)
        # What is imported now is shared by all workers for good; a collection in a child would copy its pages.
        gc.collect()
        gc.freeze()
        self._send(
            {"t": "preloaded", "id": head["id"], "modules": self._preloaded, "failed": failed, "threads": _threads()}
        )

    def _fork(self, head: dict[str, Any]) -> None:
        sock, arena, output = (self._connection.descriptors.popleft() for _ in range(3))
        started = time.monotonic()
        own_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            for descriptor in (sock, arena, output):
                os.close(descriptor)
            self._send({"t": "refused", "id": head["id"], "message": f"fork: {error.strerror}"})
            return
        if pid == 0:
            self._become_worker(head, own_pid, sock, arena, output)
        for descriptor in (sock, arena, output):
            os.close(descriptor)
        self._workers.add(pid)
        handle = os.pidfd_open(pid)
        try:
            seconds = time.monotonic() - started
            self._connection.send(
                {"t": "forked", "id": head["id"], "pid": pid, "seconds": seconds}, descriptors=(handle,)
            )
        finally:
            os.close(handle)

    def _become_worker(self, head: dict[str, Any], parent: int, sock: int, arena: int, output: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            with open(os.devnull, "rb") as null:
                os.dup2(null.fileno(), 0)
            for descriptor in (output, self._wake_read, self._wake_write):
                os.close(descriptor)
            self._connection.sock.close()
            _enter_scratch(head["scratch"])
            layers = limits.confine(parent, head["memory"], head["scratch"])
            status = serve(socket.socket(fileno=sock), arena, head["arena"], layers | limits.BY_BIRTH)
        finally:
            # No atexit handlers and no buffered output of the zygote's in a child.
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in self._workers:
                self._workers.discard(pid)
                _kill_session(pid)
                code = os.waitstatus_to_exitcode(status)
                self._send({"t": "exit", "pid": pid, "status": code})
        for pid in children():
            if pid not in self._workers:
                kill(pid)

    def _quit(self) -> None:
        for pid in list(self._workers):
            _kill_session(pid)
            kill(pid)
        deadline = time.monotonic() + QUIT_SECONDS / 2
        while (found := children()) and time.monotonic() < deadline:
            for pid in found:
                kill(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)

    def _send(self, head: dict[str, Any]) -> None:
        self._connection.send(head)


def installed_now() -> dict[str, Any]:
    """What tells the node that something was installed since. Taken before anything is read or imported."""
    paths = installed.search_path(stage=str(Path(installed.__file__).parents[2]))
    return {"paths": paths, "stamps": installed.stamps(paths), "fingerprint": installed.fingerprint(paths)}


def describe() -> dict[str, Any]:
    """What identifies this environment; pixels differ between versions of libraries and between CPU levels."""
    installed = [(item.metadata["Name"], item.version) for item in importlib.metadata.distributions()]
    distributions = sorted({f"{name}=={version}" for name, version in installed if name})
    soabi = f"{sys.implementation.cache_tag}-{platform.machine()}-{platform.libc_ver()[0]}"
    parts = [platform.python_version(), soabi, cpu_level(), *distributions]
    return {
        "python": platform.python_version(),
        "id": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        "distributions": len(distributions),
        "pid": os.getpid(),
    }


def cpu_level() -> str:
    """`x86-64-v2`, `-v3` or `-v4` by the flags in /proc/cpuinfo; elsewhere the machine's name."""
    machine = platform.machine()
    if machine != "x86_64":
        return machine
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return machine
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86-64-v4"
    if {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"} <= flags:
        return "x86-64-v3"
    return "x86-64-v2"


def _is_found(module: str) -> bool:
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _threads() -> list[str]:
    """Names of this process's threads beside the main one, harmless ones left out."""
    names = []
    for task in os.listdir("/proc/self/task"):
        if int(task) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm", encoding="utf-8") as file:
                names.append(file.read().strip())
    return [name for name in names if not name.startswith(HARMLESS_THREADS)]


def _enter_scratch(path: str) -> None:
    os.chdir(path)
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"):
        os.environ[name] = path
    tempfile.tempdir = None


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
