"""Every request's way: rules first, then one table of routes, then one place that answers for what went wrong."""

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from shardmill.core.errors import (
    BadRequest,
    Busy,
    ExpectationFailed,
    MethodNotAllowed,
    NotFound,
    ShardmillError,
)
from shardmill.jobs.registry import Jobs
from shardmill.node.node import Node
from shardmill.server.api import Api
from shardmill.server.batch import BatchFace
from shardmill.server.body import Sender
from shardmill.server.calls import Call
from shardmill.server.connections import Connection
from shardmill.server.errors import Cut, error_answer, unexpected
from shardmill.server.front.desk import Desk
from shardmill.server.intake import check_framing
from shardmill.server.jobs import JobApi
from shardmill.server.metrics import CONTENT_TYPE, Metrics
from shardmill.server.objects import ObjectFace
from shardmill.server.pages import index
from shardmill.server.patience import patience_with_reader
from shardmill.server.security import HostRules
from shardmill.server.transformed import TransformedFace
from shardmill.telemetry import logs

logger = logging.getLogger(__name__)

Handler = Callable[[Call], Awaitable[web.StreamResponse]]

DATA_ROUTES = ("o", "t")
METHODS = ("DELETE", "GET", "HEAD", "POST", "PUT")
"""All that any path has."""


