"""A body on its way to becoming an object: received in large blocks, hashed as it passes, checked at its end.

A small one is held until it is committed: each call of a thread costs more than writing it.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from shardmill.core.errors import BadRequest
from shardmill.storage.steps import finish
from shardmill.storage.trailer import BLOCK, Hasher

SMALL = 64 << 10  # bytes


class Upload(Protocol):
    """Where the bytes go; `begin` and `append` block, so they run in threads."""

    hasher: Hasher

    def begin(self, size: int | None) -> None: ...

    def append(self, data: bytes | bytearray | memoryview) -> None: ...

    def hold(self, data: bytes | bytearray) -> None:
        """The whole of a small body, hashed; the commit begins, and writes it."""
        ...


async def receive(
    upload: Upload,
    body: AsyncIterator[bytes | bytearray | memoryview],
    *,
    size: int | None,
    checksum: str | None,
    threads: ThreadPoolExecutor,
) -> None:
    """Take the whole body.

    Raises:
        BadRequest: It is shorter or longer than `size`, or `checksum` (`xxh3:HEX`) is another.
    """
    loop = asyncio.get_running_loop()

    async def begin() -> None:
        await loop.run_in_executor(threads, upload.begin, size)

    async def append(data: bytes | bytearray | memoryview) -> None:
        await loop.run_in_executor(threads, upload.append, data)

    is_begun = size is not None and size > SMALL
    if is_begun:
        await finish(begin())
    pending = bytearray()
    async for data in body:
        if size is not None and upload.hasher.size + len(pending) + len(data) > size:
            raise BadRequest(f"the body is longer than the {size} bytes announced; nothing was stored")
        if is_begun and not pending and len(data) >= BLOCK:
            # It stays as it is until the next piece is asked for.
            await finish(append(data))
            continue
        pending += data
        if not is_begun and len(pending) > SMALL:
            is_begun = True
            await finish(begin())
        if len(pending) >= BLOCK:
            # A thread that writes uses the buffer to its end, whoever has left meanwhile.
            await finish(append(pending))
            pending = bytearray()
    if not is_begun:
        upload.hasher.update(pending)
        upload.hold(pending)
    elif pending:
        await finish(append(pending))
    received = upload.hasher.size
    if size is not None and received != size:
        raise BadRequest(f"the body has {received} bytes, {size} were announced; nothing was stored")
    found = f"xxh3:{upload.hasher.checksum}"
    if checksum is not None and checksum != found:
        raise BadRequest(f"the body's checksum is {found}, announced was {checksum}; nothing was stored")
