"""All runs of a node with their readers: work is done once, and what it gave is kept as the policy says.

Readers of one key share one run; later ones get its finished result. A run lives as long as somebody reads it, except
that one nearly done is finished for whoever comes next. The last reader who leaves frees everything.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from shardmill.core.errors import Busy, ServerError, ShardmillError
from shardmill.core.sources import ResultFiles, Source, Spool
from shardmill.etl.runs.plan import Plan
from shardmill.etl.runs.remembering import RememberedFailures
from shardmill.etl.runs.run import Run
from shardmill.etl.runs.running import Finished, Reading, Running
from shardmill.etl.versions.registry import Version

logger = logging.getLogger(__name__)

NEARLY_DONE = 0.8  # of the source samples; a run past it is finished though nobody reads it
PREPARED_SECONDS = 60.0  # that a run begun ahead waits for its reader
WAIT_SECONDS = 30.0  # for a finished result, where only that will do
RETURN_SECONDS = 10.0  # that a run goes on for a reader who was told to come again

_RETRY_SECONDS = 2


class Runs:
    """Runs that go on, by what they give. Use as an async context manager; on exit none is left.

    Args:
        build: Makes the run of a plan; `request_id` is whom its failures are told to.
        files: Where results are kept; None: nothing is, and no two readers share a run.
        max_runs: Beyond, Busy.
        link: Told that a request is answered by another request's run.
        identify_command: What `Plan.executable` would be now.
        prepared_seconds: That a run begun ahead waits for its reader.
    """

    def __init__(
        self,
        build: Callable[[Plan, Source, str], Run],
        files: ResultFiles | None,
        *,
        max_runs: int,
        link: Callable[[str, str], None],
        identify_command: Callable[[Version], Awaitable[str]],
        prepared_seconds: float = PREPARED_SECONDS,
    ) -> None:
        self._build = build
        self._files = files
        self._max_runs = max_runs
        self._link = link
        self._identify_command = identify_command
        self._prepared_seconds = prepared_seconds
        self._shared: dict[str, Running] = {}
        self._all: set[Running] = set()
        self._prepared: dict[str, Running] = {}
        self._failed = RememberedFailures(link)
        self.outcomes = {"ended": 0, "failed": 0, "abandoned": 0}
        """Runs since the start."""
        self.reads = {"hit": 0, "joined": 0, "started": 0}
        """Readers since the start, by what they were given: a finished result, a run of others, a run of their own."""
        self.ahead = {"prepared": 0, "used": 0, "unused": 0}
        """Runs that were begun before anybody asked."""

    async def __aenter__(self) -> "Runs":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)  # tasks that are cancelled before their first step never clean up
        tasks = [running.task for running in self._all if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for running in list(self._all):
            running.dispose()
        self._all.clear()

    @property
    def going_on(self) -> int:
        return sum(1 for running in self._all if not running.ended.is_set())

    def live(self) -> list[Running]:
        """Runs that go on or are being read, the oldest first."""
        return sorted(self._all, key=lambda running: running.run.number)

    def is_run_in(self, environment: str) -> bool:
        """Whether a run that goes on is of an environment, by its name."""
        return any(not one.ended.is_set() and one.plan.environment.name == environment for one in self._all)

    @property
    def can_finish(self) -> bool:
        """Whether results are kept at all."""
        return self._files is not None

    def has_result(self, plan: Plan) -> bool:
        return self._files is not None and plan.is_shared and self._files.has(plan.key)

    def is_made(self, plan: Plan) -> bool:
        """Whether a reader would find all of it there."""
        running = self._prepared.get(plan.key) or (self._shared.get(plan.key) if plan.is_shared else None)
        return self.has_result(plan) or (running is not None and running.run.output.is_complete)

    async def open_finished(self, plan: Plan) -> Finished | None:
        """The finished result if there is one; starts nothing."""
        if self._files is None or not plan.is_shared:
            return None
        source = await self._files.open(plan.key)
        return Finished(source) if source is not None else None

    async def open(
        self, plan: Plan, source: Source, *, request_id: str, waits_for_all: bool = False, is_patient: bool = False
    ) -> Reading | Finished:
        """The finished result, or a place at the run that gives it, which is started if need be.

        Args:
            plan: What is wanted.
            source: The opened shard; closed here, or by the run that it is used for.
            request_id: Names the reader in records.
            waits_for_all: The reader takes nothing before the end; see `Reading.wait_kept`.
            is_patient: The run gives way to those that somebody waits for, and what it gives is scratch.

        Raises:
            Busy: There are `max_runs` already.
            ShardmillError: The run failed a moment ago and would again.
        """
        try:
            opened = await self._find(plan, request_id, waits_for_all=waits_for_all, is_patient=is_patient)
            if opened is not None:
                source.close()
                self.reads["hit" if isinstance(opened, Finished) else "joined"] += 1
                return opened
            running = self._start(replace(plan, is_scratch=True) if is_patient else plan, source, request_id)
            self.reads["started"] += 1
        except BaseException:
            source.close()
            raise
        return self._read(running, waits_for_all=waits_for_all, is_patient=is_patient)

    def prepare(self, plan: Plan, source: Source, *, request_id: str) -> bool:
        """Begin a run that somebody will ask for soon, at most `spool_window` bytes far; False: no need, or no room.

        It gives way to runs that are read, and is given up when nobody has asked for `prepared_seconds`.

        Args:
            plan: What will be asked for. Without a seed the first who asks gets this run, and nobody else.
            source: The opened shard; closed here, or by the run.
            request_id: Names the run in records.
        """
        files, key = self._files, plan.key
        is_known = key in self._prepared or (plan.is_shared and (key in self._shared or (files and files.has(key))))
        if files is None or is_known or key in self._failed or self.going_on >= self._max_runs:
            source.close()
            return False
        running = self._start(plan, source, request_id)
        running.is_prepared = True
        self._prepared[key] = running
        self.ahead["prepared"] += 1
        asyncio.get_running_loop().call_later(self._prepared_seconds, self._give_up, key, running)
        return True

    def count_hit(self, key: str, request_id: str) -> None:
        """A finished result that is kept open is read, as if `open` had found it."""
        if not self._take_made(key, request_id) and self._files is not None:
            self._files.keep(key)
        self.reads["hit"] += 1

    def _take_made(self, key: str, request_id: str) -> bool:
        """Whether a run was begun for this reader, whose result is there: nobody reads the run itself any more."""
        running = self._take_prepared(key, request_id)
        if running is not None:
            self._end_unread(running)
        return running is not None

    def _take_prepared(self, key: str, request_id: str) -> Running | None:
        """The run that was begun for this reader."""
        running = self._prepared.pop(key, None)
        if running is None:
            return None
        running.is_prepared = False
        running.is_settled.set()
        self.ahead["used"] += 1
        self._link(request_id, running.request_id)
        return running

    def _give_up(self, key: str, running: Running) -> None:
        if self._prepared.get(key) is not running:
            return
        del self._prepared[key]
        running.is_prepared = False
        running.is_given_up = True
        running.is_settled.set()
        self.ahead["unused"] += 1
        if not running.is_ending:
            self._stop(running)
        self._end_unread(running)

    async def wait_finished(self, plan: Plan, source: Source, *, request_id: str) -> Finished:
        """The finished result, waited for; the run is started if need be.

        Raises:
            Busy: It is not there in time, or cannot be kept.
            ShardmillError: The run failed.
        """
        opened = await self.open(plan, source, request_id=request_id, waits_for_all=True)
        if isinstance(opened, Finished):
            return opened
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await opened.wait_kept()
        except TimeoutError:
            self._expect_back(opened.running)
            message = "the result is not finished yet; try again, or read it as a whole, without Range"
            raise Busy(message, retry_after=_RETRY_SECONDS) from None
        finally:
            opened.close()
        finished = await self.open_finished(plan)
        if finished is None:
            message = "there is no room to keep the result; read it as a whole, without Range"
            raise Busy(message, retry_after=int(WAIT_SECONDS))
        return finished

    def _expect_back(self, running: Running) -> None:
        """A reader who leaves comes again in a moment, and must not find the run at its start."""
        running.expected_until = time.monotonic() + RETURN_SECONDS
        asyncio.get_running_loop().call_later(RETURN_SECONDS, self._on_left, running)
        running.run.output.run_on()

    async def _find(
        self, plan: Plan, request_id: str, *, waits_for_all: bool, is_patient: bool
    ) -> Reading | Finished | None:
        """What is there already. When it is None, nothing was awaited since that was seen."""
        files = self._files
        if files is None:
            return None
        key = plan.key
        if not plan.is_shared:
            # What was begun ahead is somebody else's, who announced it.
            prepared = None if is_patient else self._take_prepared(key, request_id)
            if prepared is None:
                return None
            if prepared.run.output.can_be_joined:
                reading = self._read(prepared, waits_for_all=waits_for_all, is_patient=False)
                if not prepared.is_ending and not waits_for_all:
                    # Nobody else will read it: what is still to come goes from memory to its reader, as if never begun.
                    prepared.run.output.stop_spooling()
                return reading
            self._on_left(prepared)
            return None
        # A patient reader makes nothing that is worth keeping of what was scratch.
        is_first = is_patient
        while True:
            self._failed.raise_known(key, request_id)
            running = self._shared.get(key)
            if running is not None:
                is_first |= self._take_prepared(key, request_id) is not None
                if not running.run.output.can_be_joined:
                    return None
                if running.is_ending and running.may_be_kept:
                    await running.ended.wait()
                    continue
                if not is_first:
                    running.is_scratch = False
                self._link(request_id, running.request_id)
                return self._read(running, waits_for_all=waits_for_all, is_patient=is_patient)
            if not files.has(key):
                return None
            is_first |= self._take_made(key, request_id)
            source = await files.open(key)
            if source is not None:
                if not is_first:
                    files.keep(key)
                return Finished(source)

    def _read(self, running: Running, *, waits_for_all: bool, is_patient: bool) -> Reading:
        follower = running.run.output.follow(waits_for_all=waits_for_all, is_patient=is_patient)
        return Reading(running, follower, self._on_left)

    def _start(self, plan: Plan, source: Source, request_id: str) -> Running:
        if not self._has_place():
            raise Busy(f"{self.going_on} runs are going on (max_runs); try again", retry_after=_RETRY_SECONDS)
        # Where another run of this key can no longer be joined, this one is for its own reader only.
        is_shared = plan.is_shared and self._files is not None and plan.key not in self._shared
        running = Running(
            plan, self._build(plan, source, request_id), source, request_id, plan.key if is_shared else None
        )
        if running.key is not None:
            self._shared[running.key] = running
        self._all.add(running)
        running.task = asyncio.get_running_loop().create_task(self._carry_out(running))
        return running

    def _has_place(self) -> bool:
        """Whether one more run may go on for a reader; one that was begun ahead is given up for it."""
        going_on = [running for running in self._all if not running.ended.is_set() and not running.is_given_up]
        if len(going_on) < self._max_runs:
            return True
        found = next((item for item in self._prepared.items() if not item[1].ended.is_set()), None)
        if found is not None:
            self._give_up(*found)
        return found is not None

    async def _carry_out(self, running: Running) -> None:
        run, output = running.run, running.run.output
        is_kept = False
        outcome = "abandoned"
        try:
            running.spool = await self._begin_spool(running)
            await run.work(running.spool)
            outcome = "failed" if output.error is not None else "ended"
            if output.error is not None:
                if running.key is not None and run.state.is_fault_of_input:
                    self._failed.remember(running.key, output.error, running.request_id)
            elif running.key is not None and running.spool is not None and output.spooled == output.published:
                is_kept = await self._keep(running, running.spool)
        finally:
            self.outcomes[outcome] += 1
            self._forget(running)
            if not running.is_ending:
                # Stopped, or broken: who reads it all the same must not wait for ever.
                output.fail(ServerError("the run was stopped"))
            running.source.close()
            running.ended.set()
            if running.spool is not None and not is_kept:
                try:
                    if running.is_prepared and outcome == "ended":
                        await running.is_settled.wait()
                finally:
                    await running.spool.abandon()
            running.is_through = True
            self._end_unread(running)

    async def _begin_spool(self, running: Running) -> Spool | None:
        if self._files is None or (running.key is None and not running.is_prepared):
            return None
        try:
            return await self._files.begin(running.plan.key)
        except ShardmillError as error:
            logger.info("the result of run %d is not kept: %s", running.run.number, error)
            return None

    async def _keep(self, running: Running, spool: Spool) -> bool:
        plan = running.plan
        if await plan.environment.look() != plan.environment_id:
            logger.info(
                "the result of run %d is not kept: environment %s has changed",
                running.run.number,
                plan.environment.name,
            )
            return False
        if await self._identify_command(plan.version) != plan.executable:
            logger.info("the result of run %d is not kept: the command was replaced", running.run.number)
            return False
        try:
            facts = {**running.plan.facts, **running.counts.facts}
            await spool.publish(facts, is_scratch=running.is_scratch)
        except ShardmillError as error:
            logger.info("the result of run %d is not kept: %s", running.run.number, error)
            return False
        return True

    def _on_left(self, running: Running) -> None:
        """A reader has gone; with the last one the run goes too, unless it is nearly done and will be kept."""
        output = running.run.output
        if output.readers:
            return
        if running.ended.is_set():
            self._end_unread(running)
        elif running.expected_until > time.monotonic():
            return
        elif running.is_ending:
            # What is left is to keep the result, or to clean up.
            return
        elif output.is_spooling and running.run.fraction_done > NEARLY_DONE:
            output.run_on()
        else:
            self._stop(running)

    def _stop(self, running: Running) -> None:
        """End a run that nobody reads. Whoever asks from now on gets another one: this one has nothing more to give."""
        self._forget(running)
        if running.task is not None:
            # Not at once: a task that is cancelled before its first step never cleans up.
            asyncio.get_running_loop().call_soon(running.task.cancel)

    def _forget(self, running: Running) -> None:
        """No further reader joins it."""
        if running.key is not None and self._shared.get(running.key) is running:
            del self._shared[running.key]

    def _end_unread(self, running: Running) -> None:
        if running.is_through and not running.is_prepared and not running.run.output.readers and running in self._all:
            self._all.discard(running)
            running.dispose()
