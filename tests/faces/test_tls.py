"""The node with a certificate of its own."""

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmill import Client
from shardmill.client import NodeUnreachable
from shardmill.client.connection import Connection, ConnectionEnded
from shardmill.client.framing import framing_of
from shardmill.testing.node import NodeFailed, RunningNode, running_node
from tests.server.wire import descriptors, request, wait_for

SHARD = "imagenet-train-000000.tar"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    directory = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
               "-keyout", "key.pem", "-out", "cert.pem"]  # fmt: skip
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return directory / "cert.pem", directory / "key.pem"


@pytest.fixture(scope="module")
def node(shards: Path, certificate: tuple[Path, Path]) -> Iterator[RunningNode]:
    cert, key = certificate
    buckets = ("--bucket", f"gs://sharded-imagenet=dir:{shards}", "--bucket", "ais://pool")
    with running_node(*buckets, "--tls-cert", cert, "--tls-key", key) as running:
        yield running


@pytest.fixture
def curl(node: RunningNode, certificate: tuple[Path, Path]) -> "Curl":
    return Curl(node, certificate[0])


class Curl:
    def __init__(self, node: RunningNode, authority: Path) -> None:
        self._base = node.endpoint.replace("127.0.0.1", "localhost")
        self._authority = authority

    def __call__(self, path: str, *options: str, data: bytes | None = None) -> bytes:
        command = ["curl", "-sSf", "--noproxy", "*", "--cacert", str(self._authority), *options, self._base + path]
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def test_it_says_https(node: RunningNode) -> None:
    assert node.endpoint.startswith("https://127.0.0.1:")
    assert "shardmill is ready at https://localhost:" in node.output


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_objects_of_every_size_come_over_tls(curl: Curl, shards: Path, version: str) -> None:
    tls = (f"--tlsv{version}", "--tls-max", version)
    assert curl("/healthz", *tls) == b"ok\n"
    for size in (0, 1, 65536, 65537, (1 << 20) + 1, 5_000_000):
        data = bytes(range(256)) * (size // 256 + 1)
        curl(f"/o/ais/pool/{size}", *tls, "-T", "-", data=data[:size])
        assert curl(f"/o/ais/pool/{size}", *tls) == data[:size]
    whole = (shards / SHARD).read_bytes()
    assert curl(f"/o/gs/sharded-imagenet/{SHARD}", *tls) == whole
    assert curl(f"/o/gs/sharded-imagenet/{SHARD}", *tls, "-r", "1000-199999") == whole[1000:200_000]


def test_older_versions_than_1_2_are_refused(node: RunningNode) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(node.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(sock).close()


def test_plain_http_gets_no_answer_and_harms_nobody(node: RunningNode, curl: Curl) -> None:
    port = int(node.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(request("GET", "/healthz"))
        try:
            assert b"HTTP" not in sock.recv(1000)
        except ConnectionError:
            pass
    assert curl("/healthz") == b"ok\n"


def test_a_connection_that_never_shakes_hands_is_cut(shards: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    environ = {"SHARDMILL_SERVER_HEADER_TIMEOUT": "1s"}
    with running_node("--tls-cert", cert, "--tls-key", key, environ=environ) as node:
        port = int(node.endpoint.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            try:
                assert sock.recv(1) == b""
            except ConnectionError:
                pass


def test_a_reader_that_takes_nothing_over_tls_is_cut(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    environ = {"SHARDMILL_SERVER_SEND_TIMEOUT": "1s"}
    with running_node("--bucket", "ais://pool", "--tls-cert", cert, "--tls-key", key, environ=environ) as node:
        curl = Curl(node, cert)
        curl("/o/ais/pool/big", "-T", "-", data=bytes(24 << 20))
        before = len(descriptors(node.pid))
        context = ssl.create_default_context(cafile=str(cert))
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        raw.connect(("127.0.0.1", int(node.endpoint.rpartition(":")[2])))
        with context.wrap_socket(raw, server_hostname="localhost") as sock:
            sock.sendall(request("GET", "/o/ais/pool/big"))
            assert sock.recv(12) == b"HTTP/1.1 200"
            wait_for(lambda: len(descriptors(node.pid)) <= before, "the node has closed what it had open")


@pytest.mark.parametrize(
    ("cert", "key", "status", "said"),
    [
        ("cert.pem", None, 2, "--tls-cert and --tls-key go together"),
        (None, "key.pem", 2, "--tls-cert and --tls-key go together"),
        ("none.pem", "key.pem", 2, "does not exist"),
        ("junk.pem", "key.pem", 1, "do not load"),
        ("cert.pem", "other.pem", 1, "do not load"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_one_line(
    certificate: tuple[Path, Path], cert: str | None, key: str | None, status: int, said: str
) -> None:
    directory = certificate[0].parent
    (directory / "junk.pem").write_text("junk")
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "other.pem"], cwd=directory, check=True)
    flags: list[str | Path] = []
    for flag, name in (("--tls-cert", cert), ("--tls-key", key)):
        flags += [flag, directory / name] if name else []
    with pytest.raises(NodeFailed, match=f"ended with status {status}") as refused, running_node(*flags):
        pass
    assert said in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_the_python_client_trusts_the_authority_that_it_is_told_and_no_other(
    node: RunningNode, certificate: tuple[Path, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = node.endpoint.replace("127.0.0.1", "localhost")
    with Client(endpoint) as client, pytest.raises(NodeUnreachable, match="SSL_CERT_FILE"):
        client.buckets()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    whole = (shards / SHARD).read_bytes()
    (tmp_path / "body").write_bytes(whole)
    with Client(endpoint) as client:
        assert client.object(f"gs://sharded-imagenet/{SHARD}").read() == whole
        with client.object(f"gs://sharded-imagenet/{SHARD}").get() as reader:
            assert reader.read(1000) + reader.read() == whole
        for body in (b"small", whole, tmp_path / "body", iter([whole[:70_000], whole[70_000:]])):
            stored = client.object("ais://pool/put").put(body)
            assert client.object("ais://pool/put").read() == (body if body == b"small" else whole)
            assert stored.checksum == client.object("ais://pool/put").head().checksum
        assert len(client._transport._idle) == 1


@contextlib.contextmanager
def answered(certificate: tuple[Path, Path], *pieces: bytes) -> Iterator[Connection]:
    """A connection over which these come, each by itself."""
    here, there = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def serve() -> None:
        with context.wrap_socket(there, server_side=True) as served:
            for piece in pieces:
                served.sendall(piece)
            served.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    with trusting.wrap_socket(here, server_hostname="localhost") as sock:
        yield Connection(sock, is_plain=False)
    thread.join()


def test_what_is_interrupted_gives_no_bytes_of_the_protocol(certificate: tuple[Path, Path]) -> None:
    body = b"body" * (16 << 10)
    with answered(certificate, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", body) as connection:
        framing = framing_of(connection, connection.read_head(), "GET")
        assert framing is not None
        received = framing.read_some(100)
        connection.interrupt()
        with pytest.raises((ConnectionEnded, OSError)):
            while True:
                received += framing.read_some(1 << 20)
    assert received == body[: len(received)]


@pytest.mark.parametrize("more", [b"", b"more"])
def test_what_was_deciphered_behind_an_answer_is_seen(certificate: tuple[Path, Path], more: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    with answered(certificate, head, b"hello" + more) as connection:
        framing = framing_of(connection, connection.read_head(), "GET")
        assert framing is not None
        assert framing.read_some(100) == b"hello"
        assert framing.done
        assert connection.has_input() == bool(more)
