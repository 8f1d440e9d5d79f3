"""Large bodies in JSON, which may hold up nobody but who sent them."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shardmill.core.api import Announcement
from shardmill.core.errors import BadRequest
from shardmill.core.paths import parse_transformed_path
from shardmill.etl.engine import Engine
from shardmill.node.ahead import LookAhead
from shardmill.node.objects import Objects
from shardmill.server.payloads import decode_body


def announced(count: int) -> list[str]:
    return [f"/t/gs/imgs/train@1f3a9c2e0b1d,seed={number}~shard.tar" for number in range(count)]


async def count_turns(work: Any) -> int:
    """How often others have their turn while something is done."""
    turns = 0
    task = asyncio.ensure_future(work)
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    await task
    return turns


def test_a_name_given_twice_among_very_many_is_found_at_once() -> None:
    """Where each is looked for among all, this takes minutes."""
    names = ",".join(f'"name-{number}":1' for number in range(300_000))
    with pytest.raises(BadRequest, match="'last' is given twice"):
        asyncio.run(decode_body(f'{{{names},"last":1,"last":2}}'.encode(), Announcement, "an announcement"))


def test_a_long_list_is_remembered_while_others_have_their_turns() -> None:
    engine = SimpleNamespace(runs=SimpleNamespace(ahead={"unused": 0, "used": 0}))

    async def main() -> None:
        ahead = LookAhead(cast(Engine, engine), cast(Objects, None), depth=1)
        names = [parse_transformed_path(path) for path in announced(10_000)]
        assert await count_turns(ahead.announce(names)) >= 10_000 // 200

    asyncio.run(main())
