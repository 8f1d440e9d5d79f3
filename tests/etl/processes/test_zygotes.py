"""A real zygote and what is asked of it, where whoever asked leaves at a bad moment."""

import asyncio
import os
import socket
import sys
from pathlib import Path

from shardmill.etl.processes.process_tree import live_descendants
from shardmill.etl.processes.staging import stage
from shardmill.etl.processes.zygotes import Forked, Zygote
from shardmill.worker import wire
from tests.etl.support import wait_until


def test_who_leaves_as_the_answer_comes_leaves_no_worker(tmp_path: Path) -> None:
    """The answer is there, and is not handed on any more: its worker and its descriptor must not stay."""

    async def main() -> None:
        zygote = await Zygote.start("x", Path(sys.executable), stage(tmp_path / "stage"), tmp_path)
        asking: asyncio.Task[Forked]
        take = zygote._channel._on_frame

        def take_and_leave(frame: wire.Frame) -> None:
            take(frame)
            asking.cancel()

        zygote._channel._on_frame = take_and_leave
        try:
            ours, theirs = socket.socketpair()
            arena, (reading, writing) = os.memfd_create("arena"), os.pipe()
            with ours, theirs:
                fork = zygote.fork(theirs, arena, writing, arena_size=0, memory=1 << 30, scratch=tmp_path / "worker")
                asking = asyncio.create_task(fork)
                await asyncio.wait([asking])
                for descriptor in (arena, reading, writing):
                    os.close(descriptor)
                assert asking.cancelled()
                assert zygote.workers == 0
                await wait_until(lambda: not live_descendants(zygote.about["pid"]), 20)
        finally:
            await zygote.close()

    asyncio.run(main())
