"""A node as a process: how it starts, why it refuses to, and how it ends."""

import io
import os
import resource
import signal
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from shardmill.client import Client
from shardmill.core.api import ConfigInfo
from shardmill.core.jobs import JobRequest
from shardmill.testing.node import NodeFailed, running_node
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.server.wire import Peer, Unfinished, Wire, request, wait_for

# Far more than sockets and a run's window hold, so that the run goes on exactly as its reader does.
SOURCE = """
def transform(sample):
    sample["blob"] = sample["__key__"].encode() * 200_000
    return sample
"""
SHARD = "imagenet-train-000000.tar"
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def serving(shards: Path, *flags: str | Path, python: str | Path = sys.executable) -> Iterator[Wire]:
    buckets = ("--bucket", f"gs://sharded-imagenet=dir:{shards}", "--bucket", "ais://pool")
    with running_node(*buckets, "--workers", "1", *flags, python=python) as node:
        yield Wire(node, (str(shards),))


@contextmanager
def reading_slowly(wire: Wire) -> Iterator[tuple[Peer, bytes]]:
    """A peer in the middle of a transformed shard, and what it has got so far."""
    uuid = wire.register(SOURCE, "slow")
    with wire.connect(receive_buffer=64 << 10) as peer:
        peer.send(request("GET", f"/t/gs/sharded-imagenet/{uuid}~{SHARD}"))
        assert peer.read_head()[0] == 200
        yield peer, peer.read_some()


def descendants(pid: int) -> list[int]:
    """Processes below one, all the way down."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_draining(wire: Wire) -> None:
    wait_for(lambda: wire.get("/readyz").status == 503, "the node drains")


def test_the_first_lines_say_where_it_is_and_what_to_try(wire: Wire, shards: Path) -> None:
    lines = wire.node.output.splitlines()
    port = wire.node.endpoint.rpartition(":")[2]
    assert lines[0] == f"shardmill is ready at http://localhost:{port}"
    assert "  ais://pool  (pool)" in lines
    assert f"  gs://sharded-imagenet  ({shards}, read-only)" in lines
    assert f"try: shardmill --endpoint http://localhost:{port} ls ais://pool" in lines


def test_the_first_lines_say_which_store_is_behind_a_remote_bucket() -> None:
    with running_node("--bucket", "ht://pictures=https://data.example.org/pictures") as node:
        assert "  ht://pictures  (https://data.example.org/pictures, read-only)" in node.output.splitlines()


def test_the_layers_of_isolation_are_known_before_the_first_worker(shards: Path) -> None:
    with serving(shards) as wire:
        before = msgspec.json.decode(wire.get("/api/config").body, type=ConfigInfo).isolation
        missing = ", ".join(name for name, is_active in before.items() if not is_active)
        assert (
            f"  isolation of transforms: all layers but {missing}; see shardmill doctor"
            in wire.node.output.splitlines()
        )
        uuid = wire.register(SOURCE, "slow")
        assert wire.get(f"/t/gs/sharded-imagenet/{uuid},count=1~{SHARD}").status == 200
        assert msgspec.json.decode(wire.get("/api/config").body, type=ConfigInfo).isolation == before
        assert before["own_session"]


def test_a_port_in_use_names_the_way_out(wire: Wire) -> None:
    port = wire.node.endpoint.rpartition(":")[2]
    with pytest.raises(NodeFailed, match="ended with status 1") as refused, running_node(listen=f"127.0.0.1:{port}"):
        pass
    said = str(refused.value)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; take another port" in said
    assert "--listen 127.0.0.1:PORT" in said
    assert "Traceback" not in said


def test_a_second_node_on_the_same_data_names_the_first(wire: Wire) -> None:
    with pytest.raises(NodeFailed, match="ended with status 1") as refused, running_node(data=wire.node.data):
        pass
    said = str(refused.value)
    assert f"is used by the node with pid {wire.node.pid}" in said
    assert "--data" in said
    assert "Traceback" not in said
    assert wire.get("/healthz").status == 200


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"])
def test_another_address_than_loopback_is_refused_without_its_flag(listen: str) -> None:
    with pytest.raises(NodeFailed, match="ended with status 2") as refused, running_node(listen=listen):
        pass
    assert "--insecure-no-auth" in str(refused.value)


def test_an_address_that_is_not_this_machines_is_one_line() -> None:
    with pytest.raises(NodeFailed, match="ended with status 1") as refused:
        with running_node("--insecure-no-auth", listen="192.0.2.1:0"):
            pass
    assert "cannot listen on 192.0.2.1:0: " in str(refused.value)
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_node_finishes_what_it_answers_and_begins_no_run(shards: Path, ending: signal.Signals) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(serving(shards, "--drain", "10m"))
        peer, got = stack.enter_context(reading_slowly(wire))
        idle = stack.enter_context(wire.connect())
        idle.send(request("GET", "/healthz"))
        assert idle.read().status == 200
        below = descendants(wire.node.pid)
        assert below
        wire.node.process.send_signal(ending)
        wait_draining(wire)
        refused = wire.get(f"/t/gs/sharded-imagenet/slow~{SHARD}")
        assert (refused.status, refused.code) == (503, "busy")
        assert int(refused.headers["retry-after"]) > 0
        assert wire.get("/readyz").code == "busy"
        job = JobRequest("transform", "gs://sharded-imagenet", names=[SHARD], destination="ais://x", transform="slow")
        assert wire.post_json("/api/jobs", job).code == "busy"
        assert wire.get("/healthz").status == 200
        assert wire.get(f"/o/gs/sharded-imagenet/{SHARD}").status == 200
        peer.unread(got)
        with tarfile.open(fileobj=io.BytesIO(peer.read_chunks(200))) as made, tarfile.open(shards / SHARD) as source:
            blobs = [member.name for member in made if member.name.endswith(".blob")]
            assert len(blobs) == len({member.name.partition(".")[0] for member in source if member.isfile()})
        assert wire.node.wait() == 0
        wait_for(lambda: not any(map(is_alive, below)), "its processes are gone")
        assert "Traceback" not in wire.node.output


def cut_stream(peer: Peer, got: bytes) -> bytes:
    """What comes until the cut."""
    peer.unread(got)
    with pytest.raises(Unfinished) as cut:
        peer.read_chunks(200)
    return cut.value.got


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_takes_longer_than_the_drain_is_cut_where_no_reader_takes_it_for_whole(
    shards: Path, ending: signal.Signals
) -> None:
    with serving(shards, "--drain", "200ms") as wire, reading_slowly(wire) as (peer, got):
        with wire.connect(receive_buffer=16 << 10) as plain:
            plain.send(request("GET", f"/o/gs/sharded-imagenet/{SHARD}") * 4)
            plain.read_head()
            wire.node.process.send_signal(ending)
            assert wire.node.wait() == 0
        stream = cut_stream(peer, got)
        assert not tarfile_is_content(stream)
        assert not gnu_tar_is_content(stream)
        assert "were not done and are cut" in wire.node.output
        assert "Traceback" not in wire.node.output


def test_a_second_signal_does_not_wait_for_readers(shards: Path) -> None:
    with serving(shards, "--drain", "10m") as wire, reading_slowly(wire) as (peer, got):
        wire.node.process.send_signal(signal.SIGINT)
        wait_draining(wire)
        wire.node.process.send_signal(signal.SIGINT)
        assert wire.node.wait() == 0
        stream = cut_stream(peer, got)
        assert not tarfile_is_content(stream)
        assert not gnu_tar_is_content(stream)


def test_ctrl_c_reaches_the_whole_group_and_breaks_no_run(shards: Path, tmp_path: Path) -> None:
    """A terminal sends it to the node's children, too."""
    python = script(
        tmp_path,
        'exec "{python}" -c "import os, sys; os.setsid(); os.execv(sys.executable, sys.argv[1:])" "{python}" "$@"',
    )
    with serving(shards, "--drain", "10m", python=python) as wire, reading_slowly(wire) as (peer, got):
        assert os.getpgid(wire.node.pid) == wire.node.pid
        os.killpg(wire.node.pid, signal.SIGINT)
        wait_draining(wire)
        peer.unread(got)
        with tarfile.open(fileobj=io.BytesIO(peer.read_chunks(200))) as made:
            assert made.getnames()
        assert wire.node.wait() == 0


