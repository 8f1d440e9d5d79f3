"""The front answers as aiohttp does: the same bytes to two nodes over the same objects, one of which has no front."""

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardmill.testing.node import running_node
from tests.etl.support import IDENTITY
from tests.server.wire import Answer, Peer, Wire, descriptors, request, wait_for

MODIFIED = 1_700_000_000  # of the files of a directory
DIRECTORY_KEYS = ("a.tar", "good.tar", "sub/b.jpg", "empty", "with space+plus.cls", "zwölf.txt")
MEMBERS = ("000.jpg", "000.cls", "x y", "last.bin")


@dataclass
class Pair:
    """Two nodes that differ in nothing but the front."""

    front: Wire
    other: Wire
    made: str
    """The transform that was read over `good.tar` of both buckets with seed 7."""

    @property
    def wires(self) -> tuple[Wire, Wire]:
        return self.front, self.other


def write_tar(path: Path, members: Sequence[str] = MEMBERS) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, name in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            archive.addfile(info, io.BytesIO(os.urandom(100 * number)))


def write_files(root: Path) -> None:
    for number, key in enumerate(DIRECTORY_KEYS):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if key == "good.tar":
            write_tar(path, [f"{number:03}.bin" for number in range(30)])
        elif key.endswith(".tar"):
            write_tar(path)
        else:
            path.write_bytes(os.urandom(1000 * number) if key != "empty" else b"")
        os.utime(path, (MODIFIED, MODIFIED))
    (root / "link").symlink_to("a.tar")
    os.mkfifo(root / "pipe")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both serve one directory; their pools are copies of one."""
    base = tmp_path_factory.mktemp("pair")
    files = base / "files"
    files.mkdir()
    write_files(files)
    buckets = ["--bucket", f"gs://files=dir:{files}", "--bucket", "ais://pool"]
    flags = [*buckets, "--workers", "2", "--durability", "kill", "--host", "cache.example"]
    with running_node(*flags, data=base / "one") as node:
        wire = Wire(node, ())
        for key, size in (("small", 4096), ("empty", 0), ("large", (1 << 20) + 300_000), ("a.json", 70_000)):
            answer = wire.put(f"/o/ais/pool/{key}", os.urandom(size), f"Shardmill-Meta-of: {key}")
            assert answer.status == 201
        assert wire.put("/o/ais/pool/shard.tar", (files / "a.tar").read_bytes()).status == 201
        assert wire.put("/o/ais/pool/good.tar", (files / "good.tar").read_bytes()).status == 201
        made = wire.register(IDENTITY, "same")
        for bucket in ("ais/pool", "gs/files"):
            path = f"/t/{bucket}/{made},seed=7~good.tar"
            assert wire.get(path).status == 200
            wait_for(lambda path=path: "etag" in wire.ask("HEAD", path).headers, "the result is not kept")  # type: ignore[misc]
        assert node.terminate() == 0
    shutil.copytree(base / "one", base / "two")
    with contextlib.ExitStack() as stack:
        wires = []
        for name, front in (("one", "on"), ("two", "off")):
            environ = {"SHARDMILL_SERVER_FRONT": front}
            node = stack.enter_context(running_node(*flags, data=base / name, environ=environ))
            wires.append(Wire(node, ()))
        yield Pair(wires[0], wires[1], made)


def comparable(answer: Answer) -> tuple[int, list[tuple[str, str]], bytes]:
    """All of an answer but what differs from one to the next, in the order in which it came."""
    request_id = answer.headers.get("shardmill-request-id", "")
    headers = [
        (name, value if name not in ("date", "shardmill-request-id") else str(len(value)))
        for name, value in answer.headers.items()
    ]
    return answer.status, headers, answer.body.replace(request_id.encode() or b"\0", b"ID")


def tell(peer: Peer, data: bytes, *, head: bool) -> list[tuple[int, list[tuple[str, str]], bytes] | str]:
    """Send bytes and a request behind them; all answers, until the connection ends or the last one came."""
    peer.send(data)
    found: list[tuple[int, list[tuple[str, str]], bytes] | str] = []
    try:
        found.append(comparable(peer.read(head=head)))
        peer.send(request("GET", "/healthz"))
        found.append(comparable(peer.read()))
    except (EOFError, ConnectionError):
        found.append("closed")
    return found


def compare(pair: Pair, data: bytes, *, head: bool = False) -> int:
    """The same answers by both; gives the first one's status."""
    told = []
    for wire in pair.wires:
        with wire.connect() as peer:
            told.append(tell(peer, data, head=head))
    assert told[0] == told[1], data
    first = told[0][0]
    return 0 if isinstance(first, str) else first[0]


