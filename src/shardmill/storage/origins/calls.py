"""Calls to an origin: tried again with back-off as often as allowed, and counted."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shardmill.config import OriginSettings
from shardmill.core.errors import BackendUnavailable, ShardmillError
from shardmill.core.origins import OriginStatistics

Value = TypeVar("Value")


class Calls:
    """The calls of one origin."""

    def __init__(self, settings: OriginSettings) -> None:
        self.settings = settings
        self.bytes_read = 0
        self.bytes_written = 0
        self.unlisted = 0
        self._requests: Counter[str] = Counter()
        self._seconds = 0.0

    async def run(self, call: Callable[[], Awaitable[Value]]) -> Value:
        """What the call returns; what may pass (BackendUnavailable) is tried again."""
        attempt = 0
        while True:
            try:
                return await self.once(call)
            except BackendUnavailable as error:
                if attempt >= self.settings.retries:
                    raise
                await self.wait(attempt, error)
                attempt += 1

    async def once(self, call: Callable[[], Awaitable[Value]]) -> Value:
        """What the call returns; for what only the caller can repeat."""
        started = time.monotonic()
        outcome = "cancelled"
        try:
            value = await call()
            outcome = "ok"
            return value
        except ShardmillError as error:
            outcome = error.code
            raise
        finally:
            self._requests[outcome] += 1
            self._seconds += time.monotonic() - started

    async def wait(self, attempt: int, error: BackendUnavailable) -> None:
        """Back off after a failure, the longer the more often; as long as the origin asks for, within the bound."""
        settings = self.settings
        pause = min(settings.max_backoff, settings.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        asked = min(settings.max_backoff, error.retry_after or 0)
        await asyncio.sleep(max(pause, asked))

    def statistics(self) -> OriginStatistics:
        return OriginStatistics(self.bytes_read, self.bytes_written, dict(self._requests), self._seconds, self.unlisted)
