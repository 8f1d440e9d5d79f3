"""A run's output and its readers: the same bytes for all, in memory bounds, whatever the disk does."""

import asyncio
import os
import random
import tempfile
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.core.errors import Busy, TransformFailed
from shardmill.core.sources import InMemory
from shardmill.etl.runs.run_state import Chunk
from shardmill.etl.runs.spool import EDGE, RunOutput
from tests.etl.support import bytes_of


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


class Desk:
    """An output with a real file behind it and a count of what was given back."""

    def __init__(self, *, spooled: bool = True) -> None:
        self.returned = 0
        self.progress = 0
        self.output = RunOutput(window=64 << 20, give_back=self._give_back, on_progress=self._on_progress)
        self.file = tempfile.TemporaryFile()
        if spooled:
            self.output.spool_to(self.file.fileno())

    def _give_back(self, chunk: Chunk) -> None:
        self.returned += chunk.held

    def _on_progress(self) -> None:
        self.progress += 1

    def extend(self, data: bytes) -> None:
        self.output.extend(Chunk(data, held=len(data)))

    def spool(self, limit: int = 1 << 30, *, fails: bool = False) -> None:
        taken = self.output.take_unspooled(limit)
        if not fails:
            for held in taken:
                os.pwrite(self.file.fileno(), held.chunk.data, held.start)
        self.output.end_spooling(taken, is_written=not fails)

    def close(self) -> None:
        self.output.close()
        self.file.close()


@pytest.mark.parametrize("ends", ["enough", "complete", "failed", "in time"])
def test_a_batch_is_waited_for_until_it_is_there_or_will_not_come(ends: str) -> None:
    async def story() -> None:
        desk = Desk()
        output = desk.output
        try:
            desk.extend(bytes(10))
            waiting = asyncio.create_task(output.wait_batch(100, 0.05 if ends == "in time" else 3600))
            await asyncio.sleep(0)
            desk.extend(bytes(89))
            await asyncio.sleep(0)
            assert not waiting.done()
            if ends == "enough":
                desk.extend(b"x")
            elif ends == "complete":
                output.finish()
            elif ends == "failed":
                output.fail(TransformFailed("it broke"))
            async with asyncio.timeout(10):
                await waiting
            assert len(output.take_unspooled(1 << 20)) == 2 + (ends == "enough")
            # What is so already is not waited for.
            if ends != "in time":
                async with asyncio.timeout(10):
                    await output.wait_batch(100, 3600)
        finally:
            desk.close()

    run(story())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 700_000), min_size=1, max_size=25),
    readers=st.integers(1, 4),
    fails_at=st.one_of(st.none(), st.integers(0, 25)),
)
def test_every_reader_gets_all_bytes_at_its_own_speed(
    seed: int, sizes: list[int], readers: int, fails_at: int | None
) -> None:
    order = random.Random(seed)
    chunks = [order.randbytes(size) for size in sizes]

    async def story() -> None:
        desk = Desk()
        output = desk.output
        try:
            followers = [output.follow() for _ in range(readers)]
            got = [b"" for _ in followers]
            waiting = list(chunks)
            number = 0
            while waiting or any(len(data) < output.published for data in got):
                action = order.random()
                if action < 0.3 and waiting:
                    desk.extend(waiting.pop(0))
                elif action < 0.5 and output.is_spooling:
                    desk.spool(order.choice([1, 1 << 20]), fails=fails_at is not None and number >= fails_at)
                    number += 1
                else:
                    who = order.randrange(readers)
                    if len(got[who]) < output.published:
                        part = await followers[who].next()
                        assert part is not None
                        got[who] += bytes_of(part)
                assert output.fastest == max(follower.position for follower in followers)
            output.finish()
            for follower, data in zip(followers, got, strict=True):
                assert await follower.next() is None
                assert data == b"".join(chunks)
                follower.close()
            if output.is_spooling:
                desk.spool()
                assert output.spooled == output.published
            output.close()
            assert desk.returned == sum(sizes)
        finally:
            desk.close()

    run(story())


def test_a_stalled_reader_holds_nothing_but_what_it_was_given() -> None:
    async def story() -> None:
        desk = Desk()
        output = desk.output
        stalled, quick = output.follow(), output.follow()
        size = 1 << 20
        desk.extend(bytes(size))
        assert isinstance(await stalled.next(), InMemory)
        for _ in range(20):
            desk.extend(bytes(size))
            desk.spool()
        while quick.position < 20 * size:
            await quick.next()
        kept = 21 * size - desk.returned
        assert kept <= EDGE + 2 * size
        assert output.fastest >= 20 * size
        stalled.close()
        quick.close()
        desk.close()

    run(story())


