"""Buckets transformed into others by a real node: the bytes, the choice of objects, the names, the manifest, failures."""

import hashlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardmill.client import Client, JobFailed
from shardmill.core.errors import (
    BadRequest,
    BucketNotFound,
    BucketReadOnly,
    Conflict,
    NotFound,
    ObjectNotFound,
    TransformNotFound,
)
from shardmill.core.jobs import JobInfo
from shardmill.testing.node import RunningNode, running_node
from tests.jobs.support import (
    SOURCE,
    VAL,
    digests,
    fail_always,
    inline,
    reverse,
    shrink,
    shrink_slowly,
    shrink_some,
    tar_of,
    wait_for,
)
from tests.server.readers import metric, open_files, wait_until
from tests.storage.full_disk import write_limit


@pytest.fixture
def spec(client: Client) -> str:
    return f"{client.transforms.add(shrink).uuid},seed=7"


def run(client: Client, destination: str, spec: str, *, source: str = SOURCE, **selection: Any) -> JobInfo:
    """Begin a job, by default over the validation shards, and wait for its good end."""
    chosen = selection if {"prefix", "names", "template"} & set(selection) else {"prefix": "imagenet-val", **selection}
    return client.jobs.wait(client.jobs.transform(source, destination, spec, **chosen), timeout=60).job


@pytest.mark.parametrize("into", ["ais://destination", "gs://stored"])
def test_what_is_stored_are_the_bytes_of_the_urls(client: Client, destination: str, into: str, spec: str) -> None:
    job = run(client, into, spec)
    client.transforms.remove_results(everything=True)
    assert digests(client, into, "imagenet-") == {key: inline(client, SOURCE, key, spec) for key in VAL}
    assert (job.state, job.total, job.done, job.found, job.failed, job.error) == ("done", 6, 6, 0, 0, None)
    assert job.bytes == job.bytes_done == sum(client.object(f"{SOURCE}/{key}").head().size for key in VAL)
    assert job.rate > 0


def test_the_manifest_says_what_was_made_of_what(client: Client, destination: str, spec: str) -> None:
    job = run(client, destination, spec)
    assert job.manifest == f"{destination}/.shardmill/jobs/{job.id}.json"
    manifest = client.jobs.manifest(job)
    assert (manifest.format, manifest.job, manifest.kind, manifest.state) == (1, job.id, "transform", "done")
    assert (manifest.source, manifest.destination, manifest.spec) == (SOURCE, destination, spec)
    assert (manifest.total, manifest.failures) == (6, [])
    assert [entry.object for entry in manifest.entries] == VAL
    for entry in manifest.entries:
        stored = client.object(f"{destination}/{entry.target}").head()
        source = client.object(f"{SOURCE}/{entry.object}").head()
        assert (entry.bytes, entry.etag, entry.checksum) == (stored.size, stored.etag, stored.checksum)
        assert (entry.size, entry.seed, entry.failures) == (source.size, 7, 0)
        assert entry.samples == client.count_samples([f"{SOURCE}/{entry.object}"])[0]
    assert sum(entry.bytes for entry in manifest.entries) == job.bytes_out
    assert sum(entry.samples or 0 for entry in manifest.entries) == job.samples


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"template": "imagenet-val-{000001..000003}.tar"}, VAL[1:4]),
        ({"template": "imagenet-val-%06d.tar"}, VAL),
        ({"template": "imagenet-val-00000@1.tar"}, VAL[:2]),
        ({"prefix": "imagenet-val-000004"}, VAL[4:5]),
        ({"names": [VAL[5], VAL[0]]}, [VAL[5], VAL[0]]),
    ],
)
def test_objects_are_chosen_as_for_urls(
    client: Client, destination: str, spec: str, selection: dict[str, Any], expected: list[str]
) -> None:
    job = run(client, destination, spec, **selection)
    assert [entry.object for entry in client.jobs.manifest(job).entries] == expected


def test_new_names_are_made_by_a_template(client: Client, destination: str, spec: str) -> None:
    run(client, destination, spec, rename="small/{stem}-{index:03d}{ext}")
    expected = [f"small/imagenet-val-{number:06d}-{number:03d}.tar" for number in range(6)]
    assert list(digests(client, destination)) == expected


