"""The pool of worker processes: which work is served next, by which worker, and how many there are.

Works that somebody waits for are served round robin, one batch at a turn, then the others, the oldest first. At most
`lanes` workers have batches at once; a work of another version that finds no lane stops workers from queueing further
batches, so it gets the next lane that falls free.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator

from shardmill.config import TransformSettings
from shardmill.core.errors import Busy, ShardmillError
from shardmill.etl.environments.environments import Environment
from shardmill.etl.processes.isolation import find_layers
from shardmill.etl.versions.registry import Version
from shardmill.etl.workers.batches import Failed, Work
from shardmill.etl.workers.worker import WorkerProcess, worker_key

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1  # between looks at memory, progress and what is printed
PARKED = 4  # workers per lane that may wait for slow readers while others work; each keeps its memory
_START_TRIES = 2
_RETRY_SECONDS = 1


class WorkerPool:
    """Workers of all versions. Use as an async context manager; on exit no process is left."""

    def __init__(self, settings: TransformSettings) -> None:
        self.lanes = settings.worker_count
        self.layers: dict[str, bool] = {}
        """Isolation layers as the newest worker reported them; before the first one, as a trial found them."""
        self._settings = settings
        self._names = itertools.count(1)
        self._works: dict[int, Work] = {}
        self._begun: set[int] = set()
        self._workers: list[WorkerProcess] = []
        self._starting: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._kicked = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "WorkerPool":
        self.layers = await find_layers()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        self._works.clear()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for worker in list(self._workers):
            worker.kill(None)
        if self._endings:
            await asyncio.wait(self._endings)

    def attach(self, work: Work) -> None:
        """Serve a work from now on."""
        self._works[work.number] = work
        self.kick()

    def detach(self, work: Work) -> None:
        """Stop serving it; workers that are busy with it are ended."""
        self._begun.discard(work.number)
        if self._works.pop(work.number, None) is not None:
            for worker in list(self._workers):
                worker.forget(work)
            self.kick()

    def kick(self) -> None:
        """Something changed: look for batches to hand out, once the current callback is through."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def retire(self, version_key: str) -> None:
        """End the idle workers of a version, so that the next batch finds a fresh one."""
        for worker in list(self._workers):
            if worker.version.key == version_key and not worker.in_flight:
                worker.kill(None)

    def is_at_work(self, environment: str) -> bool:
        """Whether a worker has something to do in an environment, by its name."""
        return any(worker.in_flight and worker.version.info.environment == environment for worker in self._workers)

    def count_by_environment(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for worker in self._workers:
            name = worker.version.info.environment
            counts[name] = counts.get(name, 0) + 1
        return counts

    def _dispatch(self) -> None:
        self._kicked = False
        for worker in self._workers:
            worker.refresh()
        # Called at every step of every reader, mostly with all workers busy and full.
        while self._can_take_more and self._hand_out_one():
            pass

    def _hand_out_one(self) -> bool:
        """Give one batch to one worker; False: nothing more can be done now."""
        waiting = sorted((work for work in self._works.values() if work.has_batch()), key=_order)
        free = self.lanes - self._active
        blocked: set[str] = set()
        blocked_ahead: set[str] = set()
        for work in waiting:
            key = _key(work)
            idle = next((worker for worker in self._for(work) if not worker.in_flight), None)
            if idle is not None and free > 0:
                return self._submit(work, idle)
            if free > 0 and not self._is_outlived(work):
                self._start(work, free)
                continue
            (blocked_ahead if work.is_ahead else blocked).add(key)
        for work in waiting:
            key = _key(work)
            if not work.has_batch(queued=True):
                # It waits for a worker that has nothing else to do, so until it has one nothing is queued in its place.
                return False
            # What nobody waits for keeps nobody from queueing.
            if (blocked | blocked_ahead if work.is_ahead else blocked) - {key}:
                continue
            queueing = [worker for worker in self._for(work) if worker.in_flight and worker.has_room]
            if queueing:
                return self._submit(work, min(queueing, key=lambda worker: worker.in_flight))
        return False

    def _submit(self, work: Work, worker: WorkerProcess) -> bool:
        batch = work.next_batch()
        if batch is None:
            return False
        self._begun.add(work.number)
        worker.submit(work, batch)
        if work.number in self._works:
            # Its turn is over: to the end of the line.
            self._works[work.number] = self._works.pop(work.number)
        return True

    @property
    def _active(self) -> int:
        """Workers that take up a lane: those with batches, but for a number that wait for slow readers."""
        busy = [worker for worker in self._workers if worker.in_flight]
        parked = sum(1 for worker in busy if worker.is_parked)
        return len(busy) - min(parked, PARKED * self.lanes)

    @property
    def _can_take_more(self) -> bool:
        """Whether a batch that there is would find a lane, or a place behind another one."""
        return any(worker.in_flight and worker.has_room for worker in self._workers) or self._active < self.lanes

    @property
    def at_work(self) -> int:
        """Workers that have batches, but for those that wait for slow readers."""
        return sum(1 for worker in self._workers if worker.in_flight and not worker.is_parked)

    async def warm(self, version: Version, environment: Environment) -> Failed | None:
        """Have at least one worker with the function loaded; a Failed says why it cannot be loaded.

        Raises:
            ConnectionError, TimeoutError, ShardmillError: No worker could be started.
        """
        environment_id = await environment.identify()
        if any(not worker.zygote.is_retired for worker in self._of(worker_key(version, environment_id))):
            return None
        return await self._add_worker(version, environment, environment_id, probing=False)

    def _of(self, key: str) -> Iterator[WorkerProcess]:
        return (worker for worker in self._workers if worker.is_ready and worker.key == key)

    def _for(self, work: Work) -> Iterator[WorkerProcess]:
        """Workers that a work may be given to. What was begun before an upgrade ends on those that it began on; what
        was only planned before may not begin on them, since they would import what is installed now.
        """
        return (worker for worker in self._of(_key(work)) if work.number in self._begun or not worker.zygote.is_retired)

    def _is_outlived(self, work: Work) -> bool:
        """It was begun before an upgrade, and its workers from then are the last that it can have."""
        return work.number in self._begun and any(worker.zygote.is_retired for worker in self._of(_key(work)))

    def _is_irreplaceable(self, worker: WorkerProcess) -> bool:
        """What was begun on it before an upgrade waits for its reader, or for the shard's bytes, and finds no other."""
        return worker.zygote.is_retired and any(
            number in self._begun and _key(work) == worker.key for number, work in self._works.items()
        )

    def _start(self, work: Work, free: int) -> None:
        key = _key(work)
        if work.whole is not None:
            # Each object is work for one worker; the samples of a shard are for all.
            free = min(free, sum(1 for other in self._works.values() if _key(other) == key and other.has_batch()))
        missing = free - self._starting.get(key, 0) - sum(1 for worker in self._for(work) if not worker.in_flight)
        for _ in range(missing):
            self._starting[key] = self._starting.get(key, 0) + 1
            task = asyncio.get_running_loop().create_task(self._start_worker(work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start_worker(self, work: Work) -> None:
        version, key = work.version, _key(work)
        try:
            failure = await self._add_worker(version, work.environment, work.environment_id, probing=work.probing)
            if failure is not None:
                self._tell(key, lambda other: other.on_load_failed(failure))
        except (ConnectionError, TimeoutError, OSError, ShardmillError) as error:
            cause = error
            logger.info("no worker for %s: %s", version.label, cause)
            self._tell(key, lambda other: other.on_no_worker(cause))
        finally:
            self._starting[key] -= 1
            self.kick()

    async def _add_worker(
        self, version: Version, environment: Environment, environment_id: str, *, probing: bool
    ) -> Failed | None:
        self._make_place(worker_key(version, environment_id))
        for attempt in itertools.count(1):
            try:
                zygote = await environment.zygote(version.info.modules)
                if zygote.environment_id != environment_id:
                    message = f"environment {environment.name!r} was changed just now; ask again"
                    raise Busy(message, retry_after=_RETRY_SECONDS)
                path = zygote.scratch / f"worker-{next(self._names)}"
                worker = WorkerProcess(version, zygote, path, self._settings, on_change=self._on_change)
                failure = await worker.start(probing=probing)
            except ConnectionError:
                # The zygote may have died since it was last asked; another is started once.
                if attempt >= _START_TRIES:
                    raise
                continue
            break
        if failure is not None:
            await worker.wait_ended()
            return failure
        self.layers = worker.layers
        self._workers.append(worker)
        return None

    def _tell(self, key: str, say: Callable[[Work], None]) -> None:
        for work in [work for work in self._works.values() if _key(work) == key]:
            say(work)

    def _make_place(self, key: str) -> None:
        """End the longest idle workers of other versions when there are many."""
        others = [worker for worker in self._workers if not worker.in_flight and worker.key != key]
        idle = [worker for worker in others if not self._is_irreplaceable(worker)]
        idle.sort(key=lambda worker: worker.idle_since)
        for worker in idle[: max(0, len(self._workers) + 1 - 3 * self.lanes)]:
            worker.kill(None)

    def _on_change(self, worker: WorkerProcess) -> None:
        if worker.is_gone:
            if worker in self._workers:
                self._workers.remove(worker)
            # One that ends before it was ready, too.
            task = asyncio.get_running_loop().create_task(worker.wait_ended())
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)
        self.kick()

    async def _watch(self) -> None:
        previous = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            busy = {number for worker in self._workers if not worker.is_parked for number in worker.works}
            for worker in list(self._workers):
                worker.watch(now)
                is_spare = worker.zygote.is_retired or now - worker.idle_since > self._settings.idle_workers
                if not worker.in_flight and is_spare and not self._is_irreplaceable(worker):
                    worker.kill(None)
            for work in list(self._works.values()):
                work.on_tick(now - previous, work.number in busy)
            previous = now


def _order(work: Work) -> tuple[bool, int]:
    """What somebody waits for, in turns; then the rest, the oldest first.

    Taking turns, the shards of a job would all end at once, and leave the workers idle while they are stored.
    """
    return work.is_ahead, work.number if work.is_ahead else 0


def _key(work: Work) -> str:
    return worker_key(work.version, work.environment_id)