PATHS = st.sampled_from(
    ["/o/ais/pool/" + key for key in ("small", "empty", "large", "a.json", "shard.tar", "none", "sm%61ll", "n%6Fne")]
    + ["/o/gs/files/" + key for key in ("a.tar", "sub/b.jpg", "empty", "with%20space+plus.cls", "zw%C3%B6lf.txt")]
    + ["/o/gs/files/" + key for key in ("link", "pipe", "sub", "sub/", "sub//b.jpg", "../files/a.tar", "none/x", "%00")]
    + ["/o/ais/nobucket/x", "/o/aws/pool/small", "/o/ais/pool", "/o/ais/pool/", "/o//pool/small", "/o/ais/pool/%zz"]
    + ["/o/ais/pool/%ff", "/o/ais/pool/" + "k" * 1100, "/o/ais/pool/small#x", "/healthz", "/o", "//o/ais/pool/small"]
    + ["/t/ais/pool/" + name for name in ("MADE,seed=7~good.tar", "MADE,seed=7~g%6Fod.tar", "same,seed=7~good.tar")]
    + ["/t/ais/pool/" + name for name in ("MADE,seed=7~none.tar", "MADE,seed=7,epoch=0~good.tar", "MADE~")]
    + ["/t/ais/pool/" + name for name in ("same@000000000000,seed=7~good.tar", "MADE,seed=7,k=0000~good.tar")]
    + ["/t/gs/files/MADE,seed=7~good.tar"] * 3
    + ["/t/gs/files/MADE,seed=07~good.tar", "/t/gs/files/MADE,seed=7~a.tar/", "/t/gs/none/MADE,seed=7~good.tar"]
    + ["http://localhost/o/ais/pool/small", "/o/ais/pool/a b", "*", "/O/ais/pool/small"]
)
QUERIES = st.sampled_from(
    ["", "", "", "?"]
    + ["?member=" + name for name in ("000.jpg", "last.bin", "x%20y", "x+y", "none", "", "%ff", "%zz", "./000.jpg")]
    + ["?member=a&member=b", "?x=1", "?member", "?member=000.jpg&", "?Member=000.jpg", "?member=000.jpg;x=1"]
)
DATES = st.sampled_from([formatdate(at, usegmt=True) for at in (MODIFIED - 1, MODIFIED, MODIFIED + 1)] + ["never", ""])
ETAGS = st.sampled_from(["*", '"x"', 'W/"x"', '"x", "*"', "x", "", '"a", "b"', "THEIRS", "W/THEIRS", '"x", THEIRS'])
RANGES = st.one_of(
    st.builds(lambda first, last: f"bytes={first}-{last}", st.integers(0, 5000), st.integers(0, 5000)),
    st.builds(lambda first: f"bytes={first}-", st.integers(0, 2_000_000)),
    st.builds(lambda count: f"bytes=-{count}", st.integers(0, 2_000_000)),
    st.sampled_from(["bytes=0-0,5-9", "bytes=", "lines=1-2", "bytes=a-b", "bytes = 1-2", "bytes=1-2 ", "Bytes=1-2"]),
)
HOSTS = st.sampled_from(
    ["localhost"] * 12
    + ["127.0.0.1:1", "[::1]", "LOCALHOST.", "cache.example", "evil.example", "a b", "", "localhost:99999"]
)
PLAIN = st.sampled_from(
    """Accept: */*|User-Agent: wds|X-Odd: 1|Accept-Encoding: gzip|accept:text/html|Cookie: a=b|X-Tab: a\tb|TE: trailers
Origin: http://evil.example|Sec-Fetch-Mode: cors|Connection: keep-alive|Connection: close|Connection: te|Upgrade: h2c
Content-Length: 0|Expect: 100-continue|Expect: more|Transfer-Encoding: chunked|Authorization: Bearer x|X-Latin: \xe4
 X-Space: 1|X-Colon : 1|X-Empty:|X-Long: LONG|If-None-Match: *|Range: bytes=1-2|Host: localhost""".replace("\n", "|")
    .replace("LONG", "a" * 3000)
    .split("|")
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bool]:
    """The bytes of a request, and whether it is a HEAD."""
    method = draw(st.sampled_from(["GET"] * 8 + ["HEAD"] * 3 + ["get", "OPTIONS"]))
    version = draw(st.sampled_from(["HTTP/1.1"] * 10 + ["HTTP/1.0", "HTTP/1.2", "http/1.1"]))
    lines = [f"{method} {draw(PATHS)}{draw(QUERIES)} {version}"]
    if draw(st.integers(0, 15)):
        lines.append(f"Host: {draw(HOSTS)}")
    if draw(st.booleans()):
        lines.append(f"Range: {draw(RANGES)}")
    for name, values in (("If-None-Match", ETAGS), ("If-Match", ETAGS), ("If-Range", st.one_of(ETAGS, DATES))):
        if not draw(st.integers(0, 3)):
            lines.append(f"{name}: {draw(values)}")
    for name in ("If-Modified-Since", "If-Unmodified-Since"):
        if not draw(st.integers(0, 4)):
            lines.append(f"{name}: {draw(DATES)}")
    lines += draw(st.lists(PLAIN, max_size=3))
    head = lines[0]
    rest = draw(st.permutations(lines[1:]))
    end = draw(st.sampled_from(["\r\n"] * 20 + ["\n"]))
    # A body that is announced has an end, so that nobody waits for it.
    body = "0\r\n\r\n" if any(line.startswith("Transfer-Encoding") for line in lines) else ""
    return (end.join([head, *rest, "", ""]) + body).encode("latin-1"), method == "HEAD"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=requests())
