"""Stores of clouds as child processes on loopback ports: moto, seaweedfs, azurite, fake-gcs-server, nginx.

Their programs lie in the directory that `tools/emulators` prints. Leaving a context ends the process and what it kept.
"""

import base64
import contextlib
import getpass
import hmac
import http.client
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote, urlsplit

START_SECONDS = 60.0
END_SECONDS = 10.0
PORTS_TRIED = 5

Command = Sequence[str | Path]

ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of azurite, published with it: no secret."""

ACCESS_KEY = "access-key-of-tests", "secret-key-of-tests"
"""Of seaweedfs, started with it."""

_WEED_PARTS = ("master", "volume", "filer", "s3")
_NGINX = """\
daemon off;
user {user};
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        merge_slashes off;
    }}
}}
"""


@dataclass(slots=True)
class Emulator:
    """One that runs."""

    endpoint: str
    directory: Path
    """Its own; for nginx what is below `root` is what it serves."""
    filer: str = ""
    """Of seaweedfs: where its buckets are folders."""
    _buckets: int = field(default=0)

    def next_name(self) -> str:
        """A bucket's name that was not used yet."""
        self._buckets += 1
        return f"bucket{self._buckets}"

    def request(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> bytes:
        """What it answers; raises RuntimeError for other than success."""
        parts = urlsplit(self.endpoint)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body, dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {target}: {answer.status} {text[:500]!r}")
            return text


@contextlib.contextmanager
def moto(programs: Path) -> Iterator[Emulator]:
    """S3, and close enough to Google's XML interface for the library; any key is as good as another."""
    python = programs / "venv/bin/python"
    with _running("moto", lambda port: [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]) as emulator:
        yield emulator


def make_moto_bucket(emulator: Emulator) -> str:
    """Make an empty one; returns its name."""
    name = emulator.next_name()
    emulator.request("PUT", f"/{name}", {"Authorization": "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4"})
    return name


@contextlib.contextmanager
def seaweedfs(programs: Path) -> Iterator[Emulator]:
    """A store with S3's interface, of the key `ACCESS_KEY`; it verifies signatures and keeps objects on the disk."""
    with tempfile.TemporaryDirectory(prefix="shardmill-weed-") as name:
        directory = Path(name)
        credentials = [{"accessKey": ACCESS_KEY[0], "secretKey": ACCESS_KEY[1]}]
        identity = {
            "name": "test",
            "credentials": credentials,
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (directory / "data").mkdir()
        filer, left = "", list[Path]()

        def command(port: str) -> Command:
            nonlocal filer
            places = ("master.port", "volume.port", "filer.port", *(f"{part}.port.grpc" for part in _WEED_PARTS))
            ports = dict(zip(places, _free_ports(len(places)), strict=True))
            filer = f"http://127.0.0.1:{ports['filer.port']}"
            flags = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.port={port}", "-volume.max=400"]
            flags += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false", f"-s3.config={directory / 's3.json'}"]
            # Of ports that it takes unasked two servers could not both have one.
            flags += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
            flags += [f"-{part}.localSocket={directory / part}.sock" for part in ("filer", "s3")]
            flags += [f"-{place}={number}" for place, number in ports.items()]
            # These it makes whatever it is told, and leaves there.
            left.extend(Path(f"/tmp/seaweedfs-{part}-grpc-{ports[f'{part}.port.grpc']}.sock") for part in _WEED_PARTS)
            return [programs / "venv/bin/weed", "server", f"-dir={directory / 'data'}", *flags]

        try:
            with _running("seaweedfs", command) as emulator:
                emulator.filer = filer
                yield emulator
        finally:
            for path in left:
                path.unlink(missing_ok=True)


def make_seaweedfs_bucket(emulator: Emulator) -> str:
    """Make an empty one; returns its name."""
    name = emulator.next_name()
    request = urllib.request.Request(f"{emulator.filer}/buckets/{name}/", method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
    return name


@contextlib.contextmanager
def azurite(programs: Path) -> Iterator[Emulator]:
    """Azure Blob Storage, of the account `ACCOUNT`; it verifies signatures."""
    program = programs / "node_modules/azurite/dist/src/blob/main.js"
    flags = ("--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry")

    def command(port: str) -> Command:
        return ["node", program, "--blobHost", "127.0.0.1", "--blobPort", port, *flags]

    with _running("azurite", command) as emulator:
        emulator.endpoint += f"/{ACCOUNT}"
        yield emulator


def make_azure_container(emulator: Emulator) -> str:
    """Make an empty one; returns its name."""
    name = emulator.next_name()
    date, version = formatdate(usegmt=True), "2023-11-03"
    text = f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), "sha256")).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    emulator.request("PUT", f"/{ACCOUNT}/{name}?restype=container", {**headers, "Content-Length": "0"})
    return name


