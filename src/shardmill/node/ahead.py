"""Look-ahead: clients announce the list that they are about to read, and the next shard is begun while one is read."""

import asyncio
import itertools
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence

from shardmill.core.errors import ShardmillError
from shardmill.core.paths import TransformedRef
from shardmill.etl.engine import Engine
from shardmill.node.access import Principal
from shardmill.node.objects import Objects

logger = logging.getLogger(__name__)

MAX_ANNOUNCED = 200_000  # names remembered, of all lists; the oldest are forgotten
MAX_BEGINNING = 4  # shards being opened ahead at once
GIVE_UP_AFTER = 4  # runs in a row that nobody asked for: the list is read in another order, or not at all

_AT_ONCE = 200  # names remembered before others have their turn

_Name = tuple[str, str]


class LookAhead:
    """What follows what. Use as an async context manager.

    Args:
        depth: Shards begun before they are asked for; 0: none.
    """

    def __init__(self, engine: Engine, objects: Objects, *, depth: int) -> None:
        self._engine = engine
        self._objects = objects
        self._depth = depth
        self._next: OrderedDict[_Name, TransformedRef] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unused_before = 0
        self._used_before = 0

    async def __aenter__(self) -> "LookAhead":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def announce(self, names: Sequence[TransformedRef]) -> int:
        """Remember that these will be read in this order; returns how many there are now."""
        if not self._depth:
            return 0
        self._unused_before = self._engine.runs.ahead["unused"]
        for number, (name, following) in enumerate(itertools.pairwise(names), 1):
            key = _key(name)
            self._next.pop(key, None)
            self._next[key] = following
            if len(self._next) > MAX_ANNOUNCED:
                self._next.popitem(last=False)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return len(self._next)

    def reading(self, principal: Principal, name: TransformedRef) -> None:
        """One of them is being read: begin what follows."""
        following = self._next.get(_key(name))
        depth = self._depth
        while following is not None and depth and len(self._tasks) < MAX_BEGINNING and self._is_worth_it():
            task = asyncio.get_running_loop().create_task(self._begin(principal, following))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            following = self._next.get(_key(following))
            depth -= 1

    def _is_worth_it(self) -> bool:
        ahead = self._engine.runs.ahead
        if ahead["used"] != self._used_before:
            self._used_before, self._unused_before = ahead["used"], ahead["unused"]
        return ahead["unused"] - self._unused_before < GIVE_UP_AFTER

    async def _begin(self, principal: Principal, name: TransformedRef) -> None:
        spec, ref = name.spec, name.ref
        try:
            version = self._engine.versions.get(spec.name, spec.digest, spec.args)
            source = await self._objects.open(principal, ref)
            try:
                plan = await self._engine.plan(version, source.meta, ref, spec)
            except BaseException:
                source.close()
                raise
            self._engine.runs.prepare(plan, source, request_id=f"ahead-{secrets.token_hex(6)}")
        except ShardmillError as error:
            # Whoever asks for it is told.
            logger.debug("%s is not begun ahead: %s", ref, error)


def _key(name: TransformedRef) -> _Name:
    return str(name.ref), str(name.spec)
