"""One run from its first reader to its last, and what each of them holds of it.

Memory and descriptor of a run are given back once nobody reads it and nothing works for it any more.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardmill.core.api import RunInfo
from shardmill.core.sources import Slice, Source, Spool
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.run import Run
from shardmill.etl.runs.spool import Follower


@dataclass(frozen=True, slots=True)
class RunCounts:
    """Source samples of a run; of whole objects there is one."""

    samples: int
    """That gave something."""
    failures: int
    dropped: int

    @property
    def facts(self) -> dict[str, str]:
        """As kept with a result."""
        return {"samples": str(self.samples), "failures": str(self.failures), "dropped": str(self.dropped)}

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> "RunCounts | None":
        """As kept with a result; None: by a node that did not keep them."""
        try:
            return cls(int(facts["samples"]), int(facts["failures"]), int(facts["dropped"]))
        except (KeyError, ValueError):
            return None


class Running:
    """One run from its first reader to its last."""

    def __init__(self, plan: Plan, run: Run, source: Source, request_id: str, key: str | None) -> None:
        self.plan = plan
        self.run = run
        self.request_id = request_id
        self.key = key
        """None: it is nobody else's."""
        self.is_scratch = plan.is_scratch
        self.ended = asyncio.Event()
        """The result is kept, or there is none; readers may still be reading."""
        self.source = source
        self.spool: Spool | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_through = False
        """Its task has nothing more to do."""
        self.is_prepared = False
        """It was begun before anybody asked, and nobody has yet."""
        self.expected_until = 0.0
        """Until then a reader who has left is expected back."""
        self.is_given_up = False
        """Nobody will ask for it."""
        self.is_settled = asyncio.Event()
        """Somebody has asked, or nobody will be waited for any more."""

    @property
    def is_ending(self) -> bool:
        return self.run.output.is_complete or self.run.output.error is not None

    @property
    def counts(self) -> RunCounts:
        counters = self.run.counters
        return RunCounts(counters.samples, counters.failures, counters.dropped)

    @property
    def may_be_kept(self) -> bool:
        """Its end may be that of a result; else it only waits for its readers, whoever comes included."""
        return self.run.output.error is not None or self.run.output.is_spooling

    def describe(self) -> RunInfo:
        run, output = self.run, self.run.output
        return RunInfo(
            id=f"run-{run.number}",
            transform=self.plan.version.label,
            spec=self.plan.shown_spec,
            bucket=str(self.plan.ref.bucket),
            object=self.plan.ref.key,
            state="failed" if output.error is not None else "ended" if output.is_complete else "running",
            readers=output.readers,
            ahead=self.is_prepared,
            shared=self.key is not None,
            started=run.started,
            done=1.0 if output.is_complete else min(1.0, run.fraction_done),
            statistics=run.snapshot(),
            rate=run.rate,
            published=output.published,
            taken=int(min(output.fastest, output.published)),
        )

    def dispose(self) -> None:
        """Give back memory and descriptor, once nobody reads and nothing works; called once."""
        self.run.end_clock()
        self.run.output.close()
        if self.spool is not None:
            self.spool.close()
            self.spool = None


class Reading:
    """One reader's lease on a run. Resources: `close` it."""

    def __init__(self, running: Running, follower: Follower, leave: Callable[[Running], None]) -> None:
        self.number = running.run.number
        self.seed = running.run.seed
        self.running = running
        self._follower = follower
        self._leave = leave
        self._is_closed = False

    async def start(self) -> None:
        """Return when the first bytes may be sent; raises what failed before."""
        await self._follower.start()

    async def next(self) -> Slice | None:
        """The next bytes, valid until more are asked for; None at the end. Raises when the run fails midway."""
        return await self._follower.next()

    @property
    def done(self) -> float:
        """How much of the work is done, 0 to 1; 0 where that is not known."""
        return 1.0 if self.running.run.output.is_complete else min(1.0, self.running.run.fraction_done)

    @property
    def counts(self) -> "RunCounts":
        """What the run has come to until now."""
        return self.running.counts

    async def wait_kept(self) -> None:
        """Return when the result is kept; raises why it never will be."""
        await self._follower.wait_complete()
        await self.running.ended.wait()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._follower.close()
            self._leave(self.running)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished result, opened; the receiver closes its source."""

    source: Source
