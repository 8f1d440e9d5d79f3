"""`python -m benchmarks.soak`: a node under mixed traffic for minutes. What it holds must stay flat, its counts add up.

Readers who read to the end, stall, leave, ask for parts and for what is finished; versions that come and go, fail,
drop, fan out; workers and zygotes that are killed; a quota that is too small. Everything that was answered whole is
checked against what the same URL gave before.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import os
import random
import signal
import statistics
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.processes import end_when_told
from shardmill import Client
from shardmill.cli.metrics import Metrics
from shardmill.testing.node import RunningNode, running_node

BUCKET, POOL = "gs://soak", "ais://soak"
CAPACITY = 24 << 20  # bytes of results
IDLE_SECONDS = 2
SETTINGS = {
    "SHARDMILL_RESULTS_CAPACITY": str(CAPACITY),
    "SHARDMILL_RESULTS_SCRATCH": "4s",
    "SHARDMILL_RESULTS_SPOOL_WINDOW": "8MiB",
    "SHARDMILL_TRANSFORMS_RUN_WINDOW": "4MiB",
    "SHARDMILL_TRANSFORMS_NODE_WINDOW": "64MiB",
    "SHARDMILL_TRANSFORMS_MAX_RUNS": "24",
    "SHARDMILL_TRANSFORMS_IDLE_WORKERS": f"{IDLE_SECONDS}s",
    "SHARDMILL_TRANSFORMS_SAMPLE_TIMEOUT": "30s",
}
READERS = 6
_KILLED = ("SIGKILL", "broke off", "no worker")  # said of a worker; the second where its zygote died, too
QUIET_SECONDS = 60.0  # at most, until nothing goes on after the last request
KEPT_SECONDS = 10.0  # at most, until objects that nobody reads any more are closed
FLAT_SECONDS = 300.0  # from which on what is held has to be flat
GROWTH = {"memory": (1.1, 4 << 20), "threads": (1.1, 4), "disk": (1.1, CAPACITY)}
"""What the last third of a run may hold: so many times what the middle third did, and so much more; medians."""
WARM_UP = 0.25  # of the samples taken, left out of slopes: caches fill, environments start

CODE = {
    "shrink": "sample['jpg'] = sample['jpg'].resize((48, 48))\n    return sample",
    "noise": "sample['bin'] = random.randbytes(60_000)\n    return sample",
    "drop": "return None if random.random() < 0.3 else sample",
    "fan": "return [dict(sample, __key__=f\"{sample['__key__']}-{part}\") for part in range(3)]",
    "unlucky": "if random.random() < 0.02:\n        raise ValueError('unlucky')\n    return sample",
    "broken": "raise ValueError('always')",
    "slow": "time.sleep(0.004)\n    return sample",
}
"""Bodies of functions; what is wanted of each is in `_options`."""


@dataclass
class Tally:
    """What clients saw, under a lock."""

    requests: Counter[str] = field(default_factory=Counter)
    """status → answers on /t, `cut` beside it where the body was."""
    received: int = 0
    """Body bytes on /t."""
    whole: int = 0
    """Of these, of answers that were read to their end."""
    wrong: list[str] = field(default_factory=list)
    """What was not as it should be."""
    digests: dict[str, str] = field(default_factory=dict)
    """URL with a seed → SHA-256 of its bytes."""
    kills: int = 0
    versions: int = 0
    ledger: int = 0
    """Samples of the version of which every one is accounted for."""
    lost: int = 0
    """Samples of the ledger's runs that were given up because workers were killed, at most."""
    beside: int = 0
    """Requests on /t that are not among `requests`."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Held:
    """What a node holds at one time."""

    seconds: float
    memory: int
    """Bytes resident, of the node's own process."""
    descriptors: int
    processes: int
    threads: int
    disk: int


