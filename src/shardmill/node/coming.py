"""Shards that are about to be read come to the disk before: of a list that was announced, the next few after each.

Where they are read raw or through a transform makes no difference: what is fetched are the sources. Nothing depends on
it; what is not fetched ahead is fetched when it is asked for.
"""

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence

from shardmill.core.errors import InsufficientStorage, ShardmillError
from shardmill.core.refs import ObjectRef
from shardmill.node.access import Principal
from shardmill.node.cache import Cache

logger = logging.getLogger(__name__)

MAX_ANNOUNCED = 200_000  # names remembered, of all lists; the oldest are forgotten
AT_ONCE = 4  # objects that are fetched ahead together; beyond, the next reading asks again

_FULL_SECONDS = 30.0  # without a try after one that found no room
_STEP = 200  # names remembered before others have their turn


class Coming:
    """What follows what in announced lists. Use as an async context manager.

    Args:
        cache: Of the node.
        depth: Objects that are fetched ahead of the one that is read; 0: none.
    """

    def __init__(self, cache: Cache, *, depth: int) -> None:
        self._cache = cache
        self._depth = depth
        self._next: OrderedDict[ObjectRef, ObjectRef] = OrderedDict()
        self._tasks: dict[ObjectRef, asyncio.Task[None]] = {}
        self._full_until = 0.0

    async def __aenter__(self) -> "Coming":
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def announce(self, refs: Sequence[ObjectRef]) -> None:
        """Remember that these will be read in this order."""
        if not self._depth:
            return
        for number, (ref, following) in enumerate(itertools.pairwise(refs), 1):
            # One object in several transforms is fetched once.
            if ref != following and self._cache.is_remote(following.bucket):
                self._next.pop(ref, None)
                self._next[ref] = following
                if len(self._next) > MAX_ANNOUNCED:
                    self._next.popitem(last=False)
            if number % _STEP == 0:
                await asyncio.sleep(0)

    def reading(self, principal: Principal, ref: ObjectRef) -> None:
        """One of them is being read: fetch what follows."""
        if not self._next:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._full_until:
            return
        following = self._next.get(ref)
        for _ in range(self._depth):
            if following is None or len(self._tasks) >= AT_ONCE:
                return
            if following not in self._tasks and not self._cache.is_there(following):
                self._tasks[following] = loop.create_task(self._fetch(principal, following))
            following = self._next.get(following)

    async def _fetch(self, principal: Principal, ref: ObjectRef) -> None:
        try:
            await self._cache.fetch(principal, ref, pace=None, report=lambda _: None)
        except InsufficientStorage:
            self._full_until = asyncio.get_running_loop().time() + _FULL_SECONDS
        except ShardmillError as error:
            # Whoever asks for it is told.
            logger.debug("%s is not fetched ahead: %s", ref, error)
        finally:
            del self._tasks[ref]