def test_of_many_readers_only_the_first_and_the_last_let_the_run_go_on() -> None:
    async def story() -> None:
        desk = Desk()
        output = desk.output
        followers = [output.follow() for _ in range(4)]
        desk.extend(bytes(1000))
        desk.spool()
        for follower in followers:
            await follower.next()
        desk.extend(bytes(1000))
        before, progress = desk.returned, []
        for follower in followers:
            await follower.next()
            progress.append(desk.progress)
        assert [number - progress[0] for number in progress] == [0, 0, 0, 1]
        assert desk.returned == before + 1000
        followers[0].close()
        assert output.fastest == 1000
        for follower in followers:
            follower.close()
        desk.close()

    run(story())


def test_without_a_file_memory_waits_for_the_slowest() -> None:
    async def story() -> None:
        desk = Desk(spooled=False)
        slow, quick = desk.output.follow(), desk.output.follow()
        for number in range(4):
            desk.extend(bytes([number]) * 10)
        for _ in range(4):
            await quick.next()
        assert desk.returned == 0
        assert await slow.next() is not None
        assert await slow.next() is not None
        assert desk.returned == 10
        slow.close()
        # The quick one still holds the last it was given.
        assert desk.returned == 30
        quick.close()
        desk.close()

    run(story())


def test_once_the_file_can_grow_no_more_nobody_new_can_join_after_a_gap() -> None:
    async def story() -> None:
        desk = Desk()
        output = desk.output
        reader = output.follow()
        desk.extend(b"a" * 10)
        desk.spool()
        desk.extend(b"b" * 10)
        assert output.can_be_joined
        desk.spool(fails=True)
        assert not output.is_spooling
        assert output.can_be_joined
        data = bytes_of(await reader.next()) + bytes_of(await reader.next())  # type: ignore[arg-type]
        assert data == b"a" * 10 + b"b" * 10
        desk.extend(b"c" * 10)
        assert bytes_of(await reader.next()) == b"c" * 10  # type: ignore[arg-type]
        assert not output.can_be_joined
        reader.close()
        desk.close()

    run(story())


def test_a_reader_gets_what_is_published_and_then_the_failure() -> None:
    async def story() -> None:
        desk = Desk()
        reader = desk.output.follow()
        desk.extend(b"x" * 5)
        await reader.start()
        desk.output.fail(TransformFailed("sample 7"))
        assert bytes_of(await reader.next()) == b"x" * 5  # type: ignore[arg-type]
        with pytest.raises(TransformFailed, match="sample 7"):
            await reader.next()
        late = desk.output.follow()
        with pytest.raises(TransformFailed, match="sample 7"):
            await late.start()
        late.close()
        reader.close()
        desk.close()

    run(story())


def test_who_waits_for_the_whole_is_told_when_it_cannot_be_kept() -> None:
    async def story() -> None:
        desk = Desk()
        waiting = desk.output.follow(waits_for_all=True)
        assert desk.output.fastest == float("inf")
        task = asyncio.ensure_future(waiting.wait_complete())
        desk.extend(b"x")
        await asyncio.sleep(0)
        assert not task.done()
        desk.spool(fails=True)
        with pytest.raises(Busy, match="no room"):
            await task
        waiting.close()
        desk.close()

    run(story())


def test_a_file_that_takes_no_more_while_a_batch_is_waited_for_gets_nothing_behind_a_gap() -> None:
    """What its reader has passed meanwhile is not in the file, so that nothing behind it may be."""
    chunks = [os.urandom(EDGE), os.urandom(EDGE), os.urandom(EDGE)]

    async def story() -> None:
        desk = Desk()
        output = desk.output
        try:
            follower = output.follow()
            for chunk in chunks:
                desk.extend(chunk)
            output.stop_spooling()
            got = b""
            for _ in range(2):
                part = await follower.next()
                assert part is not None
                got += bytes_of(part)
            taken = output.take_unspooled(1 << 30)
            for held in taken:
                os.write(desk.file.fileno(), held.chunk.data)
            output.end_spooling(taken, is_written=True)
            output.finish()
            while (part := await follower.next()) is not None:
                got += bytes_of(part)
            assert got == b"".join(chunks)
            follower.close()
        finally:
            desk.close()

    run(story())
