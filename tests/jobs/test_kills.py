"""A job over ten shards on a node that is killed five times while it works."""

import hashlib
import random
from pathlib import Path

import pytest

from shardmill.client import Client
from shardmill.core.jobs import JobDetails, JobEntry, JobInfo
from shardmill.jobs.records import Records
from shardmill.testing.node import RunningNode, running_node
from tests.jobs.support import SOURCE, digests, inline, shrink_slowly, wait_for

KILLS = 5


def entries_on_disk(node: RunningNode, job: JobInfo) -> dict[str, JobEntry]:
    return Records(node.data / "jobs").read(job.id).entries


@pytest.mark.parametrize("into", ["ais://into", "gs://into"])
def test_nothing_is_done_twice_but_what_was_in_work(shards: Path, tmp_path: Path, into: str) -> None:
    chance = random.Random(into)
    (tmp_path / "into").mkdir()
    buckets = [f"{SOURCE}=dir:{shards}", "ais://into", f"gs://into=dir-rw:{tmp_path / 'into'}"]
    flags = [word for bucket in buckets for word in ("--bucket", bucket)]
    # Kept results would hide that an object is done again.
    flags += ["--workers", "2", "--results", "off"]
    moments = sorted(chance.uniform(0.02, 0.9) for _ in range(KILLS))
    done: dict[str, JobEntry] = {}
    spec, job = "", None
    for number, moment in enumerate([*moments, 2.0]):
        with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as client:
            if job is None:
                spec = f"{client.transforms.add(shrink_slowly).uuid},seed=11"
            else:
                known = client.jobs.get(job.id).job
                assert known.state != "done"
            if job is None or number % 2:
                # Asked for again or not, what was at work goes on.
                asked = client.jobs.transform(SOURCE, into, spec, prefix="imagenet-")
                assert job is None or asked.id == job.id
                job = asked
            assert job is not None

            def is_far_enough(details: JobDetails, moment: float = moment) -> bool:
                return details.job.has_ended or details.job.bytes_done > moment * max(1, details.job.bytes)

            wait_for(client, job.id, is_far_enough, "the job does not go on")
            ended = client.jobs.get(job.id).job
            if number < KILLS:
                assert not ended.has_ended, ended.error
                client.close()
                node.kill()
                found = entries_on_disk(node, job)
                assert {key: found[key] for key in done} == done, (
                    "what was done before is done still, and was not again"
                )
                done = found
                continue
            assert (ended.state, ended.error) == ("done", None)
            assert (ended.total, ended.done, ended.found) == (10, 10, len(done))
            manifest = client.jobs.manifest(job)
            assert (manifest.state, manifest.total, manifest.failures) == ("done", 10, [])
            assert [entry.object for entry in manifest.entries] == sorted(path.name for path in shards.glob("*.tar"))
            assert {entry.object: entry for entry in manifest.entries if entry.object in done} == done
            stored = digests(client, into)
            assert stored == {entry.target: inline(client, SOURCE, entry.object, spec) for entry in manifest.entries}
            for entry in manifest.entries:
                meta = client.object(f"{into}/{entry.target}").head()
                # It was written once: its time is that of its record.
                assert abs(meta.modified - entry.made) < 5
                assert (meta.etag, meta.size) == (entry.etag, entry.bytes)
    assert not [path for path in (tmp_path / "into").iterdir() if path.name.startswith(".shardmill-")]


def test_a_node_that_is_stopped_goes_on_when_it_is_started(shards: Path, tmp_path: Path) -> None:
    flags = ("--bucket", f"{SOURCE}=dir:{shards}", "--bucket", "ais://into", "--workers", "2")
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        spec = f"{client.transforms.add(shrink_slowly).uuid},seed=11"
        job = client.jobs.transform(SOURCE, "ais://into", spec, prefix="imagenet-val")
        wait_for(client, job.id, lambda details: details.job.done > 0, "nothing is done")
        client.close()
        assert node.terminate() == 0
        done = len(entries_on_disk(node, job))
        assert 0 < done < 6
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        ended = client.jobs.wait(job.id, timeout=60).job
        assert (ended.done, ended.found) == (6, done)
        assert ended.created == job.created


def test_a_job_whose_source_is_gone_when_it_goes_on_ends_with_the_reason(shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted(shards.glob("*.tar"))[:4]:
        (source / path.name).write_bytes(path.read_bytes())
    names = sorted(path.name for path in source.iterdir())
    flags = ("--bucket", f"gs://source=dir:{source}", "--bucket", "ais://into", "--workers", "1")
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        spec = f"{client.transforms.add(shrink_slowly).uuid},seed=1"
        job = client.jobs.transform("gs://source", "ais://into", spec, names=names)
        client.close()
        node.kill()
    (source / names[3]).unlink()
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as client:
        wait_for(client, job.id, lambda details: details.job.has_ended, "it does not end")
        ended = client.jobs.get(job.id).job
        assert (ended.state, ended.error) == ("failed", f"{names[3]} does not exist in gs://source; nothing was begun")
        (source / names[3]).write_bytes((shards / names[3]).read_bytes())
        again = client.jobs.transform("gs://source", "ais://into", spec, names=names)
        assert client.jobs.wait(again, timeout=60).job.done == 4
        assert hashlib.sha256(client.object(f"ais://into/{names[3]}").read()).hexdigest() == inline(
            client, "gs://source", names[3], spec
        )
