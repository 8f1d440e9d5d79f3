"""Reading one version to its end, whatever breaks on the way.

An answer that breaks off is asked for again from the byte where it stopped, as the version that it was of. What cannot
be resumed so, since the origin tells no version, fails.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from shardmill.core.errors import BackendUnavailable, ObjectChanged
from shardmill.core.origins import InThread, OriginFacts
from shardmill.storage.origins.calls import Calls
from shardmill.storage.origins.drawn import DrawnBody
from shardmill.storage.steps import finish

PROGRESS = 1 << 20  # bytes; a resumption that brings less counts as none, so that a trickle has an end


class Answer(Protocol):
    """One answer of the origin to one request."""

    facts: OriginFacts
    body: DrawnBody | None
    """Its bytes, where threads can receive them."""

    def pieces(self) -> AsyncGenerator[memoryview, None]:
        """Its bytes from the start asked for; raises BackendUnavailable where it breaks off."""
        ...

    async def close(self) -> None: ...


Ask = Callable[[int, int | None, str | None], Awaitable[Answer]]
"""Ask for bytes [start, stop) of a version; raises ObjectChanged for another one."""


class ResumedRead:
    """See `core.origins.DrawnRead`. Build it with `ResumedRead.begin`, end it with `close`."""

    def __init__(self, ask: Ask, answer: Answer, start: int, stop: int | None, calls: Calls, label: str) -> None:
        self.facts = answer.facts
        self._ask = ask
        self._answer: Answer | None = answer
        self._position = start
        size = self.facts.size
        self._stop = size if stop is None else stop if size is None else min(stop, size)
        self._calls = calls
        self._label = label
        self._walk: AsyncGenerator[memoryview, None] | None = None
        self._parts: AsyncGenerator[memoryview, None] | None = None
        """Of the answer, where it is walked."""
        self._attempt, self._mark = 0, start
        """Tries since, and where the last one that brought something worth it began."""

    @classmethod
    async def begin(
        cls, ask: Ask, start: int, stop: int | None, version: str | None, calls: Calls, label: str
    ) -> "ResumedRead":
        answer = await calls.run(lambda: ask(start, stop, version))
        return cls(ask, answer, start, stop, calls, label)

    def __aiter__(self) -> AsyncGenerator[memoryview, None]:
        assert self._walk is None, "a read can be walked once"
        self._walk = self._pieces()
        return self._walk

    @property
    def is_drawn(self) -> bool:
        return self._answer is not None and self._answer.body is not None

    async def draw(self, give: Callable[[memoryview], None], most: int, in_thread: InThread) -> int:
        while True:
            try:
                count = await self._draw(give, most, in_thread)
                if not count:
                    self._check_end()
                self._count(count)
                return count
            except BackendUnavailable as error:
                await self._resume(error)
                if self._answer is None:
                    return 0

    async def close(self) -> None:
        if self._walk is not None:
            await self._walk.aclose()
        await self._drop()

    async def _draw(self, give: Callable[[memoryview], None], most: int, in_thread: InThread) -> int:
        """Bytes given; 0: the answer has ended."""
        assert self._answer is not None
        if self._answer.body is not None:
            return await self._answer.body.draw(give, most, in_thread)
        if self._parts is None:
            self._parts = self._answer.pieces()
        piece = await anext(self._parts, None)
        if piece is None:
            return 0
        await finish(in_thread(give, piece))
        return len(piece)

    async def _pieces(self) -> AsyncGenerator[memoryview, None]:
        while self._answer is not None:
            try:
                self._parts = self._answer.pieces()
                async for piece in self._parts:
                    self._count(len(piece))
                    yield piece
                self._check_end()
                return
            except BackendUnavailable as error:
                await self._resume(error)

    def _count(self, size: int) -> None:
        self._position += size
        self._calls.bytes_read += size

    async def _resume(self, error: BackendUnavailable) -> None:
        """Ask for the rest behind an answer that broke off; there is no answer if nothing is left to ask for."""
        await self._drop()
        if self._position - self._mark >= PROGRESS:
            self._attempt, self._mark = 0, self._position
        if self._attempt >= self._calls.settings.retries or not self._can_resume():
            raise error
        await self._calls.wait(self._attempt, error)
        self._attempt += 1
        if self._position != self._stop:
            self._answer = await self._calls.run(lambda: self._ask(self._position, self._stop, self.facts.version))

    def _check_end(self) -> None:
        if self._stop is not None and self._position != self._stop:
            raise BackendUnavailable(f"{self._label}: the store ended at byte {self._position} of {self._stop}")

    def _can_resume(self) -> bool:
        return self.facts.validator != "none"

    async def _drop(self) -> None:
        parts, self._parts = self._parts, None
        if parts is not None:
            await parts.aclose()
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.close()


def check_version(facts: OriginFacts, version: str | None, label: str) -> None:
    """Raise ObjectChanged unless the facts are of the version asked for."""
    if version is not None and facts.version != version:
        raise ObjectChanged(f"{label} was replaced while it was read; read it again")
