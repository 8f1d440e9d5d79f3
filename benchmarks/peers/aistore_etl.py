"""The web server of `aistore[etl]` with its two ways to write a transform, as its documentation shows them.

Run by `uvicorn aistore_etl:buffered` (or `streaming`) with `BENCH_FUNCTION=FILE.py:FUNCTION`. The server alone, without
a cluster: an object comes by its `etl_fqn`, the path of a file, as from a target on the same machine.
"""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.peers.shards import transformed
from benchmarks.raw import load

FUNCTION = load(os.environ["BENCH_FUNCTION"])


class Buffered(FastAPIServer):
    """`transform`: bytes in, bytes out."""

    def transform(self, data: bytes, *_: object) -> bytes:
        return b"".join(transformed(io.BytesIO(data), FUNCTION))


class Streaming(FastAPIServer):
    """`transform_stream`: a reader in, pieces out."""

    def transform_stream(self, reader: BinaryIO, *_: object) -> Iterator[bytes]:
        yield from transformed(reader, FUNCTION)


buffered = Buffered().app
streaming = Streaming().app
