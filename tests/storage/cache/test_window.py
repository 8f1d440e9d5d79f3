"""The memory of what passes through: shared by all who read, never more than its limit, and given in turn."""

import asyncio

import pytest

from shardmill.core.errors import Busy, InsufficientStorage
from shardmill.storage.cache.window import LEAST, WINDOW, Memory, Window
from tests.storage.cache.support import MIB, run, wait_until


def test_windows_get_smaller_the_more_there_are_and_never_take_more_than_there_is() -> None:
    async def story() -> None:
        memory = Memory(4 * WINDOW)
        windows = [await Window.open(0, memory, "it")]
        while not memory.is_wanted and sum(window.size for window in windows) + LEAST <= 4 * WINDOW:
            windows.append(await Window.open(0, memory, "it"))
            assert sum(window.size for window in windows) <= 4 * WINDOW
        assert windows[0].size == WINDOW
        assert windows[-1].size == LEAST
        assert len(windows) > 8
        for window in windows:
            window.close()
        again = await Window.open(0, memory, "it")
        assert again.size == WINDOW

    run(story())


def test_who_waits_gets_what_others_have_done_with() -> None:
    async def story() -> None:
        memory = Memory(WINDOW)
        first = Window(0, WINDOW, memory, "first")
        await memory.take(WINDOW)
        opening = [asyncio.create_task(Window.open(0, memory, str(number))) for number in range(2)]
        await wait_until(lambda: memory.is_wanted)
        assert first.move(LEAST) == (0, LEAST // MIB)
        second = await opening[0]
        assert (first.low, first.size, second.size) == (LEAST, WINDOW - LEAST, LEAST)
        assert not opening[1].done()
        second.close()
        await opening[1]
        # With nobody waiting it stays as wide as it is.
        first.move(2 * LEAST)
        assert first.size == WINDOW - LEAST

    run(story())


def test_who_waits_too_long_is_told_so_and_is_not_waited_for() -> None:
    async def story() -> None:
        memory = Memory(LEAST, patience=0.05)
        first = await Window.open(0, memory, "first")
        with pytest.raises(Busy):
            await Window.open(0, memory, "second")
        assert not memory.is_wanted
        with pytest.raises(InsufficientStorage):
            await first.reach(0, LEAST + 1)
        first.close()
        assert (await Window.open(0, memory, "third")).size == LEAST

    run(story())


def test_who_leaves_while_he_waits_takes_nothing_along() -> None:
    async def story() -> None:
        memory = Memory(LEAST)
        first = await Window.open(0, memory, "first")
        leaving, staying = (asyncio.create_task(Window.open(0, memory, name)) for name in ("leaving", "staying"))
        await wait_until(lambda: memory.is_wanted)
        leaving.cancel()
        first.close()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        (await staying).close()
        assert not memory.is_wanted
        await memory.take(LEAST)

    run(story())


def test_a_window_grows_as_far_as_there_is_memory_and_never_back() -> None:
    async def story() -> None:
        memory = Memory(2 * WINDOW, patience=0.05)
        window = await Window.open(5 * MIB + 1, memory, "it")
        await window.reach(5 * MIB + 1, 5 * MIB + WINDOW + 1)
        assert (window.low, window.size > WINDOW // 2) == (5 * MIB, True)
        with pytest.raises(InsufficientStorage):
            await window.reach(5 * MIB, 5 * MIB + 3 * WINDOW)
        with pytest.raises(InsufficientStorage):
            await window.reach(0, MIB)

    run(story())