@example(drawn=(b"GET /o/ais/pool/small HTTP/1.1\r\nHost: localhost\r\n\r\n", False))
@example(drawn=(b"GET /o/ais/pool/large HTTP/1.1\r\nHost: localhost\r\nRange: bytes=10-\r\n\r\n", False))
@example(drawn=(b"GET /t/ais/pool/MADE,seed=7~good.tar HTTP/1.1\r\nHost: localhost\r\n\r\n", False))
@example(drawn=(b"GET /t/gs/files/MADE,seed=7~good.tar HTTP/1.1\r\nHost: localhost\r\nRange: bytes=-99\r\n\r\n", False))
@example(drawn=(b"HEAD /t/gs/files/MADE,seed=7~good.tar HTTP/1.1\r\nHost: localhost\r\n\r\n", True))
@example(
    drawn=(b"GET /t/ais/pool/MADE,seed=7~good.tar HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: THEIRS\r\n\r\n", False)
)
@example(drawn=(b"GET /o/ais/pool/small HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a\r\nUser-Agent: b\r\n\r\n", False))
@example(drawn=(b"HEAD /o/gs/files/a.tar HTTP/1.1\r\nHost: localhost\r\n\r\n", True))
@example(
    drawn=(b"GET /o/gs/files/a.tar?member=last.bin HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: *\r\n\r\n", False)
)
def test_with_and_without_the_front_the_same_bytes_have_the_same_answer(pair: Pair, drawn: tuple[bytes, bool]) -> None:
    data, head = drawn
    data = data.replace(b"MADE", pair.made.encode())
    if b"THEIRS" in data:
        # The tag of the object itself.
        target = data.split(b" ", 2)[1].decode("latin-1")
        with pair.other.connect() as peer:
            peer.send(request("HEAD", target))
            etag = peer.read(head=True).headers.get("etag", '"none"')
        data = data.replace(b"THEIRS", etag.encode())
    # Twice: the second time the front has the object open.
    assert compare(pair, data, head=head) == compare(pair, data, head=head)


def test_a_finished_result_is_kept_open(pair: Pair) -> None:
    """Only the front keeps one; else the fuzzing would compare one way with itself."""
    assert pair.front.get(f"/t/gs/files/{pair.made},seed=7~good.tar").status == 200
    assert any("/results/" in target for target in descriptors(pair.front.node.pid).values())
