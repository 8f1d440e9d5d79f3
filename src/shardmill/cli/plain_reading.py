"""A shard as any program reads it: urllib for the URL, tarfile for the archive, nothing of the client.

Either every sample of the answer is given or an error is raised.
"""

import http.client
import io
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import msgspec

from shardmill.client import NodeUnreachable, TruncatedBody
from shardmill.client.shards import StreamedSample
from shardmill.core.api import ErrorBody
from shardmill.core.errors import ServerError, ShardmillError, error_from_wire
from shardmill.shards import split_name

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TIMEOUT = 600.0  # seconds without a byte; the first use of an environment may have to import its libraries


class PlainShard(io.RawIOBase):
    """One GET of a shard. Resources: `samples` closes the connection when it is done or left."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.received = 0
        """Bytes of the body so far."""
        self.first_byte: float | None = None
        """Seconds from the request to the first byte of the body."""
        self._began = 0.0
        self._body: http.client.HTTPResponse | None = None

    def samples(self) -> Generator[StreamedSample, None, None]:
        """Samples as they arrive.

        Raises:
            ShardmillError: The node refused, or the transform failed before the first byte.
            TruncatedBody: The body was cut.
            NodeUnreachable: Nobody answers.
        """
        # A proxy of the environment's has no business on the loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._began = time.monotonic()
        try:
            with opener.open(self.url, timeout=TIMEOUT) as self._body, tarfile.open(fileobj=self, mode="r|") as archive:
                yield from _grouped(archive)
        except urllib.error.HTTPError as error:
            raise _error_of(error) from None
        except urllib.error.URLError as error:
            raise NodeUnreachable(f"{self.url}: {error.reason}") from None
        except (http.client.HTTPException, ConnectionError, tarfile.TarError) as error:
            raise TruncatedBody(f"{self.url} is no whole shard, after {self.received} bytes: {error}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """For tarfile."""
        assert self._body is not None
        count = self._body.readinto(buffer)
        if self.first_byte is None:
            self.first_byte = time.monotonic() - self._began
        self.received += count
        return count


def _grouped(archive: tarfile.TarFile) -> Iterator[StreamedSample]:
    """Consecutive members of one key are a sample."""
    sample: StreamedSample | None = None
    for member in archive:
        file = archive.extractfile(member)
        parts = split_name(member.name)
        if file is None or parts is None:
            continue
        key, field = parts
        if sample is not None and sample.key != key:
            yield sample
            sample = None
        sample = sample or StreamedSample(key, {})
        sample.fields[field] = file.read()
    if sample is not None:
        yield sample


def _error_of(error: urllib.error.HTTPError) -> ShardmillError:
    with error:
        try:
            body = msgspec.json.decode(error.read(), type=ErrorBody)
        except msgspec.DecodeError:
            return ServerError(f"{error.url}: {error.code} {error.reason}")
    return error_from_wire(
        body.code, body.message, status=error.code, traceback=body.traceback, request_id=body.request_id
    )
