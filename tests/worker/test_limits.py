"""Layers around user code, each tried by a function: what is reported as active is."""

import contextlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardmill.worker.limits import DESCRIPTORS, FILE_SIZE, LAYERS, landlock_version
from tests.etl.support import write_shard
from tests.worker.driving import DrivenWorker, DrivenZygote, described, zygote

MEMORY = 600 << 20

TRY = """
    import json

    def attempt(action):
        try:
            return action()
        except BaseException as error:
            return type(error).__name__

    def transform(sample):
        sample["json"] = {{name: attempt(action) for name, action in actions.items()}}
        return sample

    {setup}
    actions = {{{actions}}}
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrivenZygote]:
    with zygote(tmp_path_factory.mktemp("limits")) as driven:
        driven.preload("numpy")
        yield driven


@pytest.fixture
def worker(started: DrivenZygote) -> Iterator[DrivenWorker]:
    with contextlib.closing(started.fork(memory=MEMORY)) as forked:
        yield forked


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s.tar", [{"txt": b"x"}])


def tried(worker: DrivenWorker, shard: Path, actions: dict[str, str], setup: str = "pass") -> dict[str, Any]:
    """What a function finds: name → value of the expression, or the name of what it raised."""
    lines = ", ".join(f"{name!r}: lambda: {expression}" for name, expression in actions.items())
    loaded = worker.load(TRY.format(setup=setup.replace("\n", "\n    "), actions=lines))
    assert loaded.head["t"] == "loaded", loaded.head
    worker.open(shard)
    results = worker.run(described(shard))
    assert results.outcomes[0][0] == "out", results.outcomes
    data = results.framed
    found: dict[str, Any] = json.loads(data[512 : 512 + int(data[124:135], 8)])
    return found


def test_every_layer_is_reported_and_active_where_the_kernel_has_it(worker: DrivenWorker) -> None:
    reported = dict.fromkeys(LAYERS, False) | worker.layers
    known = {"own_session", "empty_environment", "scratch_directory"}
    version = landlock_version()
    expected = {
        "rlimits": True,
        "parent_death_signal": True,
        "no_new_privileges": True,
        "no_capabilities": True,
        "network": platform.machine() in ("x86_64", "aarch64"),
        "trace_scope": version >= 2,
        "signal_scope": version >= 6,
        "read_only_files": version >= 3,
    }
    assert {name: active for name, active in reported.items() if name not in known} == expected


def test_no_socket_but_unix_ones(worker: DrivenWorker, shard: Path) -> None:
    families = {"inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "vsock": 40, "alg": 38}
    actions = {name: f"socket.socket({number}, 2).close()" for name, number in families.items()}
    actions |= {
        "unix": "[end.close() for end in socket.socketpair()]",
        "child": "subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'], capture_output=True).returncode",
        "name": "socket.getaddrinfo('example.org', 80)",
    }
    found = tried(worker, shard, actions, "import socket, subprocess, sys")
    assert {name: found[name] for name in families} == dict.fromkeys(families, "PermissionError")
    assert found["unix"] == [None, None]
    assert found["child"] == 1
    assert found["name"] == "gaierror"


def test_resources_are_limited_and_cannot_be_raised(worker: DrivenWorker, shard: Path) -> None:
    kinds = {name: getattr(resource, f"RLIMIT_{name}") for name in ("DATA", "FSIZE", "NOFILE", "CORE")}
    actions = {name: f"resource.getrlimit({number})" for name, number in kinds.items()}
    actions |= {
        "memory": f"bytearray({MEMORY})",
        "file": f"os.truncate('large', {FILE_SIZE + 1})",
        "write": f"os.pwrite(os.open('sparse', os.O_RDWR | os.O_CREAT), b'xx', {FILE_SIZE})",
        "descriptors": "[os.dup(0) for _ in range(5000)] and None",
    }
    found = tried(worker, shard, actions, "import os, resource\nopen('large', 'w').close()")
    values = {"DATA": MEMORY, "FSIZE": FILE_SIZE, "NOFILE": DESCRIPTORS, "CORE": 0}
    for name, value in values.items():
        assert found[name] == [value, value]
    assert found["memory"] == "MemoryError"
    assert (found["file"], found["write"], found["descriptors"]) == ("OSError", "OSError", "OSError")


def test_it_stands_alone_with_nothing_of_its_node(worker: DrivenWorker, shard: Path, started: DrivenZygote) -> None:
    actions = {
        "session": "os.getsid(0) == os.getpid() == os.getpgrp()",
        "environment": "sorted(os.environ)",
        "home": "os.path.samefile(os.environ['HOME'], os.getcwd()) and tempfile.gettempdir() == os.environ['HOME']",
        "descriptors": "sorted((int(n), os.readlink(f'/proc/self/fd/{n}').partition(':')[0]) for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}'))",
        "privileges": "ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)",
        "capabilities": "[line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')][:3]",
        "death": "(ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0), number.value)[1]",
        "threads": "len(os.listdir('/proc/self/task'))",
        "hash": "hash('seed')",
    }
    setup = "import ctypes, os, tempfile\nnumber = ctypes.c_int()"
    found = tried(worker, shard, actions, setup)
    assert found["session"] is True
    assert found["home"] is True
    assert found["privileges"] == 1
    assert found["capabilities"] == ["0" * 16] * 3
    assert found["death"] == signal.SIGKILL
    assert found["threads"] == 1
    assert "SECRET" not in " ".join(found["environment"])
    names = [name for _, name in found["descriptors"]]
    assert names[:3] == ["/dev/null"] * 3
    # The arena, the socket, the shard.
    assert sorted(names[3:]) == ["/memfd", str(shard), "socket"]
    with contextlib.closing(started.fork()) as other:
        assert tried(other, shard, actions, setup)["hash"] == found["hash"]


def test_other_processes_are_out_of_reach(worker: DrivenWorker, shard: Path) -> None:
    actions = {
        "signal zygote": "os.kill(os.getppid(), 0)",
        "signal node": f"os.kill({os.getpid()}, 0)",
        "signal by descriptor": f"signal.pidfd_send_signal(os.pidfd_open({os.getpid()}), 0)",
        "environment of zygote": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "environment of node": f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        "memory of node": f"open('/proc/{os.getpid()}/mem', 'rb')",
        "descriptors of node": f"os.readlink('/proc/{os.getpid()}/fd/0')",
        "trace": f"ctypes.CDLL(None, use_errno=True).ptrace(16, {os.getpid()}, 0, 0)",
        "own signal": "os.kill(os.getpid(), 0)",
        "own group": "os.killpg(0, 0)",
        "own child": "child()",
        "own environment": "len(open('/proc/self/environ', 'rb').read()) > 0",
    }
    setup = (
        "import ctypes, os, signal, subprocess\n"
        "def child():\n"
        "    process = subprocess.Popen(['sleep', '100'])\n"
        "    target = os.readlink(f'/proc/{process.pid}/fd/0')\n"
        "    process.kill()\n"
        "    return process.wait() == -9 and target == '/dev/null'\n"
    )
    found = tried(worker, shard, actions, setup)
    foreign = {name: value for name, value in found.items() if not name.startswith("own")}
    signals = {name: foreign.pop(name) for name in list(foreign) if name.startswith("signal")}
    assert signals == dict.fromkeys(signals, "PermissionError" if landlock_version() >= 6 else None)
    if landlock_version() >= 2:
        assert foreign.pop("trace") == -1
        assert foreign == dict.fromkeys(foreign, "PermissionError")
    assert found["own signal"] is found["own group"] is None
    assert found["own child"] is found["own environment"] is True


def test_nothing_outside_the_scratch_directory_can_be_written(
    worker: DrivenWorker, shard: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine"
    file.write_text("mine")
    (tmp_path / "sub").mkdir()
    actions = {
        "write": f"open({str(file)!r}, 'r+').write('x')",
        "append": f"open({str(file)!r}, 'a')",
        "truncate": f"os.truncate({str(file)!r}, 0)",
        "make": f"open({str(tmp_path / 'new')!r}, 'w')",
        "make directory": f"os.mkdir({str(tmp_path / 'new')!r})",
        "make pipe": f"os.mkfifo({str(tmp_path / 'new')!r})",
        "link here": f"os.link({str(file)!r}, 'linked')",
        "link there": f"os.link('own', {str(tmp_path / 'new')!r})",
        "link symbolically": f"os.symlink('own', {str(tmp_path / 'new')!r})",
        "move here": f"os.rename({str(file)!r}, 'moved')",
        "move there": f"os.rename('own', {str(tmp_path / 'new')!r})",
        "replace": f"os.replace('own', {str(file)!r})",
        "remove": f"os.remove({str(file)!r})",
        "remove directory": f"os.rmdir({str(tmp_path / 'sub')!r})",
        "by a child": f"subprocess.run(['touch', {str(file)!r}, {str(tmp_path / 'new')!r}], capture_output=True).returncode",
        "through a link": f"(os.symlink({str(file)!r}, 'sym'), open('sym', 'w'))",
        "in another's scratch": "open(os.path.join(os.pardir, 'new'), 'w')",
        "read": f"open({str(file)!r}).read()",
        "null": "open(os.devnull, 'w').write('x')",
        "temporary": "tempfile.TemporaryFile().write(b'x')",
    }
    found = tried(worker, shard, actions, "import os, subprocess, tempfile\nopen('own', 'w').write('own')")
    assert [found.pop(name) for name in ("read", "null", "temporary")] == ["mine", 1, 1]
    if landlock_version() >= 3:
        assert found.pop("by a child") == 1
        # OSError: linking between directories is EXDEV, at which programs copy, which is refused with EACCES.
        assert {name: value for name, value in found.items() if value not in ("PermissionError", "OSError")} == {}
        assert (file.read_text(), file.stat().st_nlink) == ("mine", 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "s.tar", "sub"]


def test_files_move_freely_inside_the_scratch_directory(worker: DrivenWorker, shard: Path) -> None:
    setup = "import os\nos.makedirs('a')\nos.makedirs('b')\nopen('a/x', 'w').write('x')"
    actions = {
        "rename": "os.rename('a/x', 'b/x')",
        "link": "os.link('b/x', 'a/y')",
        "read": "open('a/y').read()",
        "node": "os.mkfifo('b/f')",
    }
    assert tried(worker, shard, actions, setup) == {"rename": None, "link": None, "read": "x", "node": None}


DOMAIN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from shardmill.worker.limits import enter_domain
os.mkdir("scratch")
found = enter_domain(int(sys.argv[2]), "scratch")
os.makedirs("scratch/a"); os.makedirs("scratch/b"); open("scratch/a/x", "w").close(); os.rename("scratch/a/x", "scratch/b/x")
def allowed(action):
    try:
        action()
        return True
    except PermissionError:
        return False
print([name for name, active in found.items() if active])
print(allowed(lambda: os.kill(os.getppid(), 0)))
print(allowed(lambda: os.readlink(f"/proc/{os.getppid()}/fd/0")))
print(allowed(lambda: open("other", "w").close()))
"""


@pytest.mark.parametrize(
    ("version", "layers", "can"),
    [
        (0, [], (True, True, True)),
        (1, [], (True, True, True)),
        (2, ["trace_scope"], (True, False, True)),
        (3, ["trace_scope", "read_only_files"], (True, False, False)),
        (5, ["trace_scope", "read_only_files"], (True, False, False)),
        (6, ["trace_scope", "signal_scope", "read_only_files"], (False, False, False)),
    ],
)
def test_older_kernels_give_less_and_say_so(
    tmp_path: Path, version: int, layers: list[str], can: tuple[bool, bool, bool]
) -> None:
    source = Path(__file__).parent.parent.parent / "src"
    # Without privileges of its own a process may enter a domain only once it has given up new ones.
    script = f"import ctypes; ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)\n{DOMAIN}"
    command = [sys.executable, "-c", script, str(source), str(version)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(layers), *map(str, can)], done.stderr
