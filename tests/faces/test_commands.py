"""curl and wget as clients: their own idea of HTTP, not that of the tests."""

import http.client
import os
import subprocess
from pathlib import Path

from tests.server.test_objects import MIB, large, pattern
from tests.server.test_transformed import RAISE_LATE, path_of
from tests.server.wire import Wire

__all__ = ["large"]


def test_wget_and_curl_and_http_client_read_the_same(wire: Wire, large: tuple[str, bytes], tmp_path: Path) -> None:
    path, data = large
    url = wire.node.endpoint + path
    run = subprocess.run
    run(["curl", "-sSf", "-o", "curl", url], cwd=tmp_path, check=True)
    run(["wget", "-q", "--no-proxy", "-O", "wget", url], cwd=tmp_path, check=True)
    assert (tmp_path / "curl").read_bytes() == (tmp_path / "wget").read_bytes() == data
    # Both go on where an earlier try was cut.
    for name in ("curl", "wget"):
        os.truncate(tmp_path / name, 1_000_000)
    run(["curl", "-sSf", "-C", "-", "-o", "curl", url], cwd=tmp_path, check=True)
    run(["wget", "-q", "--no-proxy", "-c", "-O", "wget", url], cwd=tmp_path, check=True)
    assert (tmp_path / "curl").read_bytes() == (tmp_path / "wget").read_bytes() == data
    part = run(["curl", "-sSf", "-r", "10-19", url], check=True, capture_output=True)
    assert part.stdout == data[10:20]
    several = run(
        ["curl", "-sS", "-w", "%{http_code}", "-r", "0-1,5-6", "-o", "several", url],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert several.stdout == b"200"
    assert (tmp_path / "several").read_bytes() == data
    connection = http.client.HTTPConnection("127.0.0.1", int(url.split(":")[2].split("/")[0]))
    for _ in range(3):
        connection.request("GET", path)
        assert connection.getresponse().read() == data
    connection.close()


def test_curl_puts_files_and_streams(wire: Wire, tmp_path: Path) -> None:
    data = pattern(3 * MIB)
    (tmp_path / "file").write_bytes(data)
    url = f"{wire.node.endpoint}/o/ais/pool/curled"
    code = ["curl", "-sS", "-w", "%{http_code}"]
    # A large file makes curl wait for 100 Continue.
    first = subprocess.run([*code, "-T", "file", url], cwd=tmp_path, check=True, capture_output=True)
    assert first.stdout == b"201"
    second = subprocess.run([*code, "-T", "-", url], input=data[::-1], cwd=tmp_path, check=True, capture_output=True)
    assert second.stdout == b"200"
    assert wire.get("/o/ais/pool/curled").body == data[::-1]
    refused = subprocess.run(
        [*code, "-T", "file", f"{wire.node.endpoint}/o/gs/sharded-imagenet/x"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert refused.stdout.endswith(b"403")
    assert b"bucket_read_only" in refused.stdout


def test_curl_and_gnu_tar_see_a_cut_answer_for_what_it_is(wire: Wire) -> None:
    uuid = wire.register(RAISE_LATE, "raise-late")
    url = wire.node.endpoint + path_of(uuid)
    curl = subprocess.run(["curl", "-sS", "-o", "/dev/null", url], capture_output=True, check=False)
    assert curl.returncode == 18  # "partial file"
    pipe = subprocess.run(
        ["bash", "-c", f"curl -s '{url}' | tar -tf - > /dev/null; echo ${{PIPESTATUS[@]}}"],
        capture_output=True,
        check=True,
    )
    statuses = pipe.stdout.split()
    assert statuses[0] == b"18"
    assert statuses[1] != b"0"
