"""What goes on at a node and what holds it up: in the API, the metrics, and the commands `top`, `status`, `transform show`."""

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from shardmill import Client
from shardmill.cli.main import run
from shardmill.cli.top import Look, View, compare
from shardmill.core.api import RunInfo, TransformStatistics
from tests.server.readers import Reader, get, metric, wait_until
from tests.server.served import BUCKET, TRAIN, VAL, Sample, Served, serving

Shell = Callable[..., tuple[int, str, str]]


def slow(sample: Sample, seconds: float) -> Sample:
    import time

    time.sleep(seconds)
    sample["bin"] = random.randbytes(200_000)
    return sample


def only_decode(sample: Sample) -> Sample:
    """Nothing of its own: pictures are decoded, and pass through as they are."""
    return {"__key__": sample["__key__"], "cls": sample["cls"]}


@pytest.fixture(scope="module")
def served(shards: Path) -> Iterator[Served]:
    with serving(shards) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.node.endpoint) as client:
        yield client


@pytest.fixture
def shell(served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command; gives status, standard output and standard error."""
    monkeypatch.setenv("SHARDMILL_ENDPOINT", served.node.endpoint)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run(arguments)
        return status, *capfd.readouterr()

    return execute


def totals(client: Client, uuid: str) -> TransformStatistics:
    return client.transforms.get(uuid).statistics


def label(statistics: TransformStatistics) -> str:
    assert statistics.bottleneck is not None
    return statistics.bottleneck.label


def test_a_run_is_shown_from_its_start_until_its_reader_has_everything(served: Served, client: Client) -> None:
    uuid = client.transforms.add(slow, "shown", args={"seconds": 0.01}).uuid
    url = client.object_url(BUCKET, TRAIN, uuid, seed=1)
    samples = served.samples(TRAIN)
    with Reader(url) as one, Reader(url) as other:
        one.begin()
        other.begin()
        found = client.runs()
        [shown] = found.runs
        assert shown.id == one.response.headers["Shardmill-Run"]
        assert (shown.transform, shown.spec) == (uuid, f"{uuid.split(',')[0]},seed=1,{uuid.split(',')[1]}")
        assert (shown.bucket, shown.object) == (BUCKET, TRAIN)
        assert (shown.readers, shown.shared, shown.ahead) == (2, True, False)
        assert shown.started <= found.time <= time.time()
        assert found.lanes == 2
        assert sum(found.workers.values()) >= 1
        wait_until(lambda: client.runs().runs[0].state == "ended", "the run has no end")
        [ended] = client.runs().runs
        assert (ended.done, ended.statistics.samples) == (1.0, samples)
        assert ended.rate > 0
        assert ended.taken < ended.published
        whole = one.finish().body
        assert ended.published == len(whole)
        other.finish()
    wait_until(lambda: not client.runs().runs, "the run is still shown")
    assert totals(client, uuid).runs == 1


def test_slow_functions_are_named(client: Client) -> None:
    uuid = client.transforms.add(slow, "named-slow", args={"seconds": 0.05}).uuid
    url = client.object_url(BUCKET, VAL, uuid)
    get(url)
    get(url)
    statistics = totals(client, uuid)
    assert label(statistics) == "user code"
    assert statistics.bottleneck is not None
    assert "ms a sample" in statistics.bottleneck.text
    assert statistics.seconds_user >= 0.05 * statistics.samples


def test_decoding_is_named_with_what_is_decoded(client: Client) -> None:
    uuid = client.transforms.add(only_decode, "named-decoding").uuid
    url = client.object_url(BUCKET, TRAIN, uuid)
    get(url)
    get(url)
    assert label(totals(client, uuid)) == "decoding jpg"


def test_slow_readers_are_named(served: Served, client: Client) -> None:
    with Reader(served.url(TRAIN, seed=51)) as reader:
        reader.begin()
        # It reads on when the run has long been ready for it.
        wait_until(lambda: _blocked(client), "the run has an end without its reader")
        answer = reader.finish()
    assert len(answer.body) > 1 << 20


def _blocked(client: Client) -> bool:
    [shown] = client.runs().runs
    found = shown.statistics.bottleneck
    return found is not None and found.stage == "send" and found.label == "the reader"


def test_too_few_workers_are_named(client: Client) -> None:
    uuid = client.transforms.add(slow, "named-queue", args={"seconds": 0.03}).uuid
    urls = [client.object_url(BUCKET, VAL, uuid, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(get, urls))
    statistics = totals(client, uuid)
    assert label(statistics) == "worker cores"
    assert statistics.seconds_wait > 0
    assert statistics.bottleneck is not None
    assert "mostly user code" in statistics.bottleneck.text


def test_metrics_tell_where_time_goes_and_count_what_is_being_sent(shards: Path) -> None:
    with serving(shards, function=slow, args={"seconds": 0.01}) as served:
        client, url = served.client, served.url(TRAIN, seed=1)

        def sent() -> float:
            return metric(client, "shardmill_bytes_total", route="t", direction="out")

        with Reader(url) as reader:
            reader.begin(3 << 20)
            wait_until(lambda: sent() > 2 << 20, "what an answer has sent counts at its end only")
            answer = reader.finish()
        wait_until(lambda: sent() == len(answer.body), "bytes are counted twice, or not at all")
        statistics = totals(client, served.uuid)
        for stage in ("fetch", "read", "decode", "user", "encode", "wait", "send", "keep"):
            value = metric(client, "shardmill_transform_seconds_total", transform="slow", stage=stage)
            assert value == pytest.approx(getattr(statistics, f"seconds_{stage}"))
        found = statistics.bottleneck
        assert found is not None
        assert metric(client, "shardmill_transform_bottleneck", transform="slow") == pytest.approx(found.share)
        assert metric(client, "shardmill_transform_bottleneck", transform="slow", stage=found.stage) > 0


def test_commands_name_what_holds_a_transform_up(client: Client, shell: Shell) -> None:
    uuid = client.transforms.add(slow, "commanded", args={"seconds": 0.05}).uuid
    url = client.object_url(BUCKET, TRAIN, uuid, seed=1)
    get(client.object_url(BUCKET, VAL, uuid))
    status, out, err = shell("transform", "show", "commanded")
    assert (status, err) == (0, "")
    facts = dict(line.split(":", 1) for line in out.splitlines())
    assert facts["held up by"].strip().startswith("user code: 5")
    assert " for readers" in facts["waited"]
    with Reader(url) as reader:
        reader.begin()
        status, out, err = shell("status")
        assert status == 0
        assert any(line.startswith("commanded@") and "user code" in line for line in out.splitlines()), out
        [shown] = client.runs().runs
        assert any(line.startswith(f"{shown.id} ") and f"{BUCKET}/{TRAIN}" in line for line in out.splitlines()), out
        document = json.loads(shell("status", "--json")[1])
        assert document["going_on"][0]["id"] == shown.id
        assert document["totals"]["commanded"]["bottleneck"]["stage"] == "user"


def test_top_prints_what_goes_on_once(client: Client, shell: Shell) -> None:
    uuid = client.transforms.add(slow, "topped", args={"seconds": 0.05}).uuid
    with ExitStack() as readers:
        for seed in range(2):
            readers.enter_context(Reader(client.object_url(BUCKET, TRAIN, uuid, seed=seed))).begin()
        status, out, err = shell("top", "--once", "--interval", "0.3")
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].startswith(client.endpoint)
        assert "of 2 at work" in lines[1]
        assert " samples/s, " in lines[2]
        assert " of 10.0 GiB" in lines[3]
        runs = [line for line in lines if line.startswith("run-")]
        assert len(runs) == 2
        assert all(f"{BUCKET}/{TRAIN}" in line for line in runs)
        assert any(line.startswith("topped ") for line in lines)
        status, out, err = shell("top", "--json", "--once", "--interval", "0.3")
        view = json.loads(out)
        assert {item["run"]["object"] for item in view["runs"]} == {TRAIN}
        assert view["samples_per_second"] > 0
        assert view["runs"][0]["samples_per_second"] > 0
        # Standard output is no terminal here.
        assert shell("top", "--interval", "0.1")[1].splitlines()[0].startswith(client.endpoint)


@pytest.mark.parametrize("way", ["q", "Ctrl-C"])
def test_top_watches_on_a_terminal_until_it_is_told_to_end(served: Served, client: Client, way: str) -> None:
    uuid = client.transforms.add(slow, "watched", args={"seconds": 0.05}).uuid
    ours, theirs = pty.openpty()
    try:
        with Reader(client.object_url(BUCKET, TRAIN, uuid, seed=len(way))) as reader:
            reader.begin()
            environ = {
                **os.environ,
                "SHARDMILL_ENDPOINT": client.endpoint,
                "TERM": "xterm",
                "COLUMNS": "160",
                "LINES": "50",
            }
            command = [sys.executable, "-m", "shardmill.cli", "top", "--interval", "0.1"]
            with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
                try:
                    seen = _read_until(ours, [b"watched@", TRAIN.encode(), b"q ends it", b"at work"])
                    if way == "q":
                        os.write(ours, b"q")
                    else:
                        process.send_signal(signal.SIGINT)
                    _drain(ours, process)
                    assert process.wait(30) == 0
                finally:
                    process.kill()
            assert b"\x1b[?1049h" in seen, "it takes the terminal's other screen, and leaves the first as it was"
    finally:
        os.close(ours)
        os.close(theirs)


def _read_until(terminal: int, wanted: list[bytes]) -> bytes:
    seen = b""
    deadline = time.monotonic() + 30
    while not all(text in seen for text in wanted):
        assert time.monotonic() < deadline, seen[-3000:]
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 1 << 16)
    return seen


def _drain(terminal: int, process: "subprocess.Popen[bytes]") -> None:
    """Read what it still writes; a full terminal would hold it up."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)


def look(at: float, *, sent: float = 0, runs: dict[str, tuple[int, int]] | None = None, samples: int = 0) -> Look:
    """`runs`: id → samples, bytes taken; each began at second 100."""
    from shardmill.core.api import Runs

    infos = [
        RunInfo(
            name, "t@0", "t@0,seed=1", "ais://b", "k", "running", 1, False, True, 100.0, 0.5,
            TransformStatistics(samples=done), 1.0, taken, taken,
        )
        for name, (done, taken) in (runs or {}).items()
    ]  # fmt: skip
    totals = {"t": TransformStatistics(samples=samples, failures=1, dropped=2)}
    return Look("http://node", Runs(at, infos, 2, 1, {"default": 2}, totals), sent, 0, {}, 0, 0, 0)


def rates(view: View) -> dict[str, tuple[float, float]]:
    return {item.run.id: (item.samples_per_second, item.bytes_per_second) for item in view.runs}


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = look(110, sent=1000, runs={"run-1": (50, 5000), "run-2": (7, 700)}, samples=57)
    now = look(112, sent=5000, runs={"run-1": (60, 6000), "run-3": (4, 400)}, samples=81)
    view = compare(before, now)
    assert view.sent_per_second == 2000
    assert view.samples_per_second == 12
    assert rates(view) == {"run-1": (5, 500), "run-3": (2, 200)}
    assert [(item.name, item.samples_per_second) for item in view.transforms] == [("t", 12)]


def test_a_run_that_just_began_counts_from_its_own_start() -> None:
    view = compare(look(90), look(101, runs={"run-1": (30, 3000)}, samples=30))
    assert rates(view) == {"run-1": (30, 3000)}


def test_a_node_that_was_started_anew_counts_from_zero() -> None:
    view = compare(look(200, sent=1_000_000, samples=5000), look(202, sent=400, samples=7))
    assert view.sent_per_second == 200
    assert view.samples_per_second == 5
