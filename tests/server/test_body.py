"""What a thread does with a descriptor is done before the descriptor can be another's."""

import asyncio
import threading

import pytest

from shardmill.server.body import seen_through


def test_who_is_cancelled_twice_still_waits_for_the_thread() -> None:
    may_end = threading.Event()
    done: list[str] = []

    def work() -> None:
        may_end.wait(30)
        done.append("thread")

    async def answer() -> None:
        try:
            await seen_through(asyncio.get_running_loop().run_in_executor(None, work))
        finally:
            done.append("descriptor closed")

    async def main() -> None:
        task = asyncio.ensure_future(answer())
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["thread", "descriptor closed"]

    try:
        asyncio.run(main())
    finally:
        may_end.set()
