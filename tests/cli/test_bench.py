"""`shardmill bench`: what it measures, and the side that it names."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shardmill.cli.bench import Measured, choose
from shardmill.cli.main import run
from shardmill.testing.node import RunningNode

SHARD = "gs://sharded-imagenet/imagenet-train-000000.tar"
FUNCTIONS = """
import hashlib

import numpy as np


def grow(sample):
    sample["npy"] = np.zeros((224, 224, 3), np.float32)
    del sample["jpg"]
    return sample


def relabel(sample):
    sample["cls"] = sample["cls"] + 1
    return sample


def digest(sample, megabytes=8):
    sample["txt"] = hashlib.sha256(bytes(megabytes << 20)).hexdigest()
    del sample["jpg"]
    return sample


def fail(sample):
    raise ValueError("unlucky")


def whole(reader, writer):
    writer.write(reader.read())
"""
BALANCED = Measured(
    samples=64,
    bytes_in=110_000,
    bytes_out=600_000,
    link=1e9,
    receive_in=0.0002,
    function=0.005,
    receive_out=0.0006,
    worker=0.0055,
    rate=350,
    cores=2,
    workers=2,
)

Bench = Callable[..., tuple[int, str, str]]


class ThrottledLink:
    """A proxy on loopback that passes so many bytes a second back to all its clients together."""

    PIECE = 16384

    def __init__(self, endpoint: str, bytes_per_second: int) -> None:
        parts = urlsplit(endpoint)
        self._upstream = (parts.hostname or "", parts.port or 0)
        self._pace = self.PIECE / bytes_per_second
        self._free_at = time.monotonic()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for side in self._open:
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for side in self._open:
            side.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            node = socket.create_connection(self._upstream)
            # Little is under way outside of the pace that is kept here.
            node.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.PIECE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.PIECE)
            self._open += [client, node]
            for source, target, paced in ((client, node, False), (node, client, True)):
                thread = threading.Thread(target=self._pass_on, args=(source, target, paced))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, target: socket.socket, paced: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(self.PIECE):
                if paced:
                    self._wait(len(piece))
                target.sendall(piece)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _wait(self, size: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + self._pace * size / self.PIECE
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def bench(node: RunningNode, functions: Path, capfd: pytest.CaptureFixture[str]) -> Bench:
    """Runs `shardmill bench` with a function of `FUNCTIONS`; gives status, standard output and standard error."""

    def execute(function: str, *options: str, endpoint: str = node.endpoint) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run(["bench", f"{functions}:{function}", SHARD, "--endpoint", endpoint, *options])
        out, err = capfd.readouterr()
        return status, out, err

    return execute


@pytest.fixture
def slow_link(node: RunningNode) -> Iterator[str]:
    link = ThrottledLink(node.endpoint, 3_000_000)
    try:
        yield link.endpoint
    finally:
        link.close()


def measured(report: dict[str, object]) -> Measured:
    return Measured(**{name: value for name, value in report.items() if name not in ("side", "reason")})  # type: ignore[arg-type]


def test_a_costly_function_is_taken_off_this_machine(bench: Bench) -> None:
    status, out, _ = bench("digest", "--samples", "10", "--rounds", "1", "--json", "--args", '{"megabytes": 16}')
    assert status == 0
    found = measured(report := json.loads(out))
    assert found.samples == 10
    assert found.bytes_out < 100 < found.bytes_in
    # Hashing 16 MiB takes far longer than receiving a line of text, however busy the machine is.
    assert found.receive_out < found.function / 4
    assert found.worker > 0
    # How fast the workers of a busy machine are may turn it; nothing else may.
    if found.store_limits["the node's workers"] > min(found.client_limits.values()):
        assert report["side"] == "store"
    assert choose(found).side == report["side"]


def test_outputs_larger_than_inputs_stay_off_a_slow_link(bench: Bench, slow_link: str) -> None:
    status, out, _ = bench("grow", "--samples", "6", "--rounds", "1", "--json", endpoint=slow_link)
    assert status == 0
    found = measured(report := json.loads(out))
    assert found.bytes_out > 600_000 > found.bytes_in
    assert found.link < 6_000_000
    assert report["side"] == "client"
    assert "the link carries" in report["reason"]


def test_the_table_ends_with_the_side_and_why(bench: Bench) -> None:
    # Which side it is hangs on how busy this machine is just then: the sides are tested below, on given figures.
    status, out, _ = bench("relabel", "--samples", "20", "--rounds", "2")
    assert status == 0
    assert re.fullmatch(r"run it (on the client|in the store): .{10,}", out.splitlines()[-1])
    assert "20 samples of" in out
    for line in ("CPU here", "time of the node's worker", "bytes over the link", "samples/s at most", "limited by"):
        assert line in out


@pytest.mark.parametrize(
    ("change", "side", "because"),
    [
        ({}, "store", "0.60 ms of CPU here instead of 5.20 ms"),
        ({"function": 0.0002}, "client", "receiving what comes out costs 0.60 ms"),
        ({"link": 50e6}, "client", "the link carries 83 samples/s of what comes out (585.9 KiB each)"),
        ({"link": 50e6, "bytes_out": 50_000}, "store", "instead of"),
        # What is stored needs the link more than what comes out does.
        ({"link": 10e6, "bytes_out": 100_000}, "store", "instead of"),
        ({"workers": 1, "cores": 16}, "client", "the node's 1 worker can make 182 samples/s"),
        ({"workers": 2, "cores": 4}, "store", "instead of"),
        ({"bytes_out": 0.0, "receive_out": 0.0}, "store", "0.00 ms of CPU here"),
    ],
)
def test_the_side_follows_from_what_was_measured(change: dict[str, float], side: str, because: str) -> None:
    choice = choose(replace(BALANCED, **change))  # type: ignore[arg-type]
    assert choice.side == side
    assert because in choice.reason


@pytest.mark.parametrize(
    ("function", "message"),
    [("missing", "has no function 'missing'"), ("whole", "of kind stream"), ("fail", "ValueError: unlucky")],
)
def test_what_cannot_be_measured_is_said(bench: Bench, functions: Path, function: str, message: str) -> None:
    if function == "whole":
        functions.write_text(
            "from shardmill import transform\n" + FUNCTIONS.replace("def whole", '@transform(kind="stream")\ndef whole')
        )
    status, out, err = bench(function)
    assert status in (1, 2)
    assert out == ""
    assert message in err


def test_a_missing_library_names_the_way_out(bench: Bench, functions: Path) -> None:
    functions.write_text("import no_such_library_x\n\n\ndef f(sample):\n    return sample\n")
    status, _, err = bench("f")
    assert status == 2
    assert "PYTHON -m shardmill.cli bench" in err


def test_kept_results_are_not_taken_for_work(bench: Bench, functions: Path, node: RunningNode) -> None:
    functions.write_text("def f(sample):\n    sample['cls'] = 1\n    return sample\n")
    # A function that a probe has found to draw nothing gives the same bytes for ever, so they are kept.
    assert run(["transform", "add", f"{functions}:f", "--endpoint", node.endpoint, "--probe", SHARD]) == 0
    status, _, err = bench("f", "--samples", "12", "--rounds", "2")
    assert status == 2
    assert "kept results" in err
