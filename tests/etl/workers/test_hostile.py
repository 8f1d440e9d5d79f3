"""Functions that do their worst, through a real node over HTTP: their own request fails with a reason, the next one is
served, and nothing of them is left."""

import http.client
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill.core.api import TransformInfo
from shardmill.etl.processes.process_tree import live_descendants
from tests.etl.over_http import Refused, Served, serve
from tests.etl.support import IDENTITY, write_shard

SETTINGS = {
    "SHARDMILL_TRANSFORMS_SAMPLE_TIMEOUT": "1500ms",
    "SHARDMILL_TRANSFORMS_LOAD_TIMEOUT": "3",
    "SHARDMILL_TRANSFORMS_MEMORY": "500MiB",
    "SHARDMILL_TRANSFORMS_MAX_SAMPLE": "64MiB",
    "SHARDMILL_TRANSFORMS_IDLE_WORKERS": "200ms",
}
SECRET = "hunter2-in-the-environment"


class Home:
    """A node, its shard, what it answers when all is well, and what it holds when idle."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.good = served.register(IDENTITY, name="good")
        self.expected = self.read_good()
        self.zygotes: set[int] = set()
        self.descriptors = 0
        wait_until(lambda: len(self._descendants()) == 1)
        self.zygotes = self._descendants()
        self.descriptors = self._descriptors()

    def read_good(self) -> bytes:
        answer = self.served.get(self.good, "s.tar")
        assert answer.status == 200, answer.body
        return answer.body

    def is_idle(self) -> bool:
        """No process but the zygote, no descriptor and no file more than before; a killed zygote has a successor."""
        return (
            len(self._descendants()) == 1
            and self._descriptors() <= self.descriptors
            and not list((self.served.node.data / "scratch").glob("worker-*"))
        )

    def _descendants(self) -> set[int]:
        return set(live_descendants(self.served.node.pid))

    def _descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.served.node.pid}/fd"))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    directory = tmp_path_factory.mktemp("hostile")
    write_shard(directory / "s.tar", [{"txt": b"sample %d" % ordinal} for ordinal in range(20)])
    environ = SETTINGS | {"AWS_SECRET_ACCESS_KEY": SECRET}
    with serve(directory, "--workers", "2", environ=environ) as served:
        yield Home(served)


SOCKET = """
import os, socket, struct
def sock():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                return socket.socket(fileno=os.dup(int(name)))
        except OSError:
            pass
def frame(text, head=None, blob=0):
    return struct.pack("<II", len(text) if head is None else head, blob) + text