def test_a_plan_says_what_would_be_done_and_does_nothing(client: Client, destination: str, spec: str) -> None:
    plan = client.jobs.plan(SOURCE, destination, spec, prefix="imagenet-val", rename="a/{name}")
    assert [(each.object, each.target, each.done) for each in plan.objects] == [(key, f"a/{key}", False) for key in VAL]
    assert (plan.total, plan.done, plan.spec) == (6, 0, spec)
    assert list(client.bucket(destination).list()) == []
    with pytest.raises(NotFound, match=plan.id):
        client.jobs.get(plan.id)
    job = client.jobs.transform(SOURCE, destination, spec, names=VAL[:2])
    client.jobs.wait(job, timeout=60)
    again = client.jobs.plan(SOURCE, destination, spec, names=VAL[:2])
    assert (again.id, again.done, again.manifest) == (job.id, 2, job.manifest)


def test_asking_again_is_the_same_job_and_makes_only_what_is_not_there(
    client: Client, destination: str, spec: str
) -> None:
    first = run(client, destination, spec)
    times = {item.key: item.modified for item in client.bucket(destination).list("imagenet")}
    again = run(client, destination, spec)
    assert (again.id, again.created) == (first.id, first.created)
    assert (again.done, again.found) == (6, 6)
    client.object(f"{destination}/{VAL[1]}").delete()
    client.object(f"{destination}/{VAL[2]}").put(b"somebody else's")
    third = run(client, destination, spec)
    assert (third.done, third.found) == (6, 4)
    changed = {item.key for item in client.bucket(destination).list("imagenet") if item.modified != times[item.key]}
    assert changed == {VAL[1], VAL[2]}
    client.transforms.remove_results(everything=True)
    assert digests(client, destination) == {key: inline(client, SOURCE, key, spec) for key in VAL}


def test_a_source_that_changed_or_came_later_is_made(client: Client, destination: str) -> None:
    own = client.bucket("ais://changing")
    own.create()
    try:
        spec = f"{client.transforms.add('tests/jobs/text.py:loud', 'loud').uuid},seed=1"
        for name in ("a", "b"):
            own.object(f"{name}.tar").put(tar_of({name: b"quiet"}))
        run(client, destination, spec, source=own.uri, prefix="")
        own.object("b.tar").put(tar_of({"b": b"other"}))
        own.object("c.tar").put(tar_of({"c": b"new"}))
        job = run(client, destination, spec, source=own.uri, prefix="")
        assert (job.total, job.done, job.found) == (3, 3, 1)
        assert b"OTHER" in client.object(f"{destination}/b.tar").read()
        assert b"NEW" in client.object(f"{destination}/c.tar").read()
    finally:
        own.remove(force=True)


def test_a_job_that_goes_on_is_joined_not_begun_twice(client: Client, destination: str) -> None:
    spec = f"{client.transforms.add(shrink_slowly).uuid},seed=1"
    first = client.jobs.transform(SOURCE, destination, spec, prefix="imagenet-val")
    second = client.jobs.transform(SOURCE, destination, spec, prefix="imagenet-val")
    assert second.id == first.id
    assert not second.has_ended
    job = client.jobs.wait(first, timeout=60).job
    assert job.found == 0
    assert metric(client, "shardmill_jobs", state="running") == 0


def test_without_a_seed_the_one_that_was_drawn_is_written_down(client: Client, destination: str, spec: str) -> None:
    bare = spec.partition(",")[0]
    job = run(client, destination, bare, names=VAL[:2])
    for entry in client.jobs.manifest(job).entries:
        assert entry.seed is not None
        stored = hashlib.sha256(client.object(f"{destination}/{entry.target}").read()).hexdigest()
        assert inline(client, SOURCE, entry.object, f"{bare},seed={entry.seed}") == stored
    assert run(client, destination, bare, names=VAL[:2]).found == 2


def test_a_bare_name_is_its_newest_version_at_the_time(client: Client, destination: str, spec: str) -> None:
    job = client.jobs.transform(SOURCE, destination, "shrink,seed=7", names=VAL[:1])
    assert job.request.transform == spec
    client.jobs.wait(job, timeout=60)


def test_whole_objects_are_transformed_too(client: Client, destination: str) -> None:
    uuid = client.transforms.add(reverse, kind="bytes").uuid
    job = run(client, destination, f"{uuid},seed=1", names=VAL)
    assert job.done == 6
    for key in VAL:
        assert client.object(f"{destination}/{key}").read() == client.object(f"{SOURCE}/{key}").read()[::-1]