@dataclass
class Report:
    """How it went."""

    seconds: float
    held: list[Held]
    after: Held
    """Once nothing went on any more."""
    before: Held
    tally: Tally
    counts: dict[str, float]
    wrong: list[str]

    def slopes(self) -> dict[str, float]:
        """What was held → change an hour, by least squares without the warm-up."""
        kept = self.held[int(len(self.held) * WARM_UP) :]
        if len(kept) < 3:
            return {}
        at = [item.seconds for item in kept]
        names = ("memory", "descriptors", "processes", "threads", "disk")
        return {
            name: statistics.linear_regression(at, [getattr(item, name) for item in kept]).slope * 3600
            for name in names
        }


def growth(held: Sequence[Held]) -> list[str]:
    """What was held more of in the last third of a run than `GROWTH` allows."""
    third = len(held) // 3
    grown = []
    for name, (factor, more) in GROWTH.items():
        values = [getattr(item, name) for item in held]
        middle, last = statistics.median(values[third : -third or None]), statistics.median(values[-third:])
        if last > middle * factor + more:
            grown.append(f"{name}: {middle:.0f} in the middle third, {last:.0f} in the last")
    return grown


class Soak:
    """One node and its traffic."""

    def __init__(self, node: RunningNode, shards: Sequence[Path], seed: int) -> None:
        self.node = node
        self.client = Client(node.endpoint)
        self.names = [path.name for path in shards]
        self.samples = {path.name: _count_samples(path) for path in shards}
        self.tally = Tally()
        self.stop = threading.Event()
        self.specs: dict[str, str] = {}
        self._seed = seed
        self._numbers = itertools.count()
        self._scratch = tempfile.TemporaryDirectory(prefix="shardmill-soak-")

    def close(self) -> None:
        self.client.close()
        self._scratch.cleanup()

    def run(self, seconds: float) -> tuple[list[Held], Held]:
        """Traffic for so long; what was held meanwhile, and before."""
        for kind in CODE:
            self._register(kind)
        self.ledger = self._register("shrink", "ledger")
        self._known = next(f"{path}:change" for path in Path(self._scratch.name).glob("shrink_*.py"))
        self.tally.beside += 1
        _get(self.client.object_url(BUCKET, self.names[0], self.specs["shrink"]))
        self._wait_quiet()
        before = self.look(0)
        loops: list[Callable[[random.Random], None]] = [
            *[self._read] * READERS, self._keep_ledger, self._change_versions, self._kill, self._manage, self._store,
        ]  # fmt: skip
        threads = [
            threading.Thread(target=self._loop, args=(step, self._seed + number)) for number, step in enumerate(loops)
        ]
        for thread in threads:
            thread.start()
        held = []
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds and not self.stop.is_set():
            time.sleep(min(1.0, seconds / 20))
            held.append(self.look(passed))
        self.stop.set()
        for thread in threads:
            thread.join()
        return held, before

    def _loop(self, step: Callable[[random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        while not self.stop.is_set():
            try:
                step(dice)
            except Exception as error:
                self._complain(f"{getattr(step, '__name__', step)}: {type(error).__name__}: {error}")
                self.stop.set()
                raise

    def _complain(self, what: str) -> None:
        with self.tally.lock:
            self.tally.wrong.append(what)

    # Versions.

    def _register(self, kind: str, name: str | None = None) -> str:
        number = next(self._numbers)
        path = Path(self._scratch.name) / f"{kind}_{number}.py"
        path.write_text(f"import random, time\n\n\ndef change(sample, constant={number}):\n    {CODE[kind]}\n")
        spec = self.client.transforms.add(f"{path}:change", name or f"soak-{kind}").uuid
        if name is None:
            self.specs[kind] = spec
            with self.tally.lock:
                self.tally.versions += 1
        return spec

    def _change_versions(self, dice: random.Random) -> None:
        """A new version takes the place of an old one, which sometimes goes."""
        if self.stop.wait(dice.uniform(1, 3)):
            return
        kind = dice.choice(sorted(CODE))
        old = self.specs[kind]
        self._register(kind)
        if dice.random() < 0.5:
            self.client.transforms.remove(old)
        if dice.random() < 0.1:
            # What was registered and is known already.
            self.client.transforms.add(self._known, "soak-again")

    # Readers.

    def _read(self, dice: random.Random) -> None:
        """One request on /t: of any version, in any manner."""
        kind = dice.choice(sorted(CODE))
        errors = {"unlucky": dice.choice(["", ",errors=skip:0.2"]), "broken": dice.choice(["", ",errors=skip:0.5"])}
        spec = self.specs[kind]
        seed: int | None = dice.choice([None, 1, 2, 3, dice.randrange(1 << 30)])
        epoch = dice.choice([None, None, dice.randrange(50)]) if seed is not None else None
        name = dice.choice(self.names)
        if dice.random() < 0.4:
            # What many ask for: runs are joined, results read again.
            seed, epoch, name = 1, None, self.names[0]
        options = {"start": dice.randrange(self.samples[name] // 2)} if dice.random() < 0.15 else {}
        if seed is not None:
            spec += f",seed={seed}"
            spec += f",epoch={epoch}" if epoch else ""
        spec += errors.get(kind, "")
        url = self.client.object_url(BUCKET, name, spec, **options)
        manner = dice.choices(["whole", "leave", "stall", "range", "head", "unchanged"], [8, 3, 2, 2, 1, 1])[0]
        headers = {"range": {"Range": "bytes=0-65535"}, "unchanged": {"If-None-Match": "*"}}.get(manner, {})
        self._request(url, dice, manner, headers, is_repeatable=seed is not None)

    def _request(
        self, url: str, dice: random.Random, manner: str, headers: dict[str, str], *, is_repeatable: bool
    ) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=120)
        digest, received, is_whole, status = hashlib.sha256(), 0, False, "gone"
        leave_at = dice.randrange(1 << 20) if manner == "leave" else None
        try:
            connection.request("HEAD" if manner == "head" else "GET", parts.path, headers=headers)
            answer = connection.getresponse()
            status = str(answer.status)
            while piece := answer.read(1 << 16):
                received += len(piece)
                digest.update(piece)
                if leave_at is not None and received > leave_at:
                    break
                if manner == "stall" and dice.random() < 0.2:
                    self.stop.wait(dice.uniform(0.1, 1.0))
            else:
                is_whole = not answer.length
        except http.client.IncompleteRead as error:
            received += len(error.partial)
        except OSError as error:
            self._complain(f"{url}: {error}")
        finally:
            connection.close()
        with self.tally.lock:
            tally = self.tally
            tally.requests[status if is_whole or leave_at is not None else f"{status} cut"] += 1
            tally.received += received
            tally.whole += received if is_whole else 0
            if status not in ("200", "206", "304", "404", "422", "503"):
                tally.wrong.append(f"{url}: status {status}")
            if status == "200" and is_whole and is_repeatable and manner in ("whole", "stall"):
                known = tally.digests.setdefault(url, digest.hexdigest())
                if known != digest.hexdigest():
                    tally.wrong.append(f"{url}: other bytes than before")

    def _keep_ledger(self, dice: random.Random) -> None:
        """A version that is only read whole, each time anew: of it every sample is known."""
        name = dice.choice(self.names)
        url = self.client.object_url(BUCKET, name, self.ledger, seed=next(self._numbers) + (1 << 40))
        with self.tally.lock:
            self.tally.beside += 1
        try:
            _get(url)
        except _Refused as error:
            if error.status != 503 and not self._is_by_kill(error.request):
                self._complain(f"{url}: {error}")
            with self.tally.lock:
                self.tally.lost += self.samples[name] if error.status != 503 else 0
        else:
            with self.tally.lock:
                self.tally.ledger += self.samples[name]
        self.stop.wait(dice.uniform(0.05, 0.5))

    def _is_by_kill(self, request: str) -> bool:
        """Whether a run failed because its workers were killed, twice over the same samples."""
        failures = self.client.transforms.errors(request=request).failures
        return bool(failures) and any(word in failures[-1].message for word in _KILLED)

    # Everything else.

    def _kill(self, dice: random.Random) -> None:
        """Kill a worker, now and then the process that workers come from."""
        if self.stop.wait(dice.uniform(1, 4)):
            return
        zygotes = _children(self.node.pid)
        workers = [worker for zygote in zygotes for worker in _children(zygote)]
        chosen = zygotes if dice.random() < 0.1 else workers
        if chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(chosen), signal.SIGKILL)
            with self.tally.lock:
                self.tally.kills += 1

    def _manage(self, dice: random.Random) -> None:
        """Look at it as people and monitors do, and remove results."""
        self.client.metrics()
        self.client.runs()
        self.client.transforms.results(limit=10)
        self.client.transforms.errors("soak-unlucky")
        if dice.random() < 0.2:
            self.client.transforms.remove_results(f"soak-{dice.choice(sorted(CODE))}")
        self.stop.wait(0.5)

    def _store(self, dice: random.Random) -> None:
        """Objects that are put, read and deleted."""
        key = f"k{dice.randrange(8)}"
        data = dice.randbytes(dice.randrange(200_000))
        handle = self.client.object(f"{POOL}/{key}")
        handle.put(data)
        if handle.read() != data:
            self._complain(f"{POOL}/{key}: other bytes than were put")
        if dice.random() < 0.5:
            handle.delete()
        self.stop.wait(0.1)

    # What is left.

    def look(self, seconds: float) -> Held:
        pid = self.node.pid
        status = Path(f"/proc/{pid}/status").read_text()
        memory = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))
        return Held(
            seconds,
            memory,
            len(os.listdir(f"/proc/{pid}/fd")),
            len(_descendants(pid)),
            len(os.listdir(f"/proc/{pid}/task")),
            _disk_use(self.node.data),
        )

    def _wait_quiet(self) -> None:
        """Until no run goes on, and idle workers have ended."""
        deadline = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < deadline:
            metrics = Metrics.parse(self.client.metrics())
            spools = list((self.node.data / "results" / "tmp").iterdir())
            is_idle = not self.client.runs().runs and not spools
            if is_idle and not metrics.total("shardmill_workers") and len(_descendants(self.node.pid)) <= 1:
                return
            time.sleep(0.1)
        self._complain("something goes on though nobody asks for anything")

    def finish(self, seconds: float, held: list[Held], before: Held) -> Report:
        """Wait until nothing goes on, and see whether everything adds up."""
        self._wait_quiet()
        # Objects stay open for some seconds after their last reader.
        deadline = time.monotonic() + KEPT_SECONDS
        while self.look(seconds).descriptors > before.descriptors + 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        # Results of epochs leave by themselves; their files are the disk's only change.
        metrics, after = Metrics.parse(self.client.metrics()), self.look(seconds)
        tally = self.tally
        wrong = list(tally.wrong)
        if seconds >= FLAT_SECONDS:
            wrong += growth(held)

        def expect(what: str, is_so: bool) -> None:
            if not is_so:
                wrong.append(what)

        runs = metrics.by("shardmill_runs", "state")
        reads = metrics.by("shardmill_transformed_reads_total", "outcome")
        totals = self.client.runs().transforms
        samples = {
            name: metrics.total("shardmill_transform_samples_total", transform=name)
            for name in metrics.by("shardmill_transform_samples_total", "transform")
        }
        answered = metrics.total("shardmill_requests_total", route="t")
        sent = metrics.total("shardmill_bytes_total", route="t", direction="out")
        asked = sum(tally.requests.values()) + tally.beside
        results = self.client.transforms.results()
        for name, statistics_ in totals.items():
            counted = statistics_.samples + statistics_.failures + statistics_.dropped
            expect(f"{name}: /metrics and /api/runs count other samples", samples.get(name) == counted)
        ledger = totals["ledger"]
        expect(
            f"ledger: {ledger.samples + ledger.failures + ledger.dropped} samples counted, {tally.ledger} delivered",
            tally.ledger <= ledger.samples <= tally.ledger + tally.lost and not ledger.failures and not ledger.dropped,
        )
        begun = runs["ended"] + runs["failed"] + runs["abandoned"]
        expect(f"{reads['started']:g} readers started runs, {begun:g} runs are over", reads["started"] == begun)
        by_version = sum(item.runs for item in totals.values())
        expect(f"{by_version} runs by transform, {begun:g} in all", by_version <= begun)
        expect("a run is still counted as going on", runs["running"] == 0)
        expect(f"{asked} requests, {answered:g} answers", answered == asked)
        expect(f"{tally.whole} bytes arrived in whole answers, {sent:g} were sent", sent >= tally.whole)
        expect(f"results take {results.used} of {CAPACITY} bytes", results.used == results.bytes <= CAPACITY)
        expect(f"descriptors: {before.descriptors} before, {after.descriptors} after",
               after.descriptors <= before.descriptors + 2)  # fmt: skip
        expect(f"processes: {before.processes} before, {after.processes} after", after.processes <= before.processes)
        counts = {
            **{f"runs {state}": count for state, count in runs.items()},
            **{f"reads {outcome}": count for outcome, count in reads.items()},
            "samples": sum(samples.values()),
            "answers": answered,
            "bytes sent": sent,
            "results evicted": metrics.total("shardmill_results_evicted_total"),
        }
        return Report(seconds, held, after, before, tally, counts, wrong)


class _Refused(Exception):
    """An answer that is no whole shard; `status` is 200 where it was cut."""

    def __init__(self, status: int, message: str, request: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.request = request


def _get(url: str) -> bytes:
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=120)) as connection:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        request = answer.headers["Shardmill-Request-Id"]
        try:
            body = answer.read()
        except http.client.IncompleteRead:
            raise _Refused(answer.status, "cut", request) from None
    if answer.status != 200:
        raise _Refused(answer.status, body[:300].decode(errors="replace"), request)
    return body


