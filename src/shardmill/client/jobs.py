"""Offline jobs of a node: whole buckets transformed into others, on the node, whoever stays to watch."""

import builtins
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from shardmill.client.handles import BucketHandle, ObjectHandle
from shardmill.client.http import Transport
from shardmill.core.errors import BadRequest
from shardmill.core.jobs import JobDetails, JobInfo, JobKind, JobPlan, JobRequest, Jobs, Manifest, check_job_id
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.specs import Spec

WAIT_SECONDS = 10.0  # that the node holds an answer back for
WATCH_SECONDS = 0.5  # between two looks where somebody wants to know how it goes

BucketName = str | Bucket | BucketHandle

Answer = TypeVar("Answer", JobInfo, JobPlan)


class JobFailed(RuntimeError):
    """A job that was waited for did not end well; `details` has what failed."""

    def __init__(self, details: JobDetails) -> None:
        job = details.job
        super().__init__(f"job {job.id} is {job.state}: {job.error}")
        self.details = details


class JobsHandle:
    """The jobs of a node; `client.jobs`.

    A job is known by what it is to do: asked for again it is the same job, which goes on where it stopped.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def transform(
        self,
        source: BucketName,
        destination: BucketName,
        transform_id: str,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
        rename: str = "{key}",
        seed: int | None = None,
        epoch: int | None = None,
    ) -> JobInfo:
        """Have the node transform objects of one bucket into another; returns when it has begun.

        What is stored are the bytes of the transformed URLs. An object that is there already, made of the same, is left
        alone.

        Args:
            source: Bucket to read, `provider://name`.
            destination: Bucket to write.
            transform_id: A spec, as `WDTransform.uuid`.
            template: As in `expand_object_urls`; exactly one of template, names and prefix says which objects.
            names: Keys, taken literally.
            prefix: All objects below it.
            rename: Keys of what is stored: `{key}`, or e.g. `small/{path}`, `{dirs}{stem}-256{ext}`,
                `shard-{index:06d}.tar`.
            seed: As in `object_url`.
            epoch: As in `object_url`.

        Raises:
            ObjectNotFound: A source is missing, or nothing fits.
            BucketReadOnly, Conflict: The destination cannot be written, or is a source.
            BadRequest: (A ValueError.) What is asked for makes no sense.
        """
        return self._post(
            "/api/jobs",
            _request(source, destination, transform_id, template, names, prefix, rename, seed, epoch),
            JobInfo,
        )

    def plan(
        self,
        source: BucketName,
        destination: BucketName,
        transform_id: str,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
        rename: str = "{key}",
        seed: int | None = None,
        epoch: int | None = None,
    ) -> JobPlan:
        """What `transform` would do with the same arguments; nothing is begun."""
        return self._post(
            "/api/jobs/plan",
            _request(source, destination, transform_id, template, names, prefix, rename, seed, epoch),
            JobPlan,
        )

    def prefetch(
        self,
        source: BucketName,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
        rate: int | None = None,
    ) -> JobInfo:
        """Have the node fetch objects of a bucket with a store behind it to its disk; returns when it has begun.

        Args:
            source: Bucket, `provider://name`.
            template: As in `expand_object_urls`; exactly one of template, names and prefix says which objects.
            names: Keys, taken literally.
            prefix: All objects below it.
            rate: Bytes a second that are fetched at most.

        Raises:
            ObjectNotFound: One that is named is missing, or nothing fits.
            BadRequest: (A ValueError.) There is no store behind the bucket.
        """
        return self._post("/api/jobs", _caching("prefetch", source, template, names, prefix, rate), JobInfo)

    def evict(
        self,
        source: BucketName,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
    ) -> JobInfo:
        """Have the node remove objects of a bucket with a store behind it from its disk, pinned ones, too.

        The store keeps them; who is reading one goes on. What is named and not on the disk is passed over.
        """
        return self._post("/api/jobs", _caching("evict", source, template, names, prefix, None), JobInfo)

    def plan_prefetch(
        self,
        source: BucketName,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
    ) -> JobPlan:
        """What `prefetch` would do with the same arguments; nothing is begun. `left` are the bytes it would fetch."""
        return self._post("/api/jobs/plan", _caching("prefetch", source, template, names, prefix, None), JobPlan)

    def plan_evict(
        self,
        source: BucketName,
        *,
        template: str | None = None,
        names: Sequence[str] | None = None,
        prefix: str | None = None,
    ) -> JobPlan:
        """What `evict` would do with the same arguments; nothing is begun. `left` are the bytes it would give back."""
        return self._post("/api/jobs/plan", _caching("evict", source, template, names, prefix, None), JobPlan)

    def list(self) -> builtins.list[JobInfo]:
        """All jobs that the node knows, the newest first."""
        with self._transport.request("GET", "/api/jobs") as answer:
            return msgspec.json.decode(answer.read_all(), type=Jobs).jobs

    def get(self, job: str | JobInfo) -> JobDetails:
        """How a job stands, with what is in work and what failed."""
        return self._get(job, None)

    def wait(
        self,
        job: str | JobInfo,
        *,
        timeout: float | None = None,
        progress: Callable[[JobDetails], None] | None = None,
    ) -> JobDetails:
        """Wait for the end of a job.

        Args:
            job: Its id, or what was returned.
            timeout: Seconds.
            progress: Told about twice a second how it stands.

        Raises:
            JobFailed: It ended, but not well.
            TimeoutError: It has not ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        step = WATCH_SECONDS if progress is not None else WAIT_SECONDS
        while True:
            left = step if deadline is None else min(step, max(0.0, deadline - time.monotonic()))
            details = self._get(job, left)
            if progress is not None:
                progress(details)
            if details.job.state == "done":
                return details
            if details.job.has_ended:
                raise JobFailed(details)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {details.job.id} is {details.job.state} after {timeout:g} s")

    def cancel(self, job: str | JobInfo) -> JobInfo:
        """End a job; what it has done stays. One that has ended stays as it is."""
        with self._transport.request("DELETE", _path(job)) as answer:
            return msgspec.json.decode(answer.read_all(), type=JobInfo)

    def manifest(self, job: str | JobInfo) -> Manifest:
        """What a job has come to, as it stands in its destination."""
        info = job if isinstance(job, JobInfo) else self.get(job).job
        if info.manifest is None:
            raise BadRequest(f"a job of kind {info.request.kind} has no manifest")
        handle = ObjectHandle(self._transport, ObjectRef.parse(info.manifest))
        return msgspec.json.decode(handle.read(), type=Manifest)

    def _get(self, job: str | JobInfo, wait: float | None) -> JobDetails:
        query = None if wait is None else {"wait": f"{wait:.3f}"}
        with self._transport.request("GET", _path(job), query=query) as answer:
            return msgspec.json.decode(answer.read_all(), type=JobDetails)

    def _post(self, path: str, request: JobRequest, kind: type[Answer]) -> Answer:
        headers = {"Content-Type": "application/json"}
        body = msgspec.json.encode(request)
        with self._transport.request("POST", path, headers=headers, body=body) as answer:
            return msgspec.json.decode(answer.read_all(), type=kind)


