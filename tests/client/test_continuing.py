"""A transformed shard that is cut goes on at its sample with the same bytes, or says why not."""

import io
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardmill.client import Client, TruncatedBody
from shardmill.core.errors import Conflict, TransformFailed
from shardmill.testing.node import RunningNode, running_node
from tests.client.scripted import ThreadedServer, read_request

SHARD = "gs://own/shard.tar"
SAMPLES = 40

FUNCTIONS = """
import random
import time

def draw(sample):
    time.sleep(0.005)
    sample["txt"] = f"{random.random()} " * 3000
    return sample

def fan_out(sample):
    number = int(sample["__key__"])
    if number % 5 == 0:
        return None
    return [{**sample, "txt": f"{random.random()} {index} " * 2000} for index in range(number % 3 + 1)]

def fail_late(sample):
    time.sleep(0.005)
    if sample["__key__"] == "0030":
        raise ValueError("thirty")
    sample["txt"] = "x" * 50_000
    return sample

def fail_sometimes(sample):
    time.sleep(0.005)
    if sample["__key__"] == "0003":
        raise ValueError("three")
    sample["txt"] = f"{random.random()} " * 3000
    return sample
"""


class CuttingProxy(ThreadedServer):
    """Passes connections on to a node and cuts answers of transformed shards after a number of bytes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self.target = (host, int(port))
        self.cuts: list[int] = []
        """Bytes after which the next answers are cut."""
        self.requests: list[bytes] = []
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        request = read_request(connection)
        if not request:
            return
        self.requests.append(request.partition(b"\r\n")[0])
        is_shard = request.startswith(b"GET /t/")
        left = self.cuts.pop(0) if is_shard and self.cuts else None
        with socket.create_connection(self.target) as node:
            node.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            while data := node.recv(65536):
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                connection.sendall(data)
                if left == 0:
                    return


@pytest.fixture(scope="module")
def shard_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    with tarfile.open(directory / "shard.tar", "w") as archive:
        for number in range(SAMPLES):
            member = tarfile.TarInfo(f"{number:04d}.txt")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    (directory / "functions.py").write_text(FUNCTIONS)
    return directory


@pytest.fixture(scope="module")
def own_node(shard_directory: Path) -> Iterator[RunningNode]:
    with running_node("--bucket", f"gs://own=dir:{shard_directory}", "--workers", "2") as node:
        yield node


@pytest.fixture
def proxy(own_node: RunningNode) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(own_node.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def cut_client(proxy: CuttingProxy) -> Iterator[Client]:
    with Client(proxy.endpoint) as client:
        yield client


@pytest.fixture(scope="module")
def spec_of(own_node: RunningNode, shard_directory: Path) -> Iterator[Callable[..., str]]:
    with Client(own_node.endpoint) as client:

        def register(function: str, options: str = "") -> str:
            info = client.transforms.add(f"{shard_directory / 'functions.py'}:{function}", function.replace("_", "-"))
            return info.uuid + options

        yield register


def whole(node: RunningNode, spec: str, seed: int, **options: int) -> bytes:
    with Client(node.endpoint) as client:
        return client.object(SHARD).read(spec, seed=seed, **options)


@pytest.mark.parametrize("function", ["draw", "fan_out"])
@pytest.mark.parametrize("cuts", [[700], [600_000], [1_000_000, 300_000, 50_000], [1_700_000, 513, 10_240, 200_000]])
def test_a_cut_shard_goes_on_with_the_same_bytes(
    own_node: RunningNode,
    proxy: CuttingProxy,
    cut_client: Client,
    spec_of: Callable[..., str],
    function: str,
    cuts: list[int],
) -> None:
    spec = spec_of(function)
    proxy.cuts = list(cuts)
    with cut_client.object(SHARD).get(spec) as reader:
        data = reader.read()
        assert reader.seed is not None
        assert data == whole(own_node, spec, reader.seed)
    assert proxy.cuts == []
    asked = [request for request in proxy.requests if request.startswith(b"GET /t/")]
    assert len(asked) == len(cuts) + 1
    assert all(b"seed=%d" % reader.seed in request for request in asked[1:])
    if cuts == [600_000]:
        # What was there was not made again.
        assert b",start=" in asked[1]


def test_a_part_of_a_shard_goes_on_too(
    own_node: RunningNode, proxy: CuttingProxy, cut_client: Client, spec_of: Callable[..., str]
) -> None:
    spec = spec_of("draw")
    proxy.cuts = [400_000]
    data = cut_client.object(SHARD).read(spec, seed=11, start=5, count=20)
    assert data == whole(own_node, spec, 11, start=5, count=20)
    assert len(tarfile.open(fileobj=io.BytesIO(data)).getnames()) == 20


def test_samples_that_were_left_out_do_not_stop_it(
    own_node: RunningNode, proxy: CuttingProxy, cut_client: Client, spec_of: Callable[..., str]
) -> None:
    spec = spec_of("fail_sometimes", ",errors=skip:0.05")
    proxy.cuts = [700_000]
    data = cut_client.object(SHARD).read(spec, seed=5)
    assert data == whole(own_node, spec, 5)


def test_a_run_that_failed_is_not_tried_again(
    proxy: CuttingProxy, cut_client: Client, spec_of: Callable[..., str]
) -> None:
    with pytest.raises(TransformFailed, match="0030") as caught:
        cut_client.object(SHARD).read(spec_of("fail_late"))
    assert "ValueError: thirty" in (caught.value.traceback or "")
    assert sum(request.startswith(b"GET /t/") for request in proxy.requests) == 1


def test_another_version_of_the_object_is_never_glued_on(tmp_path: Path, shard_directory: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    original = (shard_directory / "shard.tar").read_bytes()
    (own / "shard.tar").write_bytes(original)
    with running_node("--bucket", f"gs://own=dir:{own}", "--workers", "2") as node, Client(node.endpoint) as direct:
        info = direct.transforms.add(f"{shard_directory / 'functions.py'}:draw", "draw")
        proxy = CuttingProxy(node.endpoint)
        try:
            proxy.cuts = [500_000]
            with Client(proxy.endpoint) as client, client.object(SHARD).get(info.uuid) as reader:
                data = reader.read(100_000)
                assert len(data) == 100_000
                replacement = own / "new"
                replacement.write_bytes(original)
                replacement.rename(own / "shard.tar")
                with pytest.raises(Conflict, match="changed while it was being read"):
                    reader.read()
        finally:
            proxy.close()


def test_a_node_that_is_killed_and_started_again_goes_on(tmp_path: Path, shard_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--bucket", f"gs://own=dir:{shard_directory}", "--workers", "2", "--listen", listen)
    data = tmp_path / "data"
    with running_node(*flags, data=data) as node:
        client = Client(node.endpoint)
        info = client.transforms.add(f"{shard_directory / 'functions.py'}:draw", "draw")
        reader = client.object(SHARD).get(info.uuid)
        first = reader.read(150_000)
        node.kill()
    with running_node(*flags, data=data) as node:
        with reader:
            rest = reader.read()
            assert reader.seed is not None
        assert first + rest == whole(node, info.uuid, reader.seed)
        client.close()


def test_a_node_that_stays_away_is_told(shard_directory: Path) -> None:
    with running_node("--bucket", f"gs://own=dir:{shard_directory}", "--workers", "2") as node:
        with Client(node.endpoint) as client:
            info = client.transforms.add(f"{shard_directory / 'functions.py'}:draw", "draw")
            with client.object(SHARD).get(info.uuid) as reader:
                reader.read(100_000)
                node.kill()
                with pytest.raises(TruncatedBody, match="stopped while it was sending"):
                    reader.read()