def test_samples_that_are_left_out_are_listed(client: Client, destination: str) -> None:
    """Also where the result was there before the job."""
    spec = f"{client.transforms.add(shrink_some).uuid},seed=1,errors=skip:1"
    client.object(f"{SOURCE}/{VAL[0]}").read(spec)
    expected = {}
    for key in VAL[:2]:
        with client.object(f"{SOURCE}/{key}").get() as reader:
            names = [key for key in _sample_keys(reader.read()) if int(key) % 5 == 3]
        expected[key] = sorted(names)
    assert sum(map(len, expected.values())) > 2
    job = run(client, destination, spec, names=VAL[:2])
    assert job.failures == sum(map(len, expected.values()))
    details = client.jobs.get(job)
    found: dict[str, list[str]] = {}
    for failed in details.samples:
        found.setdefault(failed.object, []).append(failed.sample)
        assert f"unlucky {failed.sample}" in failed.message
    assert {key: sorted(names) for key, names in found.items()} == expected
    for entry in client.jobs.manifest(job).entries:
        assert sorted(failed.sample for failed in entry.failed) == expected[entry.object]
        assert entry.failures == len(expected[entry.object])


def _sample_keys(tar: bytes) -> list[str]:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return list(dict.fromkeys(name.partition(".")[0] for name in archive.getnames() if "." in name))


def test_an_object_that_fails_is_listed_and_the_others_are_made(client: Client, destination: str) -> None:
    own = client.bucket("ais://broken")
    own.create()
    try:
        spec = f"{client.transforms.add('tests/jobs/text.py:loud', 'loud').uuid},seed=1"
        good = tar_of({"a": b"quiet", "b": b"quiet"})
        for name in ("1.tar", "3.tar"):
            own.object(name).put(good)
        own.object("2.tar").put(tar_of({"a": b"quiet", "b": b"silence"}))
        own.object("4.tar").put(good[:1000])
        job = client.jobs.transform(own, destination, spec, prefix="")
        with pytest.raises(JobFailed, match="2 of 4 objects failed") as raised:
            client.jobs.wait(job, timeout=60)
        details = raised.value.details
        assert (details.job.state, details.job.done, details.job.failed) == ("failed", 2, 2)
        by_name = {failure.object: failure for failure in details.objects}
        assert by_name["2.tar"].code == "transform_failed"
        assert by_name["2.tar"].sample == "b"
        assert "silence is golden" in (by_name["2.tar"].traceback or "")
        assert by_name["4.tar"].code == "bad_shard"
        assert list(digests(client, destination)) == ["1.tar", "3.tar"]
        manifest = client.jobs.manifest(job)
        assert (manifest.state, len(manifest.entries)) == ("failed", 2)
        assert {failure.object for failure in manifest.failures} == {"2.tar", "4.tar"}
        for name in ("2.tar", "4.tar"):
            own.object(name).put(good)
        mended = run(client, destination, spec, source=own.uri, prefix="")
        assert (mended.id, mended.done, mended.found) == (job.id, 4, 2)
        assert client.jobs.get(job).objects == []
    finally:
        own.remove(force=True)


def test_a_function_that_always_fails_ends_the_job_early(client: Client, destination: str) -> None:
    own = client.bucket("ais://many")
    own.create()
    try:
        for number in range(20):
            own.object(f"{number:02d}.tar").put(tar_of({"a": b"x"}))
        uuid = client.transforms.add(fail_always).uuid
        job = client.jobs.transform(own, destination, f"{uuid},seed=1", prefix="")
        with pytest.raises(JobFailed, match="the first 8 objects all failed") as raised:
            client.jobs.wait(job, timeout=60)
        assert 8 <= raised.value.details.job.failed <= 9
    finally:
        own.remove(force=True)