"""

# What it does → its body, and what the answer says.
HOSTILE = {
    "forks sleepers and raises": (
        "for _ in range(20):\n        if os.fork() == 0: time.sleep(1000)\n    raise ValueError('left')",
        "ValueError: left",
    ),
    "forks too many": (
        "for _ in range(100):\n        if os.fork() == 0: time.sleep(1000)\n    time.sleep(1000)",
        "started more than 64 processes|sample_timeout",
    ),
    "leaves a daemon behind": (
        "if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(1000)\n        os._exit(0)\n    raise ValueError('left')",
        "ValueError: left",
    ),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "sample_timeout"),
    "is woken by an alarm": ("signal.alarm(1); time.sleep(1000)", "signal SIGALRM|sample_timeout"),
    "dies of a signal without a name": ("os.kill(os.getpid(), 40)", "was killed by signal 40"),
    "aborts": ("os.abort()", "signal SIGABRT"),
    "kills its zygote": ("os.kill(os.getppid(), 9); time.sleep(1000)", "PermissionError|worker process"),
    "never stops giving": ("return ({'txt': 'x'} for _ in iter(int, 1))", "max_fan_out|max_sample|sample_timeout"),
    "gives slowly and never stops": (
        "return ({'txt': time.sleep(0.3) or 'x'} for _ in iter(int, 1))",
        "took longer than 1.5 s",
    ),
    "gives nothing and never stops": ("return filter(lambda _: time.sleep(0.01), iter(int, 1))", "sample_timeout"),
    "gives too much at once": ("sample['bin'] = bytes(10**8)", "max_sample"),
    "gives too much in parts": ("return ({'bin': bytes(10**6)} for _ in range(1000))", "max_sample"),
    "leaks in a child": (
        "if os.fork() == 0:\n        kept = [b'x' * (1 << 20) for _ in range(450)]; time.sleep(1000)\n    kept = b'x' * (200 << 20); time.sleep(1000)",
        "memory limit|sample_timeout",
    ),
    "leaks shared memory": (
        "kept = mmap.mmap(-1, 600 << 20, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE); time.sleep(1000)",
        "memory limit|sample_timeout",
    ),
    "asks for absurd memory": ("bytearray(1 << 40)", "MemoryError"),
    "writes a huge file": ("open('huge', 'wb').truncate(1 << 40)", "OSError"),
    "changes what it iterates over": ("[sample.pop(name) for name in sample]", "RuntimeError"),
    "breaks the interpreter": (
        "import builtins; builtins.isinstance = builtins.len = None",
        "worker process|TypeError",
    ),
    "exits from a thread": (
        "threading.Thread(target=os._exit, args=(3,)).start(); time.sleep(1000)",
        "exited with status 3",
    ),
    "writes junk to its socket": ("sock().sendall(b'\\xff' * 100); time.sleep(1000)", "broke the protocol"),
    "announces a huge frame": ("sock().sendall(frame(b'{}', head=2**32 - 1)); time.sleep(1000)", "broke the protocol"),
    "sends a list": ("sock().sendall(frame(b'[]')); time.sleep(1000)", "broke the protocol"),
    "sends an unknown message": ('sock().sendall(frame(b\'{"t": "hello"}\')); time.sleep(1000)', "broke the protocol"),
    "answers another batch": (
        'sock().sendall(frame(b\'{"t": "part", "batch": 99, "results": [], "final": true, "seconds": [0,0,0,0]}\')); time.sleep(1000)',
        "broke the protocol",
    ),
    "points outside of its memory": (
        'sock().sendall(frame(b\'{"t": "part", "batch": 1, "results": [[0, "out", [[4096, 1099511627776, 1]], "a", "a", 1, false]], "final": true, "seconds": [0,0,0,0]}\')); time.sleep(1000)',
        "broke the protocol",
    ),
    "sends descriptors": (
        "socket.send_fds(sock(), [b'\\x01'], [0, 1, 2]); time.sleep(1000)",
        "broke the protocol",
    ),
    "asks for room without end": (
        'while True: sock().sendall(frame(b\'{"t": "need", "bytes": 50000000, "fits": false}\'))',
        "broke the protocol|sample_timeout",
    ),
    "asks for no room": (
        'sock().sendall(frame(b\'{"t": "need", "bytes": -5, "fits": false}\')); time.sleep(1000)',
        "broke the protocol",
    ),
    "puts a file over its socket": (
        "os.dup2(os.open('f', os.O_CREAT | os.O_RDWR), sock().detach() - 1)\n    [os.dup2(os.open('f', os.O_RDWR), n) for n in range(3, 20)]; time.sleep(1000)",
        "worker process|sample_timeout",
    ),
}


def source_of(body: str) -> str:
    imports = "import mmap, os, signal, socket, threading, time\n"
    return f"{imports}{SOCKET}\ndef transform(sample):\n    {body}\n    return sample\n"


@pytest.mark.parametrize("what", HOSTILE)
def test_its_request_fails_the_next_is_served_and_nothing_is_left(home: Home, what: str) -> None:
    body, message = HOSTILE[what]
    bad = home.served.register(source_of(body), name="bad")
    answer = home.served.get(bad, "s.tar")
    assert answer.status == 422, answer.body
    error = answer.error
    assert error.code == "transform_failed"
    assert re.search(message, f"{error.message} {error.traceback}"), error
    assert str(home.served.node.data) not in f"{error.message} {error.traceback}"
    assert home.read_good() == home.expected
    wait_until(home.is_idle)


# What it does beside its work, which all the same is done.
ODD = {
    "raises when it is collected": "class Odd:\n        def __del__(self): raise ValueError('late')\n    Odd()",
    "starts threads that sleep": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "starts a thread that works": "sample['__key__'] == '0000' and threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
    "forgets every module": "import sys; sys.modules.clear()",
    "removes its scratch directory": "import shutil; shutil.rmtree(os.environ['HOME'], ignore_errors=True)",
    "goes elsewhere": "os.chdir('/'); os.umask(0o777)",
    "makes a deep tree": "[(os.mkdir('d'), os.chdir('d')) for _ in range(100 if sample['__key__'] == '0000' else 0)]",
    "forbids its files": "os.makedirs(f'{sample[\"__key__\"]}/a'); os.chmod(sample['__key__'], 0)",
    "links out of its scratch": "os.symlink('/', sample['__key__'])",
    "forks sleepers": "[time.sleep(1000) for _ in range(3 if sample['__key__'] < '0003' else 0) if os.fork() == 0]",
    "catches every signal": "[signal.signal(n, lambda *_: None) for n in range(1, 32) if n not in (9, 19)]",
    "prints binary": "os.write(1, bytes(range(256)) * 1000)",
    "closes what it prints to": "import sys; sys.stdout.close(); sys.stderr.close()",
    "sets limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "stops collecting": "import gc; gc.disable()",
    "changes its time zone and locale": "os.environ.clear(); time.tzset()",
}


@pytest.mark.parametrize("what", ODD)
def test_what_it_does_beside_its_work_changes_nothing_and_leaves_nothing(home: Home, what: str) -> None:
    odd = home.served.register(source_of(ODD[what]), name="odd")
    answer = home.served.get(odd, "s.tar")
    assert answer.status == 200, answer.body
    assert answer.body == home.expected
    assert home.read_good() == home.expected
    wait_until(home.is_idle)
    assert Path("/usr").is_dir()


@pytest.mark.parametrize("what", ["forks sleepers", "starts a thread that works"])
def test_what_goes_on_without_its_worker_is_ended_while_that_is_idle(tmp_path: Path, what: str) -> None:
    write_shard(tmp_path / "s.tar", [{"txt": b"x"}] * 4)
    with serve(tmp_path, "--workers", "1", environ={"SHARDMILL_TRANSFORMS_IDLE_WORKERS": "1h"}) as served:
        odd, good = served.register(source_of(ODD[what]), name="odd"), served.register(IDENTITY, name="good")
        assert served.get(good, "s.tar").status == served.get(odd, "s.tar").status == 200
        # The zygote and the worker that did nothing of its own.
        wait_until(lambda: len(live_descendants(served.node.pid)) == 2)
        assert served.get(odd, "s.tar").status == 200


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("while True: pass", "load_timeout"),
        ("import os; os.kill(os.getpid(), 11)", "worker|closed|exit|stopped"),
        ("import sys; sys.exit(0)", "SystemExit"),
        (
            "import os\nfor _ in range(20):\n    if os.fork() == 0:\n        import time; time.sleep(1000)\nraise ValueError('no')",
            "no",
        ),
        ("x = 'a' * (1 << 40)", "MemoryError"),
        ("def transform(sample: (1 / 0)): pass", "ZeroDivisionError"),
        ("import os; os.closerange(0, 100)", "worker|closed"),
        (f"{SOCKET}\nsock().sendall(b'junk' * 100)\nimport time; time.sleep(1000)", "broke the protocol|stopped"),
    ],
)
def test_code_that_does_its_worst_while_it_is_loaded_is_refused(home: Home, source: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        home.served.register(source, name="refused")
    assert caught.value.status == 422
    assert home.read_good() == home.expected
    wait_until(home.is_idle)


def test_no_process_tells_a_function_the_nodes_secrets(home: Home) -> None:
    source = """
        import os

        def transform(sample):
            seen = [dict(os.environ)]
            for name in os.listdir("/proc"):
                for file in ("environ", "mem", "maps", "auxv"):
                    try:
                        seen.append(open(f"/proc/{name}/{file}", "rb").read(1 << 16))
                    except OSError as error:
                        pass
            sample["txt"] = repr(seen)
            return sample
    """
    info = home.served.register(source, name="spy")
    answer = home.served.get(info, "s.tar")
    assert answer.status == 200, answer.body
    assert SECRET.encode() not in answer.body
    assert b"SHARDMILL_TRANSFORMS" not in answer.body


def test_a_killed_node_leaves_no_process(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [{"txt": b"x"}])
    source = "import os, time\ndef transform(sample):\n    os.fork()\n    time.sleep(1000)\n"
    with serve(tmp_path, "--workers", "2") as served:
        info: TransformInfo = served.register(textwrap.dedent(source))
        connection = http.client.HTTPConnection(*served.address)
        connection.request("GET", served.path(info, "s.tar"))
        # Node, zygote, at least one worker, and its child.
        wait_until(lambda: len(live_descendants(served.node.pid)) >= 3)
        pids = live_descendants(served.node.pid)
        served.node.kill()
        connection.close()

        def none_is_left() -> bool:
            return not any(Path(f"/proc/{pid}/cwd").exists() for pid in pids)

        wait_until(none_is_left)
