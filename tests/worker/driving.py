"""A zygote and its workers driven over their wire, as a node drives them, but one message at a time."""

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardmill.etl.processes.staging import BOOT, stage
from shardmill.shards import ShardIndex
from shardmill.worker import wire
from shardmill.worker.arena import read_progress

ARENA = 4 << 20
MEMORY = 4 << 30
KEY, URL = "dir/shard.tar", "ais://shards/dir/shard.tar"


@dataclass
class Results:
    """What a worker said of a batch."""

    outcomes: dict[int, list[Any]] = field(default_factory=dict)
    """Ordinal → what follows it in a result."""
    outputs: dict[int, list[bytes]] = field(default_factory=dict)
    """Ordinal → its framed samples."""

    @property
    def framed(self) -> bytes:
        """All outputs in sample order."""
        return b"".join(data for ordinal in sorted(self.outputs) for data in self.outputs[ordinal])

    def message(self, ordinal: int = 0) -> str:
        """Why a sample failed."""
        outcome = self.outcomes[ordinal]
        assert outcome[0] in ("fail", "fatal", "memory"), outcome
        return str(outcome[1])


class DrivenWorker:
    """One worker process. Its arena is read as soon as results come, and given back."""

    def __init__(self, pid: int, pidfd: int, sock: socket.socket, arena: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.connection = wire.Connection(sock)
        self._arena = mmap.mmap(arena, ARENA, prot=mmap.PROT_READ)
        os.close(arena)
        self._batches = 0
        self.is_closed = False
        ready = self.receive()
        assert ready.head["t"] == "ready"
        self.layers: dict[str, bool] = ready.head["layers"]

    def receive(self) -> wire.Frame:
        frame = self.connection.receive()
        assert frame is not None, "the worker closed its socket"
        return frame

    def load(
        self, source: str, *, decoder: str | None = "pil", allow_pickle: bool = False, probe: bool = False
    ) -> wire.Frame:
        payload = json.dumps(
            {"source": textwrap.dedent(source), "function": "transform", "filename": "/home/user/transform.py"}
        )
        head = {"t": "load", "kind": "sample", "encoding": "source", "args": None, "decoder": decoder, "fields": None}
        self.connection.send({**head, "allow_pickle": allow_pickle, "probe": probe}, payload.encode())
        return self.receive()

    def open(self, shard: Path) -> None:
        with open(shard, "rb") as file:
            self.connection.send({"t": "source", "source": 1, "key": KEY, "url": URL}, descriptors=(file.fileno(),))

    def run(self, samples: list[list[Any]], *, seed: int = 1, epoch: int = 0, limit: int = 64 << 20) -> Results:
        """One batch to its end; room is given as asked for, up to `limit` bytes at once."""
        self._batches += 1
        head = {"t": "batch", "batch": self._batches, "source": 1, "seed": seed, "epoch": epoch, "release": []}
        self.connection.send({**head, "samples": samples})
        results = Results()
        while True:
            said = self.receive().head
            if said["t"] == "need":
                self._give_room(said, limit)
                continue
            assert said["t"] == "part", said
            self._take(said["results"], results)
            if said["final"]:
                return results

    def _take(self, items: list[list[Any]], results: Results) -> None:
        regions = []
        for ordinal, outcome, *rest in items:
            if outcome in ("out", "more"):
                for offset, size, _ in rest[0]:
                    results.outputs.setdefault(ordinal, []).append(self._arena[offset : offset + size])
                    regions.append(offset)
            if outcome != "more":
                results.outcomes[ordinal] = [outcome, *rest]
        self.connection.send({"t": "release", "regions": regions})

    def _give_room(self, head: dict[str, Any], limit: int) -> None:
        if head["bytes"] > limit:
            self.connection.send({"t": "refuse", "message": "too large"})
        elif head["fits"]:
            self.connection.send({"t": "room", "regions": [], "size": None})
        else:
            self.replace_arena(head["bytes"] + (1 << 16))

    def replace_arena(self, size: int) -> None:
        arena = new_arena(size)
        self._arena.close()
        self._arena = mmap.mmap(arena, size, prot=mmap.PROT_READ)
        self.connection.send({"t": "room", "regions": [], "size": size}, descriptors=(arena,))
        os.close(arena)

    def read(self, offset: int, size: int) -> bytes:
        return self._arena[offset : offset + size]

    def progress(self) -> tuple[int, int, int]:
        """Batch and ordinal of the sample in work, and how many there were."""
        with memoryview(self._arena) as view:
            return read_progress(view)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.connection.sock.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        self._arena.close()


class DrivenZygote:
    """A zygote process with its workers."""

    def __init__(self, directory: Path, interpreter: str, environ: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        self._directory = directory
        command = [interpreter, "-s", "-P", "-c", BOOT, str(stage(directory / "stage")), str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*command, str(os.getpid())], pass_fds=[theirs.fileno()], env=environ, start_new_session=True
        )
        theirs.close()
        self.connection = wire.Connection(ours)
        self._workers: list[DrivenWorker] = []
        self.about = self.receive("hello")

    def receive(self, kind: str) -> dict[str, Any]:
        """The next message of that kind; exits of workers may come at any time."""
        while True:
            frame = self.connection.receive()
            assert frame is not None, "the zygote closed its socket"
            if frame.head["t"] == kind:
                return frame.head
            assert frame.head["t"] == "exit", frame.head

    def preload(self, *modules: str) -> dict[str, Any]:
        self.connection.send({"t": "preload", "id": 1, "modules": list(modules)})
        return self.receive("preloaded")

    def fork(self, *, memory: int = MEMORY) -> DrivenWorker:
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        arena = new_arena(ARENA)
        output = os.open(os.devnull, os.O_WRONLY)
        scratch = self._directory / f"scratch-{len(self._workers)}"
        scratch.mkdir()
        head = {"t": "fork", "id": 2, "arena": ARENA, "memory": memory, "scratch": str(scratch)}
        self.connection.send(head, descriptors=(theirs.fileno(), arena, output))
        theirs.close()
        os.close(output)
        forked = self.receive("forked")
        worker = DrivenWorker(forked["pid"], self.connection.descriptors.popleft(), ours, arena)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self.connection.sock.close()
        if self.process.poll() is None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def zygote(
    directory: Path, *, interpreter: str = sys.executable, environ: dict[str, str] | None = None
) -> Iterator[DrivenZygote]:
    """With numpy and what decodes and encodes already imported, as a node has it."""
    variables = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = DrivenZygote(directory, interpreter, environ if environ is not None else variables)
    try:
        yield started
    finally:
        started.close()


def new_arena(size: int) -> int:
    descriptor = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def described(shard: Path) -> list[list[Any]]:
    """A shard's samples as a batch names them."""
    data = shard.read_bytes()
    index = ShardIndex(lambda offset, length: data[offset : offset + length], len(data))
    samples: list[list[Any]] = []
    while found := index.advance(64):
        for sample in found:
            fields = [
                [item.name, at.offset, at.size, int(at.mtime), at.mode, at.uid, at.gid, at.uname, at.gname]
                for item in sample.fields
                if (at := item.member)
            ]
            samples.append([sample.ordinal, sample.key, fields])
    return samples