def _request(
    source: BucketName,
    destination: BucketName,
    transform_id: str,
    template: str | None,
    names: Sequence[str] | None,
    prefix: str | None,
    rename: str,
    seed: int | None,
    epoch: int | None,
) -> JobRequest:
    if isinstance(names, str):
        raise BadRequest("names is a sequence of keys, not one string; for a pattern use template")
    return JobRequest(
        kind="transform",
        source=_bucket_uri(source),
        destination=_bucket_uri(destination),
        transform=str(Spec.parse(transform_id).with_options(seed=seed, epoch=epoch)),
        template=template,
        names=None if names is None else list(names),
        prefix=prefix,
        rename=rename,
    )


def _caching(
    kind: JobKind,
    source: BucketName,
    template: str | None,
    names: Sequence[str] | None,
    prefix: str | None,
    rate: int | None,
) -> JobRequest:
    if isinstance(names, str):
        raise BadRequest("names is a sequence of keys, not one string; for a pattern use template")
    return JobRequest(
        kind=kind,
        source=_bucket_uri(source),
        template=template,
        names=None if names is None else list(names),
        prefix=prefix,
        rate=rate,
    )


def _bucket_uri(name: BucketName) -> str:
    return name.uri if isinstance(name, BucketHandle) else str(Bucket.parse(name) if isinstance(name, str) else name)


def _path(job: str | JobInfo) -> str:
    return f"/api/jobs/{check_job_id(job if isinstance(job, str) else job.id)}"