def test_what_cannot_be_done_is_refused_before_anything_is_begun(
    client: Client, destination: str, stored: Path, spec: str
) -> None:
    def ask(source: str = SOURCE, into: str = destination, of: str = spec, **selection: Any) -> None:
        client.jobs.transform(source, into, of, **(selection or {"names": VAL}))

    before = len(client.jobs.list())
    with pytest.raises(ObjectNotFound, match=r"absent.tar does not exist in gs://sharded-imagenet; nothing was begun"):
        ask(names=[*VAL, "absent.tar"])
    with pytest.raises(ObjectNotFound, match=r"imagenet-val-000006.tar, imagenet-val-000007.tar do not exist"):
        ask(template="imagenet-val-{000000..000007}.tar")
    with pytest.raises(ObjectNotFound, match="starts with 'absent'"):
        ask(prefix="absent")
    with pytest.raises(BucketReadOnly, match="gs://sharded-imagenet"):
        ask(into=SOURCE)
    with pytest.raises(BucketNotFound, match="ais://nobodys"):
        ask(into="ais://nobodys")
    with pytest.raises(BucketNotFound, match="gs://nobodys"):
        ask(source="gs://nobodys")
    with pytest.raises(TransformNotFound):
        ask(of="nobodys,seed=1")
    with pytest.raises(BadRequest, match="exactly one of template, prefix and names"):
        ask(names=VAL, prefix="")
    with pytest.raises(BadRequest, match="twice"):
        ask(names=[VAL[0], VAL[0]])
    with pytest.raises(BadRequest, match="empty list"):
        ask(names=[])
    with pytest.raises(BadRequest, match=r"makes 'same.tar' of both"):
        ask(names=VAL, rename="same.tar")
    with pytest.raises(BadRequest, match="manifests of jobs"):
        ask(names=VAL, rename=".shardmill/jobs/{name}")
    with pytest.raises(BadRequest, match="no samples; leave out count"):
        ask(of=f"{client.transforms.add(reverse, kind='bytes').uuid},seed=1,count=3", names=VAL)
    assert len(client.jobs.list()) == before
    assert list(client.bucket(destination).list()) == []


def test_a_job_never_writes_over_its_sources(client: Client, shards: Path, tmp_path: Path) -> None:
    """Neither under the bucket's own name nor under another one of the same directory."""
    directory = tmp_path / "both"
    directory.mkdir()
    (directory / VAL[0]).write_bytes((shards / VAL[0]).read_bytes())
    buckets = [f"gs://one=dir:{directory}", f"gs://two=dir-rw:{directory}", f"gs://all=dir:{tmp_path}"]
    flags = [word for bucket in buckets for word in ("--bucket", bucket)]
    with running_node(*flags, "--workers", "1") as node, Client(node.endpoint) as own:
        spec = f"{own.transforms.add(shrink).uuid},seed=7"
        with pytest.raises(Conflict, match=r"gs://two/imagenet-val-000000.tar, which is one of its sources"):
            own.jobs.transform("gs://two", "gs://two", spec, names=VAL[:1])
        with pytest.raises(Conflict, match="one of its sources when it is asked for again"):
            own.jobs.transform("gs://two", "gs://two", spec, prefix="", rename="small/{key}")
        with pytest.raises(Conflict, match=r"imagenet-val-000007.tar, which would be one of its sources"):
            own.jobs.transform(
                "gs://two", "gs://two", spec, template="imagenet-val-%06d.tar", rename="imagenet-val-000007.tar"
            )
        with pytest.raises(Conflict, match=r"gs://two/imagenet-val-000000.tar, which is one of its sources"):
            own.jobs.transform("gs://one", "gs://two", spec, names=VAL[:1])
        with pytest.raises(Conflict, match="one of its sources when it is asked for again"):
            own.jobs.transform("gs://one", "gs://two", spec, prefix="", rename="small/{key}")
        with pytest.raises(Conflict, match=r"gs://two/imagenet-val-000000.tar is the same file as gs://all/both/image"):
            own.jobs.transform("gs://all", "gs://two", spec, names=[f"both/{VAL[0]}"], rename="{name}")
        assert (directory / VAL[0]).read_bytes() == (shards / VAL[0]).read_bytes()
        job = own.jobs.transform("gs://two", "gs://two", spec, names=VAL[:1], rename="small/{key}")
        own.jobs.wait(job, timeout=60)
        assert (directory / "small" / VAL[0]).exists()