@contextlib.contextmanager
def fake_gcs(programs: Path) -> Iterator[Emulator]:
    """Google Cloud Storage: its JSON interface, and reading by the XML one."""
    server = program(programs, "fake-gcs-server")

    def command(port: str) -> Command:
        address = f"127.0.0.1:{port}"
        listen = ("-scheme", "http", "-host", "127.0.0.1", "-port", port)
        return [server, *listen, "-backend", "memory", "-external-url", f"http://{address}", "-public-host", address]

    with _running("fake-gcs-server", command) as emulator:
        yield emulator


def make_gcs_bucket(emulator: Emulator) -> str:
    """Make an empty one; returns its name."""
    name = emulator.next_name()
    body = json.dumps({"name": name}).encode()
    emulator.request("POST", "/storage/v1/b?project=p", {"Content-Type": "application/json"}, body)
    return name


def upload_gcs(emulator: Emulator, bucket: str, key: str, data: bytes) -> None:
    """Store an object by the JSON interface, as Google's own clients do."""
    target = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
    emulator.request("POST", target, {"Content-Type": "application/octet-stream"}, data)


@contextlib.contextmanager
def nginx(programs: Path) -> Iterator[Emulator]:
    """A web server over the directory `root` of its own."""
    with tempfile.TemporaryDirectory(prefix="shardmill-nginx-") as name:
        directory = Path(name)
        (directory / "root").mkdir()

        def command(port: str) -> Command:
            text = _NGINX.format(user=getpass.getuser(), directory=directory, root=directory / "root", port=port)
            (directory / "nginx.conf").write_text(text)
            places = ("-p", directory, "-e", directory / "error.log", "-c", directory / "nginx.conf")
            return [program(programs, "nginx"), *places]

        with _running("nginx", command) as emulator:
            emulator.directory = directory
            yield emulator


def program(programs: Path, name: str) -> Path:
    """A program that a wheel brings for this machine."""
    system = f"linux-{'arm64' if platform.machine() == 'aarch64' else 'amd64'}"
    places = (f"**/bin/{name}-{system}", f"**/bin/linux-{platform.machine()}/{name}")
    found = [path for place in places for path in (programs / "venv" / "lib").glob(place)]
    if not found:
        raise RuntimeError(f"no {name} for {system} below {programs}")
    return found[0]


@contextlib.contextmanager
def _running(name: str, command: Callable[[str], Command]) -> Iterator[Emulator]:
    """Run a command that is given a port; another one where somebody else was quicker to take it."""
    with tempfile.TemporaryDirectory(prefix=f"shardmill-{name}-") as kept, tempfile.TemporaryFile() as output:
        for _ in range(PORTS_TRIED):
            port = _free_port()
            process = subprocess.Popen(
                [str(part) for part in command(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=kept,
            )
            try:
                if _wait_listening(process, int(port)):
                    yield Emulator(f"http://127.0.0.1:{port}", Path(kept))
                    return
            finally:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        output.seek(0)
        raise RuntimeError(f"{name} did not start:\n{output.read().decode(errors='replace')[-4000:]}")


def _wait_listening(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether this very process came to listen on the port."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _listener(port) & _sockets(process.pid):
            return True
        time.sleep(0.05)
    return False


def _listener(port: int) -> set[str]:
    """The socket that listens on a loopback port, as its inode."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[1] == f"0100007F:{port:04X}" and row[3] == "0A"}


def _sockets(pid: int) -> set[str]:
    """The sockets of a process, as their inodes."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _free_port() -> str:
    return _free_ports(1)[0]


def _free_ports(count: int) -> list[str]:
    """Different ones."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in found]
