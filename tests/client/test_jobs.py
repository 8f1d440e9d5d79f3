"""`client.jobs` against a real node."""

import time
from collections.abc import Iterator

import pytest

from shardmill.client import Client, JobFailed
from shardmill.core.errors import BadRequest, NotFound
from shardmill.core.jobs import JobDetails

IMAGENET = "gs://sharded-imagenet"
VAL = [f"imagenet-val-{number:06d}.tar" for number in range(3)]


def thin(sample: dict[str, object]) -> dict[str, object]:
    return {"__key__": sample["__key__"], "cls": sample["cls"]}


def thin_slowly(sample: dict[str, object]) -> dict[str, object]:
    time.sleep(0.1)
    return thin(sample)


def fail(sample: dict[str, object]) -> dict[str, object]:
    raise ValueError("on purpose")


@pytest.fixture
def bucket(client: Client) -> Iterator[str]:
    handle = client.bucket("ais://client-jobs")
    handle.create()
    yield handle.uri
    handle.remove(force=True)


def test_a_job_is_begun_waited_for_and_told_of(client: Client, bucket: str) -> None:
    uuid = client.transforms.add(thin).uuid
    seen: list[JobDetails] = []
    job = client.jobs.transform(client.bucket(IMAGENET), client.bucket(bucket), uuid, names=VAL, seed=4, epoch=2)
    details = client.jobs.wait(job, timeout=60, progress=seen.append)
    assert seen[-1] == details
    assert details.job.request.transform == f"{uuid},seed=4,epoch=2"
    assert client.jobs.get(job.id) == details
    assert details.job in client.jobs.list()
    stored = client.object(f"{bucket}/{VAL[0]}").read()
    assert stored == client.object(f"{IMAGENET}/{VAL[0]}").read(uuid, seed=4, epoch=2)


def test_what_jobs_write_of_themselves_is_no_shard(client: Client, bucket: str) -> None:
    uuid = client.transforms.add(thin).uuid
    job = client.jobs.wait(client.jobs.transform(IMAGENET, bucket, uuid, names=VAL, seed=1), timeout=60).job
    assert job.manifest in [f"{bucket}/{item.key}" for item in client.bucket(bucket).list()]
    assert [url.rpartition("/")[2] for url in client.expand_object_urls(bucket, prefix="")] == VAL
    own = client.bucket("ais://client-jobs-again")
    own.create()
    again = client.jobs.plan(bucket, own, uuid, prefix="")
    own.remove()
    assert [planned.object for planned in again.objects] == VAL


def test_waiting_ends_when_it_should_not_wait_longer(client: Client, bucket: str) -> None:
    uuid = client.transforms.add(thin_slowly).uuid
    job = client.jobs.transform(IMAGENET, bucket, uuid, names=VAL, seed=1)
    with pytest.raises(TimeoutError, match=job.id):
        client.jobs.wait(job, timeout=0.05)
    assert client.jobs.cancel(job).state == "cancelled"


def test_a_job_that_failed_says_so_with_the_users_traceback(client: Client, bucket: str) -> None:
    uuid = client.transforms.add(fail).uuid
    job = client.jobs.transform(IMAGENET, bucket, uuid, names=VAL, seed=1)
    with pytest.raises(JobFailed, match="3 of 3 objects failed") as raised:
        client.jobs.wait(job, timeout=60)
    failure = raised.value.details.objects[0]
    assert failure.object == VAL[0]
    assert 'raise ValueError("on purpose")' in (failure.traceback or "")


def test_wrong_calls_are_told_apart(client: Client, bucket: str) -> None:
    with pytest.raises(BadRequest, match="not one string"):
        client.jobs.transform(IMAGENET, bucket, "thin", names=VAL[0])
    with pytest.raises(BadRequest, match="exactly one"):
        client.jobs.transform(IMAGENET, bucket, client.transforms.add(thin).uuid)
    with pytest.raises(BadRequest, match="no job's id"):
        client.jobs.get("../../etc")
    with pytest.raises(NotFound, match="no job 0000000000000000"):
        client.jobs.cancel("0" * 16)
