"""A node's transforms over HTTP, as any client that knows the API would use them."""

import http.client
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardmill.core.api import ErrorBody, Failures, TransformInfo, TransformRequest
from shardmill.testing.node import RunningNode, running_node
from tests.etl.support import request_for

BUCKET = "gs://shards"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def error(self) -> ErrorBody:
        return msgspec.json.decode(self.body, type=ErrorBody)


class Refused(Exception):
    """A registration that failed; `error` is the answer's body."""

    def __init__(self, status: int, error: ErrorBody) -> None:
        super().__init__(f"{status} {error.message}")
        self.status = status
        self.error = error


class Served:
    """A node and its directory of shards, bucket `gs://shards`."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        parts = urllib.parse.urlsplit(node.endpoint)
        assert parts.hostname is not None
        assert parts.port is not None
        self.address = (parts.hostname, parts.port)

    def ask(self, method: str, target: str, body: bytes | None = None) -> Answer:
        """One request on a connection of its own; raises what http.client does for a body that is cut."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()

    def register(
        self,
        source: str,
        *,
        name: str = "t",
        decoder: str | None = "pil",
        probe: str | None = None,
        env: str | None = None,
        packages: Sequence[str] = (),
    ) -> TransformInfo:
        """Raises Refused."""
        request: TransformRequest = request_for(source, name=name, decoder=decoder)
        request = msgspec.structs.replace(request, environment=env, packages=list(packages))
        if probe is not None:
            request = msgspec.structs.replace(request, probe=f"{BUCKET}/{probe}")
        answer = self.ask("POST", "/api/transforms", msgspec.json.encode(request))
        if answer.status not in (200, 201):
            raise Refused(answer.status, answer.error)
        return msgspec.json.decode(answer.body, type=TransformInfo)

    def path(self, info: TransformInfo, file: str, options: str = "") -> str:
        """Of the transformed shard, e.g. with the options `,seed=1`."""
        return f"/t/gs/shards/{info.uuid}{options}~{file}"

    def url(self, info: TransformInfo, file: str, options: str = "") -> str:
        return self.node.endpoint + self.path(info, file, options)

    def get(self, info: TransformInfo, file: str, options: str = "") -> Answer:
        return self.ask("GET", self.path(info, file, options))

    def failures(self, **query: str) -> Failures:
        answer = self.ask("GET", f"/api/transforms/errors?{urllib.parse.urlencode(query)}")
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=Failures)


@contextmanager
def serve(
    directory: Path,
    *flags: str,
    data: Path | None = None,
    environ: dict[str, str] | None = None,
    python: str = sys.executable,
) -> Iterator[Served]:
    """A node over a directory of shards."""
    bucket = f"{BUCKET}=dir:{directory}"
    with running_node("--bucket", bucket, *flags, data=data, environ=environ, python=python) as node:
        yield Served(node)
