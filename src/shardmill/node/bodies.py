"""Bytes of what was opened, for whoever stores them: an object or a result from its file, a run as it goes on.

They end only where they are complete: a version that changed, a corrupt block or a run that failed raises before.
"""

import asyncio
import os
from collections.abc import AsyncGenerator

from shardmill.core.errors import ServerError
from shardmill.core.sources import InFile, Source
from shardmill.node.transforms import Transformed, TransformedFile
from shardmill.storage.steps import finish

BLOCK = 1 << 20  # bytes read at a time
AHEAD = 16 << 20  # bytes verified ahead of what is read


async def bytes_of(made: Transformed) -> AsyncGenerator[bytes | memoryview]:
    """What a transform gives; each piece is valid until the next is asked for.

    Raises:
        ShardmillError: The run fails, or the result is corrupt.
    """
    if isinstance(made, TransformedFile):
        async for piece in bytes_of_source(made.source):
            yield piece
        return
    await made.reading.start()
    while (part := await made.reading.next()) is not None:
        yield await _read(part.descriptor, part.start, part.stop) if isinstance(part, InFile) else part.data


async def bytes_of_source(source: Source) -> AsyncGenerator[bytes]:
    """All bytes of an opened object, the last only after a last look at its version.

    Raises:
        Conflict: It changed meanwhile.
        CorruptObject, BackendUnavailable: As `Source.ensure`.
    """
    size, ensured = source.meta.size, 0
    for start in range(0, size, BLOCK):
        stop = min(size, start + BLOCK)
        if stop > ensured:
            ensured = min(size, start + AHEAD)
            await source.ensure(start, ensured)
        data = await _read(source.descriptor, start, stop)
        if stop == size:
            await source.check_unchanged()
        yield data


async def _read(descriptor: int, start: int, stop: int) -> bytes:
    # A thread that reads uses the descriptor to its end, whoever has left meanwhile.
    data = await finish(asyncio.to_thread(os.pread, descriptor, stop - start, start))
    if len(data) != stop - start:
        raise ServerError("a file is shorter than it was")
    return data
