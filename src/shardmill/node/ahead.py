"""Look-ahead: clients announce the list that they are about to read, and the next shard is begun while one is read."""

import asyncio
import itertools
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from shardmill.core.errors import ShardmillError
from shardmill.core.paths import TransformedRef
from shardmill.etl.engine import Engine
from shardmill.node.access import Principal
from shardmill.node.objects import Objects

logger = logging.getLogger(__name__)

MAX_ANNOUNCED = 200_000  # names remembered, of all lists; the oldest are forgotten
MAX_BEGINNING = 4  # shards being opened ahead at once
QUIET_SECONDS = 0.1  # that the reader of a finished shard has the cores for himself; on a near way he is done by then
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
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
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

    @contextmanager
    def reading(self, principal: Principal, name: TransformedRef, *, is_made: bool) -> Iterator[None]:
        """Around the reading of one of them: begins what follows.

        Args:
            principal: Who reads.
            name: What.
            is_made: All of it is there already. Then its reader is the slower half, so that there is time to begin, and
                workers would only keep from him the cores that sending and receiving take.
        """
        begin = _Once(lambda: self._begin_following(principal, name))
        if is_made:
            asyncio.get_running_loop().call_later(QUIET_SECONDS, begin)
        else:
            begin()
        try:
            yield
        finally:
            begin()

    def _begin_following(self, principal: Principal, name: TransformedRef) -> None:
        if self._is_closed:
            return
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


class _Once:
    """Calls something the first time that it is called itself."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def _key(name: TransformedRef) -> _Name:
    return str(name.ref), str(name.spec)