def _count_samples(path: Path) -> int:
    with tarfile.open(path) as archive:
        return len({member.name.partition(".")[0] for member in archive})


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _descendants(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in (child, *_descendants(child))]


def _disk_use(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


@contextlib.contextmanager
def _soaking(shards: Sequence[Path], seed: int) -> Iterator[Soak]:
    flags = ("--bucket", f"{BUCKET}=dir:{shards[0].parent}", "--bucket", POOL, "--workers", "2")
    with running_node(*flags, "--durability", "kill", environ=SETTINGS) as node:
        soak = Soak(node, shards, seed)
        try:
            yield soak
        finally:
            soak.close()


def soak(shards: Sequence[Path], seconds: float, *, seed: int = 0) -> Report:
    """Run it.

    Args:
        shards: Of one directory; JPEG pictures and classes.
        seconds: Of traffic.
        seed: Of the dice that the traffic throws; what meets what is left to the machine.
    """
    with _soaking(shards, seed) as soaking:
        held, before = soaking.run(seconds)
        return soaking.finish(held[-1].seconds, held, before)


def print_report(report: Report) -> None:
    """For people."""
    mib = 1 << 20
    units = {"memory": (mib, "MiB"), "disk": (mib, "MiB")}
    print(f"{report.seconds:.0f} s of traffic")
    for name, slope in report.slopes().items():
        scale, unit = units.get(name, (1, ""))
        values = [getattr(item, name) / scale for item in report.held]
        third = len(values) // 3
        thirds = "  ".join(f"{statistics.median(values[part * third :][: third + 1]):.1f}" for part in range(3))
        print(
            f"  {name:12} before {getattr(report.before, name) / scale:8.1f}  medians of thirds {thirds}  "
            f"most {max(values):8.1f}  after {getattr(report.after, name) / scale:8.1f} {unit:4} "
            f"slope {slope / scale:+.1f} an hour"
        )
    for what, count in report.counts.items():
        print(f"  {what:20} {count:14.0f}")
    print(f"  versions {report.tally.versions}, processes killed {report.tally.kills}")
    print(f"  answers: {', '.join(f'{count} {status}' for status, count in sorted(report.tally.requests.items()))}")
    for what in report.wrong:
        print(f"WRONG: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--shards", type=Path, default=os.environ.get("SHARDMILL_TEST_SHARDS"))
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    if arguments.shards is None:
        raise SystemExit("name a directory of JPEG shards (jpg and cls): --shards DIR")
    end_when_told()
    print(f"seed {arguments.seed}", flush=True)
    paths = sorted(Path(arguments.shards).glob("*.tar"))
    report = soak(paths, arguments.minutes * 60, seed=arguments.seed)
    print_report(report)
    raise SystemExit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
