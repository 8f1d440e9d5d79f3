"""`cp --transform` and `job` against a real node: what they print, make and return."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.testing.node import RunningNode
from tests.cli.test_commands import IMAGENET, SHARD, Shell, bucket, ok, shell
from tests.server.readers import wait_until

__all__ = ["bucket", "shell"]

FUNCTIONS = """
def thin(sample):
    return {"__key__": sample["__key__"], "cls": sample["cls"]}


def slow(sample):
    import time

    time.sleep(0.05)
    return thin(sample)


def choosy(sample):
    if int(sample["__key__"]) % 2:
        raise ValueError("odd " + sample["__key__"])
    return thin(sample)
"""
NAMES = ("thin", "slow", "choosy")
VAL = [f"imagenet-val-{number:06d}.tar" for number in range(6)]


@pytest.fixture
def uuids(tmp_path: Path, client: Client) -> dict[str, str]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return {name: client.transforms.add(f"{tmp_path / 'mine.py'}:{name}", name).uuid for name in NAMES}


def test_cp_with_a_transform_is_a_job_of_the_node(
    shell: Shell, bucket: str, client: Client, uuids: dict[str, str]
) -> None:
    status, out, err = shell(
        "cp", "-r", f"{IMAGENET}/imagenet-val", f"{bucket}/thin", "--transform", "thin", "--seed", "1"
    )
    assert (status, out) == (0, "")
    assert re.match(
        r"made 6 objects in [0-9.]+ s \([0-9.]+ .*/s\); ais://commands/.shardmill/jobs/[0-9a-f]{16}.json\n", err
    )
    assert [item.key for item in client.bucket(bucket).list("thin/")] == [f"thin/{key}" for key in VAL]
    expected = client.object(f"{IMAGENET}/{VAL[3]}").read(uuids["thin"], seed=1)
    assert client.object(f"{bucket}/thin/{VAL[3]}").read() == expected
    again = shell("cp", "-r", f"{IMAGENET}/imagenet-val", f"{bucket}/thin", "--transform", "thin", "--seed", "1")
    assert "made 0 objects" in again[2]
    assert "6 were done before" in again[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((f"{IMAGENET}/{SHARD}", "BUCKET"), [SHARD]),
        ((f"{IMAGENET}/{SHARD}", "BUCKET/dir/"), [f"dir/{SHARD}"]),
        ((f"{IMAGENET}/{SHARD}", "BUCKET/{odd}.tar"), ["{odd}.tar"]),
        ((IMAGENET + "/imagenet-val-{000000..000001}.tar", "BUCKET/some"), [f"some/{key}" for key in VAL[:2]]),
        (
            (IMAGENET + "/imagenet-val-%06d.tar", "BUCKET/r/", "--rename", "{stem}-{index}{ext}"),
            [f"r/imagenet-val-{number:06d}-{number}.tar" for number in range(6)],
        ),
    ],
)
def test_names_are_those_of_a_copy_or_of_a_template(
    shell: Shell, bucket: str, client: Client, uuids: dict[str, str], arguments: tuple[str, ...], expected: list[str]
) -> None:
    words = [argument.replace("BUCKET", bucket) for argument in arguments]
    ok(shell("cp", *words, "--transform", uuids["thin"], "--seed", "1"))
    found = [item.key for item in client.bucket(bucket).list() if not item.key.startswith(".shardmill/")]
    assert found == expected


def test_a_dry_run_shows_what_would_be_made(shell: Shell, bucket: str, client: Client, uuids: dict[str, str]) -> None:
    words = ("cp", "-r", f"{IMAGENET}/imagenet-val", f"{bucket}/x/", "--transform", "thin", "--seed", "1", "--dry-run")
    status, out, err = shell(*words)
    assert (status, out.splitlines()) == (0, [f"{key} -> x/{key}" for key in VAL])
    assert "would make 6 of 6 objects" in err
    plan = json.loads(ok(shell(*words, "--json")))
    assert (plan["total"], plan["done"], plan["spec"]) == (6, 0, f"{uuids['thin']},seed=1")
    assert list(client.bucket(bucket).list()) == []


def test_a_job_is_left_listed_shown_awaited_and_cancelled(
    shell: Shell, bucket: str, client: Client, uuids: dict[str, str]
) -> None:
    words = ("cp", "-r", f"{IMAGENET}/imagenet-val", bucket, "--transform", "slow", "--seed", "1", "--detach")
    job = ok(shell(*words)).strip()
    assert re.fullmatch("[0-9a-f]{16}", job)
    assert json.loads(ok(shell(*words, "--json")))["id"] == job
    row = next(line for line in ok(shell("job", "ls")).splitlines() if line.startswith(job))
    assert f"{IMAGENET} -> {bucket}" in row
    assert job in [json.loads(line)["id"] for line in ok(shell("job", "ls", "--json")).splitlines()]
    wait_until(lambda: bool(client.jobs.get(job).running), "nothing is in work")
    shown = ok(shell("job", "show", job))
    assert re.search(r"^state: +running$", shown, re.MULTILINE)
    assert re.search(rf"^working: +{VAL[0][:-5]}", shown, re.MULTILINE)
    assert json.loads(ok(shell("job", "show", job, "--json")))["job"]["id"] == job
    status, _, err = shell("job", "wait", job, "--timeout", "0.1")
    assert status == 1
    assert f"job {job} is running after 0.1 s" in err
    status, _, err = shell("job", "cancel", job)
    assert status == 0
    assert f"job {job} is cancelled; " in err
    status, _, err = shell("job", "wait", job)
    assert status == 1
    assert "cancelled" in err
    ok(shell(*words[:-1]))
    assert json.loads(ok(shell("job", "wait", job, "--json")))["job"]["done"] == 6


def test_failures_are_said_with_status_1_and_left_out_samples_listed(
    shell: Shell, bucket: str, uuids: dict[str, str]
) -> None:
    words = ("cp", "-r", f"{IMAGENET}/imagenet-val", bucket, "--seed", "1", "--transform")
    status, out, err = shell(*words, "choosy")
    assert (status, out) == (1, "")
    assert "6 of 6 objects failed" in err
    assert err.count("failed: imagenet-val-") == 6
    assert err.count("Traceback") == 1
    assert "the same command goes on with it" in err
    status, _, err = shell(*words, f"{uuids['choosy']},errors=skip:1")
    assert status == 0
    job = re.search(r"samples were left out \(shardmill job show ([0-9a-f]{16})\)", err)
    assert job is not None
    shown = ok(shell("job", "show", job[1]))
    assert re.search(r"^left out: imagenet-val-000000.tar: sample '\d+': ValueError: odd", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (
            ("cp", f"{IMAGENET}/absent.tar", "ais://pool/", "--transform", "thin", "--seed", "1"),
            1,
            "absent.tar does not",
        ),
        (("cp", f"{IMAGENET}/{SHARD}", IMAGENET, "--transform", "thin", "--seed", "1"), 1, "read-only"),
        (("cp", f"{IMAGENET}", "ais://pool", "--transform", "thin"), 2, "give -r for all"),
        (("cp", f"{IMAGENET}/{SHARD}", "ais://pool/x", "--transform", "thin", "--rename", "{key}"), 2, "--rename"),
        (("cp", f"{IMAGENET}/{SHARD}", "ais://pool/x", "--dry-run"), 2, "--dry-run is of jobs"),
        (("cp", f"{IMAGENET}/{SHARD}", "ais://pool/", "--transform", "thin", "--rename", "{no}"), 2, "{stem}"),
        (("job", "show", "nothing"), 2, "no job's id"),
        (("job", "wait", "0" * 16), 1, "no job 0000000000000000"),
    ],
)
def test_wrong_calls_are_said(
    shell: Shell, uuids: dict[str, str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    found, _, err = shell(*arguments)
    assert (found, said in err) == (status, True), err


def test_a_terminal_gets_a_bar_with_objects_rate_and_time_left(
    node: RunningNode, bucket: str, uuids: dict[str, str]
) -> None:
    outer, inner = pty.openpty()
    command = [str(Path(sys.executable).with_name("shardmill")), "cp", "-r", f"{IMAGENET}/imagenet-val", bucket]
    process = subprocess.Popen(
        [*command, "--transform", uuids["slow"], "--seed", "5"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=inner,
        env={**os.environ, "SHARDMILL_ENDPOINT": node.endpoint, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(inner)
    shown = bytearray()
    try:
        while True:
            try:
                shown += os.read(outer, 65536)
            except OSError:  # its last process has closed the terminal
                break
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        os.close(outer)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"running \d/6", text)
    assert re.search(r"[0-9.]+ [KM]iB/s +\d+:\d\d left", text)
    assert "made 6 objects" in text