def test_a_full_disk_ends_the_job_and_with_room_it_goes_on(client: Client, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    flags = (
        "--bucket",
        f"{SOURCE}=dir:{shards}",
        "--bucket",
        f"gs://into=dir-rw:{tmp_path / 'into'}",
        "--workers",
        "2",
    )
    with write_limit(20 << 20):
        with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as own:
            spec = f"{own.transforms.add('tests/jobs/text.py:grow', 'grow').uuid},seed=1"
            job = own.jobs.transform(SOURCE, "gs://into", spec, names=VAL)
            with pytest.raises(JobFailed, match="the disk is full") as raised:
                own.jobs.wait(job, timeout=60)
            assert raised.value.details.objects[0].code == "insufficient_storage"
            assert raised.value.details.job.failed <= 2
            assert digests(own, "gs://into") == {}
    with running_node(*flags, data=tmp_path / "data") as node, Client(node.endpoint) as own:
        assert run(own, "gs://into", spec, names=VAL).id == job.id
        assert len(digests(own, "gs://into")) == 6


def test_a_cancelled_job_leaves_whole_objects_and_can_go_on(client: Client, destination: str) -> None:
    spec = f"{client.transforms.add(shrink_slowly).uuid},seed=2"
    job = client.jobs.transform(SOURCE, destination, spec, prefix="imagenet-val")
    wait_for(client, job.id, lambda details: details.job.done > 0, "no object is done")
    cancelled = client.jobs.cancel(job)
    assert cancelled.state == "cancelled"
    assert 0 < cancelled.done < 6
    assert client.jobs.cancel(job.id).state == "cancelled", "once is enough"
    manifest = client.jobs.manifest(job)
    assert (manifest.state, len(manifest.entries)) == ("cancelled", cancelled.done)
    stored = digests(client, destination)
    # One more may have been stored in the moment before it would have been written down.
    assert {entry.target for entry in manifest.entries} <= set(stored)
    assert stored == {key: inline(client, SOURCE, key, spec) for key in stored}
    with pytest.raises(JobFailed, match="is cancelled"):
        client.jobs.wait(job, timeout=60)
    done = run(client, destination, spec)
    assert (done.id, done.done, done.found) == (job.id, 6, cancelled.done)


def test_another_node_goes_on_from_the_manifest(client: Client, stored: Path, shards: Path, spec: str) -> None:
    first = client.jobs.transform(SOURCE, "gs://stored", spec, names=VAL[:3], rename="moved/{key}")
    client.jobs.wait(first, timeout=60)
    buckets = ("--bucket", f"{SOURCE}=dir:{shards}", "--bucket", f"gs://stored=dir-rw:{stored}")
    with running_node(*buckets, "--workers", "1") as other, Client(other.endpoint) as own:
        own.transforms.add(shrink)
        (stored / "moved" / VAL[1]).unlink()
        job = run(own, "gs://stored", spec, names=VAL[:3], rename="moved/{key}")
        assert (job.id, job.done, job.found) == (first.id, 3, 2)


@pytest.mark.parametrize("bad", [b"", b"{", b'{"format": 1}', b'{"format": 99}'])
def test_a_manifest_that_is_none_costs_the_work_again_and_nothing_else(
    client: Client, destination: str, shards: Path, spec: str, bad: bytes
) -> None:
    plan = client.jobs.plan(SOURCE, destination, spec, names=VAL[:1])
    assert plan.manifest is not None
    client.object(plan.manifest).put(bad)
    assert run(client, destination, spec, names=VAL[:1]).done == 1
    assert client.jobs.manifest(plan.id).state == "done"


def test_one_job_after_the_other_where_so_many_may_be_at_work(shards: Path) -> None:
    environ = {"SHARDMILL_JOBS_AT_ONCE": "1", "SHARDMILL_JOBS_SHARDS": "1"}
    flags = ("--bucket", f"{SOURCE}=dir:{shards}", "--bucket", "ais://into", "--workers", "2")
    with running_node(*flags, environ=environ) as node, Client(node.endpoint) as client:
        spec = f"{client.transforms.add(shrink_slowly).uuid},seed=1"
        jobs = [
            client.jobs.transform(SOURCE, "ais://into", spec, names=VAL[:2], rename=f"{number}/{{key}}")
            for number in range(2)
        ]
        assert client.jobs.get(jobs[1]).job.state == "waiting"
        assert len(client.jobs.get(jobs[0]).running) <= 1
        assert client.jobs.cancel(jobs[1]).state == "cancelled"
        assert client.jobs.wait(jobs[0], timeout=60).job.done == 2
        assert list(digests(client, "ais://into")) == [f"0/{key}" for key in VAL[:2]]


def test_a_node_that_has_too_many_runs_is_waited_for(shards: Path) -> None:
    flags = ("--bucket", f"{SOURCE}=dir:{shards}", "--bucket", "ais://into", "--workers", "2")
    with running_node(*flags, environ={"SHARDMILL_TRANSFORMS_MAX_RUNS": "1"}) as node, Client(node.endpoint) as client:
        spec = f"{client.transforms.add(shrink).uuid},seed=1"
        job = client.jobs.transform(SOURCE, "ais://into", spec, names=VAL[:3])
        details = client.jobs.wait(job, timeout=60)
        assert (details.job.done, details.objects) == (3, [])
        client.close()
        assert "is tried again in" in node.output


def test_readers_are_served_before_jobs(client: Client, destination: str) -> None:
    slow = client.transforms.add(shrink_slowly).uuid
    job = client.jobs.transform(SOURCE, destination, f"{slow},seed=5", prefix="imagenet-")
    wait_for(client, job.id, lambda details: details.job.samples > 0 or details.job.bytes_done > 0, "it does not begin")
    before = client.jobs.get(job).job
    client.object(f"{SOURCE}/{VAL[0]}").read(f"{slow},seed=6")
    after = client.jobs.get(job).job
    client.jobs.cancel(job)
    # A reader that had to share would have let the job do as much as itself; two batches a worker were on their way.
    read = client.object(f"{SOURCE}/{VAL[0]}").head().size
    assert after.bytes_done - before.bytes_done < read


def test_metrics_count_what_jobs_did(client: Client, destination: str, spec: str) -> None:
    def count(outcome: str) -> float:
        return metric(client, "shardmill_job_objects_total", kind="transform", outcome=outcome)

    made, found, size = count("made"), count("found"), metric(client, "shardmill_job_bytes_total", kind="transform")
    ended = metric(client, "shardmill_jobs", state="done")
    job = run(client, destination, spec, names=VAL[:3], rename="metrics/{key}")
    run(client, destination, spec, names=VAL[:3], rename="metrics/{key}")
    assert (count("made") - made, count("found") - found) == (3, 3)
    assert metric(client, "shardmill_job_bytes_total", kind="transform") - size == job.bytes_out
    assert metric(client, "shardmill_jobs", state="done") - ended == 1


def test_nothing_is_left_open_by_jobs_of_any_end(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    buckets = [f"{SOURCE}=dir:{shards}", "ais://pool", f"gs://into=dir-rw:{tmp_path / 'into'}"]
    flags = [word for bucket in buckets for word in ("--bucket", bucket)]
    with running_node(*flags, "--workers", "2", data=tmp_path / "data") as node, Client(node.endpoint) as own:
        spec = f"{own.transforms.add(shrink).uuid},seed=1"
        slow = f"{own.transforms.add(shrink_slowly).uuid},seed=1"
        failing = f"{own.transforms.add(shrink_some).uuid},seed=1"
        run(own, "ais://pool", spec)
        own.transforms.remove_results(everything=True)

        def held() -> list[str]:
            """Of shards, results and uploads; what idle workers share with the node comes and goes."""
            return [target for target in open_files(node.pid) if target.startswith((str(tmp_path), str(shards)))]

        before = held()
        for into in ("ais://pool", "gs://into"):
            run(own, into, spec, rename="more/{key}")
            job = own.jobs.transform(SOURCE, into, slow, prefix="imagenet-", rename="slow/{key}")
            wait_for(own, job.id, lambda details: details.job.bytes_done > 0, "it does not begin")
            own.jobs.cancel(job)
            with pytest.raises(JobFailed):
                own.jobs.wait(own.jobs.transform(SOURCE, into, failing, prefix="imagenet-val", rename="bad/{key}"))
        own.transforms.remove_results(everything=True)
        wait_until(lambda: held() == before, "files are left open")
        assert list((node.data / "results" / "tmp").iterdir()) == []
        assert list((node.data / "pool").glob("*/tmp/*")) == []
        assert [path.name for path in (tmp_path / "into").iterdir() if path.name.startswith(".shardmill-")] == []


def test_many_names_are_not_told_again_and_again(client: Client, destination: str) -> None:
    own = client.bucket("ais://named")
    own.create()
    try:
        names = [f"{number:03d}.tar" for number in range(120)]
        for name in names:
            own.object(name).put(tar_of({"a": b"x"}))
        uuid = client.transforms.add("tests/jobs/text.py:loud", "loud").uuid
        job = run(client, destination, f"{uuid},seed=1", source=own.uri, names=names)
        assert (job.total, job.done, job.request.names) == (120, 120, names[:100])
        assert [entry.object for entry in client.jobs.manifest(job).entries] == names
    finally:
        own.remove(force=True)


def test_jobs_are_listed_the_newest_first(client: Client, destination: str, node: RunningNode, spec: str) -> None:
    first = run(client, destination, spec, names=VAL[:1], rename="one/{key}")
    second = run(client, destination, spec, names=VAL[:1], rename="two/{key}")
    assert [job.id for job in client.jobs.list()][:2] == [second.id, first.id]
    assert client.jobs.list()[0] == client.jobs.get(second).job
    assert msgspec.json.encode(client.jobs.get(second).running) == b"[]"
    assert second.created <= (second.started or 0) <= (second.ended or 0) <= time.time()
