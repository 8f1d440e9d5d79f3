"""When what follows is begun: at once, or once the reader of what is there already has it."""

import asyncio
from typing import cast

import pytest

from shardmill.core.paths import TransformedRef
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import Spec
from shardmill.etl.engine import Engine
from shardmill.node.access import ANONYMOUS, Principal
from shardmill.node.ahead import LookAhead
from shardmill.node.objects import Objects

NAME = TransformedRef(ObjectRef.parse("gs://own/s-0.tar"), Spec.parse("draw@0123456789ab"))


class Noted(LookAhead):
    """Writes down what it would begin the successor of."""

    def __init__(self) -> None:
        super().__init__(cast("Engine", None), cast("Objects", None), depth=1)
        self.begun: list[TransformedRef] = []
        self.has_begun = asyncio.Event()

    def _begin_following(self, principal: Principal, name: TransformedRef) -> None:
        self.begun.append(name)
        self.has_begun.set()


def test_what_follows_a_shard_that_is_being_made_is_begun_at_once() -> None:
    async def story() -> None:
        async with Noted() as ahead:
            with ahead.reading(ANONYMOUS, NAME, is_made=False):
                assert ahead.begun == [NAME]
            assert ahead.begun == [NAME]

    asyncio.run(story())


def test_the_reader_of_a_finished_shard_has_the_cores_for_himself_first() -> None:
    async def story() -> None:
        async with Noted() as ahead:
            with ahead.reading(ANONYMOUS, NAME, is_made=True):
                assert ahead.begun == []
            assert ahead.begun == [NAME]

    asyncio.run(story())


def test_a_reader_who_takes_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.node.ahead.QUIET_SECONDS", 0.01)

    async def story() -> None:
        async with Noted() as ahead, asyncio.timeout(20):
            with ahead.reading(ANONYMOUS, NAME, is_made=True):
                await ahead.has_begun.wait()
            assert ahead.begun == [NAME]

    asyncio.run(story())