def test_nohup_keeps_its_meaning(shards: Path, tmp_path: Path) -> None:
    python = script(tmp_path, 'trap \'\' HUP\nexec "{python}" "$@"')
    with serving(shards, python=python) as wire:
        wire.node.process.send_signal(signal.SIGHUP)
        assert wire.get("/readyz").status == 200
        wire.node.process.send_signal(signal.SIGTERM)
        assert wire.node.wait() == 0


def script(directory: Path, text: str) -> Path:
    """A shell script in place of an interpreter."""
    path = directory / "python"
    path.write_text("#!/bin/sh\n" + text.format(python=sys.executable) + "\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_put_is_there_after_a_restart(tmp_path: Path, ending: signal.Signals) -> None:
    data = tmp_path / "data"
    bodies = {f"/o/ais/pool/{number}": os.urandom(number * 1000) for number in range(50)}
    with running_node("--bucket", "ais://pool", data=data) as node:
        wire = Wire(node, ())
        assert [wire.put(path, body).status for path, body in bodies.items()] == [201] * 50
        node.process.send_signal(ending)
        node.wait()
    with running_node("--bucket", "ais://pool", data=data) as node:
        wire = Wire(node, ())
        assert {path: wire.get(path).body for path in bodies} == bodies


def test_ipv6_loopback_can_be_listened_on(shards: Path) -> None:
    with running_node("--bucket", f"gs://sharded-imagenet=dir:{shards}", listen="[::1]:0") as node:
        assert node.endpoint.startswith("http://[::1]:")
        with Client(node.endpoint) as client:
            assert client.object(f"gs://sharded-imagenet/{SHARD}").read() == (shards / SHARD).read_bytes()


def test_it_takes_as_many_descriptors_as_it_may(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 300), hard))
    try:
        with running_node("--bucket", "ais://pool", data=tmp_path / "data") as node:
            limits = Path(f"/proc/{node.pid}/limits").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == [str(hard)] * 2
