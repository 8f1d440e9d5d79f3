"""What the connections of a front share: the gate, what is kept, buffers, counts."""

import asyncio
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from shardmill.config import ServerSettings
from shardmill.core.errors import (
    MemberNotFound,
    ObjectNotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
)
from shardmill.core.kept import Kept
from shardmill.node.access import ANONYMOUS
from shardmill.node.finished import FinishedResults, OpenResult
from shardmill.node.objects import Objects
from shardmill.node.shards import Shards
from shardmill.server.front.answers import Clock, RequestIds, ready_answer, ready_error, ready_result
from shardmill.server.front.ears import Ears
from shardmill.server.front.gate import Gate
from shardmill.server.front.plans import Plan, Ready
from shardmill.server.front.residency import Residency
from shardmill.server.front.uploads import Upload, Uploads
from shardmill.server.security import HostRules
from shardmill.telemetry import logs

logger = logging.getLogger(__name__)

COPIED = 32 << 10  # bytes of a body up to which a copy costs less than a call more
SMALL = 128 << 10  # bytes of a body that is read whole before the last look at its file
_RECEIVED = 256 << 10  # bytes taken from a socket at once

_NOBODY = nullcontext()

_SAID = (ObjectNotFound, MemberNotFound, PreconditionFailed, RangeNotSatisfiable)
"""Errors that the front answers with; what says more is aiohttp's."""


@dataclass(slots=True)
class Tally:
    """Requests of one route and the bytes of their bodies, counted by who answers by the thousand."""

    statuses: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    received: int = 0

    def count(self, status: str) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def take(self) -> tuple[dict[str, int], int, int]:
        """What came since the last time."""
        taken = self.statuses, self.sent, self.received
        self.statuses, self.sent, self.received = {}, 0, 0
        return taken


class Desk:
    """Everything that the connections of one node's front have in common.

    Args:
        threads: The senders'.
        max_object: Bytes.
    """

    def __init__(
        self,
        objects: Objects,
        shards: Shards,
        finished: FinishedResults,
        rules: HostRules,
        settings: ServerSettings,
        threads: ThreadPoolExecutor,
        tallies: Mapping[str, Tally],
        max_object: int,
    ) -> None:
        self.objects = objects
        self.finished = finished
        self.is_draining = False
        """Nothing that may be work is begun."""
        self.settings = settings
        self.threads = threads
        self.tallies = tallies
        """By route."""
        self.gate = Gate(rules)
        self.uploads = Uploads(objects, rules, max_object, settings.body_timeout)
        self.known: Mapping[bytes, Plan] = self.gate.known
        self.ears = Ears(asyncio.get_running_loop())
        self.ids = RequestIds()
        self.clock = Clock()
        self.residency = Residency()
        self.is_verbose = logger.isEnabledFor(logging.DEBUG)
        self.is_telling = logger.isEnabledFor(logging.INFO)
        self._shards = shards
        self.received = memoryview(bytearray(_RECEIVED))
        """What a connection receives, until it has looked at it."""
        self._body = memoryview(bytearray(SMALL))

    def next_plan(self, data: bytes, start: int) -> Plan | None:
        """The request that begins at `start` of what came; None: it is not the front's, or not all of it is there."""
        plan = self.gate.next_plan(data, start)
        if plan is None or (plan.made is not None and (self.is_draining or not self.finished.is_keeping)):
            return None
        return None if plan.ready is None and not self.objects.keeps(plan.ref.bucket) else plan

    def close(self) -> None:
        """Listen to nobody any more."""
        self.ears.close()

    def close_unused(self) -> None:
        """Close what is kept open and was not asked for since the last call."""
        self.objects.close_unused()
        self.finished.close_unused()

    def look_up(self, plan: Plan) -> Ready | None:
        """The answer by what is kept open; None: something has to be opened or read first.

        Raises:
            ShardmillError: One that the front does not say itself.
        """
        self.objects.check(ANONYMOUS, "read", plan.ref.bucket)
        plan.is_allowed = True
        if plan.made is not None:
            found = self.finished.get(ANONYMOUS, plan.made)
            return None if found is None else self._answer_result(plan, found)
        kept = self.objects.kept(ANONYMOUS, plan.ref)
        return None if kept is None or not kept.is_current else self._answer(plan, kept)

    async def open(self, plan: Plan) -> Ready | None:
        """The answer once the object is open; None: it is not the front's.

        Raises:
            ShardmillError: One that the front does not say itself.
        """
        if plan.made is not None:
            found = await self.finished.open(ANONYMOUS, plan.made)
            return None if found is None or not found.kept.is_current else self._answer_result(plan, found)
        kept = await self.objects.keep(ANONYMOUS, plan.ref)
        if kept is None or not kept.is_current:
            return None
        ready = self._answer(plan, kept)
        if ready is not None or plan.member is None:
            return ready
        # The index is made or loaded by whoever asks for the first member.
        opened = await self._shards.open_member(ANONYMOUS, plan.ref, plan.member)
        opened.source.close()
        return self._answer(plan, kept) if kept.is_current else None

    def _answer(self, plan: Plan, kept: Kept) -> Ready | None:
        try:
            member = None
            if plan.member is not None:
                # Without a shard its index has to be forgotten, too.
                shard = kept.source
                member = None if shard is None else self._shards.member_of(plan.ref, shard.meta, plan.member)
                if member is None:
                    return None
            plan.ready = ready_answer(plan, kept, member)
        except _SAID as error:
            plan.ready = ready_error(kept, error)
        return plan.ready

    def _answer_result(self, plan: Plan, found: OpenResult) -> Ready:
        try:
            plan.ready = ready_result(plan, found)
        except _SAID as error:
            plan.ready = ready_error(found.kept, error)
        return plan.ready

    def reading(self, plan: Plan, ready: Ready, request_id: bytes) -> AbstractContextManager[None]:
        """Around the sending of an answer: whoever counts readings, or follows them, is told."""
        kept = ready.kept
        if kept.source is None or ready.error is not None:
            return _NOBODY
        if kept.on_read is not None:
            kept.on_read(ready.start, ready.stop)
        if not plan.is_followed:
            return _NOBODY
        if plan.made is not None:
            return self.finished.reading(ANONYMOUS, plan.made, kept.source.meta.key, request_id.decode())
        self.objects.is_read(ANONYMOUS, plan.ref)
        return _NOBODY

    def head_of(self, ready: Ready, request_id: bytes, now: float) -> bytes:
        return b"".join((ready.head, request_id, ready.rest, self.clock.end_of_head(now)))

    def read_small(self, ready: Ready) -> memoryview | None:
        """A body in the shared buffer, valid until the next call; None: the disk would have to be waited for."""
        source = ready.kept.source
        assert source is not None
        size = ready.stop - ready.start
        view = self._body[:size]
        try:
            if os.preadv(source.descriptor, (view,), ready.start, os.RWF_NOWAIT) != size:
                return None
        except OSError:
            return None
        return view

    def log(
        self, plan: Plan | Upload, request_id: bytes, status: str, sent: int, seconds: float, why: str | None = None
    ) -> None:
        """The line of one request."""
        is_quiet = status in ("200", "201", "206", "304")
        if is_quiet and not self.is_verbose:
            return
        token = logs.request_id.set(request_id.decode())
        if why is not None:
            logger.info("%s %s: answer cut: %s", plan.method, plan.path, why)
        logger.log(
            logging.DEBUG if is_quiet else logging.INFO,
            "%s %s %s %d bytes %.1f ms",
            plan.method,
            plan.path,
            status,
            sent,
            seconds * 1000,
        )
        logs.request_id.reset(token)
