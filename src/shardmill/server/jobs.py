"""`/api/jobs`: offline work asked for, looked at, waited for and cancelled. Wire types are those of `core.jobs`."""

import math

from aiohttp import web

from shardmill.core.errors import BadRequest
from shardmill.core.jobs import JobRequest, check_job_id
from shardmill.core.jobs import Jobs as JobList
from shardmill.jobs.registry import MAX_WAIT_SECONDS, Jobs
from shardmill.server.calls import Call
from shardmill.server.payloads import decode_body, json_answer, read_body

_REQUEST = 64 << 20  # bytes; it may name a million keys


class JobApi:
    """Handlers over `Jobs`.

    Args:
        body_timeout: Seconds without a byte of a request.
    """

    def __init__(self, jobs: Jobs, body_timeout: float) -> None:
        self._jobs = jobs
        self._body_timeout = body_timeout

    async def list(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(JobList(self._jobs.list(call.principal)))

    async def start(self, call: Call) -> web.StreamResponse:
        """201: it is begun, or goes on; 200: it is going on already."""
        info, is_begun = await self._jobs.start(call.principal, await self._read(call))
        return json_answer(info, status=201 if is_begun else 200)

    async def plan(self, call: Call) -> web.StreamResponse:
        """What `start` would do."""
        return json_answer(await self._jobs.plan(call.principal, await self._read(call)))

    async def get(self, call: Call) -> web.StreamResponse:
        """How a job stands; with `wait`, as soon as it has ended."""
        wait = _seconds(call.query("wait").get("wait"))
        return json_answer(await self._jobs.get(call.principal, _id(call), wait=wait))

    async def cancel(self, call: Call) -> web.StreamResponse:
        call.query()
        return json_answer(await self._jobs.cancel(call.principal, _id(call)))

    async def _read(self, call: Call) -> JobRequest:
        call.query()
        return await decode_body(await read_body(call, _REQUEST, "a job", self._body_timeout), JobRequest, "a job")


def _id(call: Call) -> str:
    return check_job_id(call.path.removeprefix("/api/jobs/"))


def _seconds(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise BadRequest(f"wait={text!r} is not a number of seconds from 0 to {MAX_WAIT_SECONDS:g}")
    return seconds