class App:
    """All faces of one node over HTTP."""

    def __init__(self, node: Node, jobs: Jobs, threads: ThreadPoolExecutor) -> None:
        settings = node.config.server
        self._node = node
        self._rules = HostRules.of(settings.address[0], settings.hosts)
        self._jobs = jobs
        self._metrics = Metrics(node.transforms, node.cache, jobs)
        self.is_draining = False
        """No new work is begun; what is going on may finish."""
        self.desk = (
            Desk(
                node.objects,
                node.shards,
                node.finished,
                self._rules,
                settings,
                threads,
                self._metrics.front,
                node.config.storage.max_object,
            )
            if settings.front == "on"
            else None
        )
        """Of the front; None: aiohttp answers everything."""
        sender = Sender(threads, settings.send_timeout)
        objects = ObjectFace(node.objects, node.shards, sender, settings, node.config.storage.max_object)
        transformed = TransformedFace(node.transforms, sender, threads, settings.send_timeout)
        api = Api(node)
        batch = BatchFace(node.batches, threads, body_timeout=settings.body_timeout, send_timeout=settings.send_timeout)
        job_api = JobApi(jobs, settings.body_timeout)
        self._exact: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._index},
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._show_metrics},
            "/api/buckets": {"GET": api.buckets},
            "/api/objects": {"GET": api.objects},
            "/api/objects/copy": {"POST": api.copy},
            "/api/members": {"GET": api.members},
            "/api/batch": {"POST": batch.post},
            "/api/transforms": {"GET": api.transforms, "POST": api.register},
            "/api/transforms/errors": {"GET": api.failures},
            "/api/pipelines": {"POST": api.register_pipeline},
            "/api/samples": {"POST": api.samples},
            "/api/runs": {"GET": api.runs},
            "/api/results": {"GET": api.results, "DELETE": api.remove_results},
            "/api/cache": {"GET": api.cache},
            "/api/cache/object": {"GET": api.cached_object},
            "/api/cache/objects": {"GET": api.cached_objects},
            "/api/lookahead": {"POST": api.announce},
            "/api/jobs": {"GET": job_api.list, "POST": job_api.start},
            "/api/jobs/plan": {"POST": job_api.plan},
            "/api/environments": {"GET": api.environments},
            "/api/config": {"GET": api.config},
            "/api/openapi.json": {"GET": api.openapi},
        }
        self._below: dict[str, dict[str, Handler]] = {
            "/o/": {"GET": objects.get, "PUT": objects.put, "DELETE": objects.delete},
            "/t/": {"GET": transformed.get},
            "/api/buckets/": {"PUT": api.create_bucket, "DELETE": api.remove_bucket},
            "/api/environments/": {"DELETE": api.remove_environment},
            "/api/jobs/": {"GET": job_api.get, "DELETE": job_api.cancel},
            "/api/transforms/": {"GET": api.transform, "DELETE": api.remove_transform},
        }

    def begin_draining(self) -> None:
        """No new work is begun; what is going on may finish."""
        self.is_draining = True
        if self.desk is not None:
            self.desk.is_draining = True

    @property
    def routes(self) -> Mapping[str, Collection[str]]:
        """Path → methods; a path that ends in a slash stands for all below it."""
        return {**self._exact, **self._below}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The outermost handler: every answer, count and log line of a request comes from here."""
        call = Call.parse(request)
        token = logs.request_id.set(call.id)
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin(request)
        self._metrics.begin(call)
        started = time.monotonic()
        status = "gone"
        try:
            answer = await self._answer(call)
            status = str(answer.status)
            return answer
        except Cut as cut:
            status = "cut"
            logger.info("%s %s: answer cut: %s", call.method, call.path, cut)
            raise
        finally:
            connection.finish()
            sent = call.sent or _length(call)
            self._metrics.end(call, status, sent=sent)
            is_quiet = call.route in DATA_ROUTES and status in ("200", "201", "204", "206", "304")
            logger.log(
                logging.DEBUG if is_quiet else logging.INFO,
                "%s %s %s %d bytes %.1f ms",
                call.method,
                call.path,
                status,
                sent,
                (time.monotonic() - started) * 1000,
            )
            logs.request_id.reset(token)

    async def _answer(self, call: Call) -> web.StreamResponse:
        try:
            answer = await self._route(call)
        except Cut:
            raise
        except ShardmillError as error:
            answer = self._failed(call, error)
        except ConnectionError as error:
            raise Cut("the peer went away") from error
        except Exception as error:
            answer = self._failed(call, unexpected(error))
        if not answer.prepared:
            await call.send_head(answer)
        # Without the wait a peer that asks and asks and never reads would fill the memory.
        async with patience_with_reader(call.request.transport, self._node.config.server.send_timeout):
            await answer.write_eof()
            await call.request.writer.drain()
        return answer

    def refused(self, request_id: str, status: int, reason: str) -> None:
        """A request that is not even HTTP was answered by its connection."""
        self._metrics.refuse(str(status))
        token = logs.request_id.set(request_id)
        logger.info("no request: %d, %s", status, reason)
        logs.request_id.reset(token)

    def _failed(self, call: Call, error: ShardmillError) -> web.StreamResponse:
        if call.answer is not None:
            # The head is out, so the only way to say it is not to finish.
            raise Cut(error.message)
        answer = error_answer(error, call.id)
        if isinstance(error, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(sorted(self._methods(call.path)))
        if error.status in (408, 413):
            # The rest of the body is not worth reading.
            call.is_broken = True
        return answer

    async def _route(self, call: Call) -> web.StreamResponse:
        self._rules.check(call.request)
        check_framing(call)
        methods = self._handlers(call)
        if not call.path.startswith("/") and call.method in METHODS:
            raise BadRequest("the request target is neither a path nor an http URL")
        if methods is None and call.path.startswith("/"):
            raise NotFound(f"there is nothing at this path; GET / shows what this node has, {_FACES} are its faces")
        method = "GET" if call.method == "HEAD" else call.method
        handler = methods.get(method) if methods else None
        if handler is None:
            allowed = ", ".join(sorted(self._methods(call.path)))
            raise MethodNotAllowed(f"{call.method} is not for this path; {allowed} are")
        expected = call.headers.get("Expect")
        if expected is not None and expected.lower() != "100-continue":
            raise ExpectationFailed("the only expectation that can be met is 100-continue")
        if self.is_draining and (call.route == "t" or (call.path == "/api/jobs" and call.method == "POST")):
            raise Busy("this node is shutting down; ask another one", retry_after=5)
        return await handler(call)

    def _handlers(self, call: Call) -> dict[str, Handler] | None:
        exact = self._exact.get(call.path)
        if exact is not None:
            call.route = call.path.strip("/").split("/")[0] or "index"
            return exact
        for prefix, methods in self._below.items():
            if call.path.startswith(prefix):
                call.route = prefix.split("/")[1]
                return methods
        return None

    def _methods(self, path: str) -> set[str]:
        if not path.startswith("/"):
            return set(METHODS)
        methods = self._exact.get(path) or next(
            (methods for prefix, methods in self._below.items() if path.startswith(prefix)), {}
        )
        return {*methods, *(["HEAD"] if "GET" in methods else [])}

    async def _index(self, call: Call) -> web.StreamResponse:
        return await index(self._node, self._jobs, call)

    async def _healthz(self, call: Call) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _readyz(self, call: Call) -> web.StreamResponse:
        if self.is_draining:
            raise Busy("this node is shutting down")
        return web.Response(text="ready\n")

    async def _show_metrics(self, call: Call) -> web.StreamResponse:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


_FACES = "/o, /t and /api"


def _length(call: Call) -> int:
    answer = call.answer
    body = answer.body if isinstance(answer, web.Response) else None
    return len(body) if isinstance(body, bytes) and call.method != "HEAD" else 0
