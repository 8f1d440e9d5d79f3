"""Interpreters in which transforms run: started when first needed, chosen by what the code imports.

An environment has at most one zygote that forks; a replaced one lives until its last worker is gone. Whatever is
installed into it or removed from it ends its zygote, so that an id always names what its workers import.
"""

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from shardmill.config import PACKAGES_PREFIX, ConfigError
from shardmill.core.api import EnvironmentInfo
from shardmill.core.errors import Conflict, EnvironmentUnfit, NotFound, TransformFailed
from shardmill.core.requirements import Requirement
from shardmill.etl.environments.packages import Built, Packages
from shardmill.etl.environments.uv import NotPython, ask, inspect
from shardmill.etl.processes.zygotes import Zygote
from shardmill.etl.steps import close_all

logger = logging.getLogger(__name__)

DEFAULT = "default"

CHECK_SECONDS = 5.0  # that an interpreter is waited for when the node starts

LOOK_SECONDS = 1.0  # between looks at what is installed

RUNNING = 8  # built environments that are kept running though they do nothing

# What decoding and encoding import on first use; loaded once instead of in every worker.
_BASE_MODULES = (
    "cloudpickle",
    "numpy",
    "numpy.random",
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
)
_WORKER_MODULES = ("shardmill.worker.samples",)


class Environment:
    """One interpreter; its zygote is started by `zygote` and shared by all who ask."""

    def __init__(self, name: str, interpreter: Path, *, stage: Path, scratch: Path, load_seconds: float) -> None:
        self.name = name
        self.interpreter = interpreter
        self._stage = stage
        self._home = scratch / name
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load_seconds = load_seconds
        self._lock = asyncio.Lock()
        self._zygote: Zygote | None = None
        self._retired: list[Zygote] = []
        self._wanted: dict[str, None] = {}
        self._excluded: set[str] = set()
        self._preloaded: tuple[str, ...] = ()
        self._error: str | None = None
        self._starting = False
        self._is_closed = False
        self._looked_at = 0.0
        self._label = _label_of(interpreter)
        self._distributions: int | None = None
        self.id: str | None = None
        self.python: str | None = None

    async def zygote(self, modules: Sequence[str] = (), *, progress: Callable[[str], None] | None = None) -> Zygote:
        """The running zygote with the modules imported, as far as they can be.

        Args:
            modules: Top-level modules that a function imports.
            progress: Told what takes long.

        Raises:
            TransformFailed: The interpreter does not start.
        """
        missing = [name for name in modules if name not in self._wanted and name not in self._excluded]
        if self._zygote is not None and not self._zygote.gone.is_set() and not missing:
            return self._zygote
        async with self._lock:
            self._wanted |= dict.fromkeys(missing)
            self._starting = True
            try:
                return await self._prepare(progress or (lambda _: None))
            except TransformFailed as error:
                self._error = str(error)
                raise
            except ConnectionError as error:
                self._error = str(error)
                raise TransformFailed(str(error)) from None
            finally:
                self._starting = False

    async def identify(self) -> str:
        """Its id: Python, ABI, architecture, CPU level and installed distributions, no older than `LOOK_SECONDS`."""
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            await self.look()
        return (await self.zygote()).environment_id

    @property
    def recent_id(self) -> str | None:
        """Its id, as far as that is known without a look; None: it takes one, or it does not run."""
        zygote = self._zygote
        if zygote is None or zygote.gone.is_set() or time.monotonic() - self._looked_at > LOOK_SECONDS:
            return None
        return zygote.environment_id

    async def look(self) -> str | None:
        """Retire the zygote if something was installed since it started; its id if nothing was."""
        self._looked_at = time.monotonic()
        zygote = self._zygote
        if zygote is None or zygote.gone.is_set():
            return None
        if not await asyncio.to_thread(zygote.was_installed_into):
            return zygote.environment_id
        async with self._lock:
            if self._zygote is zygote:
                logger.info("environment %s: something was installed or removed; starting it anew", self.name)
                self._excluded.clear()
                await self._retire(zygote)
        return None

    async def find_missing(self, modules: Sequence[str]) -> list[str]:
        """Those modules that are not installed there."""
        return await (await self.zygote()).find_missing(tuple(modules)) if modules else []

    def info(self) -> EnvironmentInfo:
        running = self.is_running
        return EnvironmentInfo(
            name=self.name,
            state="starting" if self._starting else "warm" if running else "failed" if self._error else "cold",
            python=self.python,
            id=self.id,
            interpreter=self._label,
            preloaded=[name for name in self._preloaded if name in self._wanted],
            error=None if running else self._error,
            distributions=self._distributions,
        )

    @property
    def is_running(self) -> bool:
        return self._zygote is not None and not self._zygote.gone.is_set()

    @property
    def is_starting(self) -> bool:
        return self._lock.locked()

    @property
    def is_idle(self) -> bool:
        """It runs, and no worker of it lives."""
        return self.is_running and not self.is_starting and not (self._zygote and self._zygote.workers)

    async def rest(self) -> None:
        """End its zygote if it is idle; the next who asks starts another."""
        if self.is_idle:
            async with self._lock:
                zygote, self._zygote = self._zygote, None
                if zygote is not None:
                    await zygote.close()

    async def close(self) -> None:
        """End it for good; what is starting ends as soon as it has started."""
        self._is_closed = True
        zygotes = [*self._retired, *([self._zygote] if self._zygote else [])]
        self._zygote, self._retired = None, []
        await close_all(zygotes)

    async def _prepare(self, progress: Callable[[str], None]) -> Zygote:
        self._check_open()
        await self._close_unused()
        zygote = self._zygote
        if zygote is None or zygote.gone.is_set():
            if zygote is not None:
                await zygote.close()
            progress(f"starting environment {self.name!r}")
            zygote = await self._start()
            if self._is_closed:
                await zygote.close()
                self._check_open()
            self._zygote = zygote
            self.python, self.id = str(zygote.about["python"]), zygote.environment_id
            self._distributions = int(zygote.about["distributions"])
            self._error, self._preloaded = None, ()
            await self._preload(zygote, (*_WORKER_MODULES, *_BASE_MODULES))
        fresh = tuple(name for name in self._wanted if name not in self._preloaded and name not in self._excluded)
        if fresh:
            progress(f"importing {', '.join(fresh)} in environment {self.name!r}")
            zygote = await self._preload(zygote, fresh)
        return zygote

    def _check_open(self) -> None:
        if self._is_closed:
            raise _removed(self.name)

    async def _start(self) -> Zygote:
        return await Zygote.start(self.name, self.interpreter, self._stage, self._home)

    async def _preload(self, zygote: Zygote, modules: tuple[str, ...]) -> Zygote:
        try:
            loaded = await zygote.preload(modules, seconds=self._load_seconds)
        except (TimeoutError, ConnectionError) as error:
            return await self._do_without(zygote, modules, str(error))
        if loaded.threads:
            return await self._do_without(zygote, modules, f"the import starts threads: {', '.join(loaded.threads)}")
        for name, message in loaded.failed.items():
            # A worker imports it again and reports the error with the function that needs it.
            logger.info("environment %s: %s is not preloaded: %s", self.name, name, message)
        self._excluded |= set(loaded.failed)
        self._preloaded = loaded.modules
        return zygote

    async def _do_without(self, zygote: Zygote, modules: tuple[str, ...], reason: str) -> Zygote:
        """Start over without the modules: each worker imports them itself, after its fork."""
        logger.warning("environment %s: workers import %s by themselves: %s", self.name, ", ".join(modules), reason)
        self._excluded |= set(modules)
        await self._retire(zygote)
        return await self._prepare(lambda _: None)

    async def _retire(self, zygote: Zygote) -> None:
        self._zygote = None
        zygote.is_retired = True
        if zygote.workers and not zygote.gone.is_set():
            self._retired.append(zygote)
        else:
            await zygote.close()

    async def _close_unused(self) -> None:
        for zygote in [zygote for zygote in self._retired if not zygote.workers]:
            self._retired.remove(zygote)
            await zygote.close()


class BuiltEnvironment(Environment):
    """One that the node has built. What its distributions run when they are imported is not trusted either.

    Args:
        built: What it is.
        packages: Where it is.
        make_way: Awaited before its zygote starts.
    """

    def __init__(
        self,
        built: Built,
        packages: Packages,
        *,
        stage: Path,
        scratch: Path,
        load_seconds: float,
        make_way: Callable[["BuiltEnvironment"], Awaitable[None]],
    ) -> None:
        interpreter = packages.directory_of(built) / "bin" / "python"
        super().__init__(built.name, interpreter, stage=stage, scratch=scratch, load_seconds=load_seconds)
        self.python = built.interpreter.version
        self._built = built
        self._packages = packages
        self._make_way = make_way

    def info(self) -> EnvironmentInfo:
        built = self._built
        return msgspec.structs.replace(
            super().info(),
            packages=built.packages,
            bytes=built.bytes,
            distributions=len(built.packages),
            created=built.created,
            used=self._packages.used_at(built.name),
        )

    async def _start(self) -> Zygote:
        await self._make_way(self)
        if not await self._packages.is_intact(self._built):
            raise EnvironmentUnfit(
                f"environment {self.name!r} was changed since it was built; "
                "register the transform again with its packages"
            )
        self._packages.touch(self.name)
        return await Zygote.start(self.name, self.interpreter, self._stage, self._home, built=self._built.key)


class Environments:
    """All environments of a node: those it was given, in the order in which they are tried, and those it has built.

    Args:
        named: Beside the default one.
        packages: What has been built, and builds.
        stage: The staged code of this node.
        scratch: Where their homes are.
        load_seconds: For imports.
    """

    def __init__(
        self, named: Sequence[tuple[str, Path]], packages: Packages, *, stage: Path, scratch: Path, load_seconds: float
    ) -> None:
        interpreters = {DEFAULT: Path(sys.executable), **dict(named)}
        self._places = {"stage": stage, "scratch": scratch}
        self._load_seconds = load_seconds
        self._given = {
            name: Environment(name, interpreter, stage=stage, scratch=scratch, load_seconds=load_seconds)
            for name, interpreter in interpreters.items()
        }
        self._packages = packages
        self._built = {built.name: self._wrap(built) for built in packages.all()}
        self._held: Counter[str] = Counter()
        self.users: Callable[[str], Sequence[str]] = lambda _: ()
        """The transforms that are of an environment, by its name."""
        self.is_run_in: Callable[[str], bool] = lambda _: False
        """Whether something runs in an environment now, by its name."""
        packages.is_needed = lambda name: bool(self.users(name)) or self._is_at_work(name)
        packages.close = self._close

    def __getitem__(self, name: str) -> Environment:
        """The environment of that name.

        Raises:
            EnvironmentUnfit: There is none.
        """
        found = self._given.get(name) or self._built.get(name)
        if found is not None:
            return found
        if name.startswith(PACKAGES_PREFIX):
            raise _removed(name)
        raise EnvironmentUnfit(
            f"there is no environment {name!r}; known: {', '.join([*self._given, *self._built])}. "
            f"Start the node with --env {name}=/path/to/python"
        )

    def __iter__(self) -> Iterator[Environment]:
        return iter([*self._given.values(), *self._built.values()])

    async def check(self) -> None:
        """See that what the node was given as interpreters are such; one that is slow is waited for by who needs it.

        Raises:
            ConfigError: Some answer what no Python does; it has what they answer.
        """
        named = [environment for environment in self._given.values() if environment.name != DEFAULT]
        found = await asyncio.gather(*map(_problem_of, named))
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise ConfigError(problems)

    def infos(self) -> list[EnvironmentInfo]:
        """Of each, with the transforms that are of it."""
        return [
            msgspec.structs.replace(environment.info(), transforms=list(self.users(environment.name)))
            for environment in self
        ]

    async def choose(
        self, name: str | None, *, python: str, modules: Sequence[str], progress: Callable[[str], None]
    ) -> Environment:
        """The environment for code: the named one, else the first given one that has its Python minor and its modules.

        Raises:
            EnvironmentUnfit: None fits; the message says why for each, and the way out.
        """
        candidates = [self[name]] if name is not None else list(self._given.values())
        reasons = []
        for environment in candidates:
            try:
                await environment.zygote(progress=progress)
                reason = await _unfit(environment, python, modules)
            except TransformFailed as error:
                reason = str(error)
            if reason is None:
                return environment
            reasons.append(f"{environment.name}: {reason}")
        raise EnvironmentUnfit(
            f"no environment fits code of Python {python}"
            + (f" that imports {', '.join(modules)}" if modules else "")
            + f" ({'; '.join(reasons)}). Start the node with --env NAME=/path/to/python{python} that has them"
            + ("" if name is not None else ", or register it with packages=")
        )

    @asynccontextmanager
    async def build(
        self,
        requirements: Sequence[Requirement],
        name: str | None,
        *,
        python: str,
        modules: Sequence[str],
        progress: Callable[[str], None],
    ) -> AsyncIterator[Environment]:
        """The environment that has just these distributions, built if need be; it stays while the context does.

        Args:
            requirements: In their normal form.
            name: Of the environment whose interpreter is taken; None: the first of the right Python.
            python: The code's Python minor.
            modules: What the code imports.
            progress: Told what takes long.

        Raises:
            EnvironmentUnfit: It cannot be built, or does not have what the code imports.
            AccessDenied, InsufficientStorage: The node does not allow it.
        """
        interpreter = await self._interpreter(name, python)
        built = await self._packages.obtain(requirements, interpreter, progress)
        environment = self._built.get(built.name)
        if environment is None:
            environment = self._built[built.name] = self._wrap(built)
        self._held[built.name] += 1
        try:
            await environment.zygote(progress=progress)
            missing = await environment.find_missing(modules)
            if missing:
                raise EnvironmentUnfit(
                    f"the function imports {', '.join(missing)}, which packages "
                    f"{', '.join(map(str, requirements))} do not bring; name what does, too"
                )
            yield environment
        finally:
            self._held[built.name] -= 1

    async def remove(self, name: str, *, force: bool) -> None:
        """Remove one that was built.

        Args:
            name: Its name.
            force: Also when transforms are of it; these fail until they are registered again.

        Raises:
            NotFound: There is none.
            Conflict: It was given to the node, or transforms are of it.
        """
        if name in self._given:
            raise Conflict(
                f"environment {name!r} was given to the node when it was started; it is not the node's to remove"
            )
        if self._packages.get(name) is None:
            raise NotFound(f"there is no environment {name!r}; shardmill transform env ls")
        users = self.users(name)
        if users and not force:
            raise Conflict(f"environment {name!r} is what {', '.join(users)} run in; remove these first, or use force")
        if self._held[name] or self._packages.is_busy(name) or (self._is_at_work(name) and not force):
            raise Conflict(f"environment {name!r} is at work; try again")
        await self._packages.remove(name)

    async def close(self) -> None:
        """End all of them, even if whoever asked is stopped meanwhile."""
        await close_all(self)

    async def _interpreter(self, name: str | None, python: str) -> Path:
        """The file of the interpreter that an environment is to be made of."""
        candidates = [self[name]] if name is not None else list(self._given.values())
        reasons = []
        for environment in candidates:
            try:
                found = await inspect(environment.interpreter)
            except EnvironmentUnfit as error:
                reasons.append(f"{environment.name}: {error}")
                continue
            if found.minor == python:
                return environment.interpreter
            reasons.append(f"{environment.name}: it has Python {found.version}")
        raise EnvironmentUnfit(
            f"no interpreter fits code of Python {python} ({'; '.join(reasons)}). "
            f"Start the node with --env NAME=/path/to/python{python}"
        )

    def _wrap(self, built: Built) -> BuiltEnvironment:
        return BuiltEnvironment(
            built, self._packages, **self._places, load_seconds=self._load_seconds, make_way=self._make_way
        )

    async def _make_way(self, starting: BuiltEnvironment) -> None:
        """End the least used of built environments that run and do nothing, when there are many."""
        idle = [one for one in self._built.values() if one is not starting and one.is_idle]
        idle.sort(key=lambda one: self._packages.used_at(one.name))
        for environment in idle[: max(0, len(idle) + 1 - RUNNING)]:
            await environment.rest()

    def _is_at_work(self, name: str) -> bool:
        environment = self._built.get(name)
        is_starting = environment is not None and environment.is_starting
        return is_starting or self._held[name] > 0 or self.is_run_in(name)

    async def _close(self, name: str) -> None:
        environment = self._built.pop(name, None)
        if environment is not None:
            await environment.close()


def _removed(name: str) -> EnvironmentUnfit:
    return EnvironmentUnfit(f"environment {name!r} has been removed; register the transform again with its packages")


def _label_of(interpreter: Path) -> str:
    """Its file, and the virtual environment that this is of: most are called `python`."""
    place = interpreter.parent.parent
    return f"{interpreter.name} of {place.name}" if (place / "pyvenv.cfg").is_file() else interpreter.name


async def _problem_of(environment: Environment) -> str | None:
    what = f"environment {environment.name!r}: {environment.interpreter}"
    try:
        await ask(environment.interpreter, CHECK_SECONDS)
    except NotPython as error:
        return f"{what} {error}"
    except TimeoutError:
        logger.warning("%s gives no answer for %g s", what, CHECK_SECONDS)
    return None


async def _unfit(environment: Environment, python: str, modules: Sequence[str]) -> str | None:
    version = environment.python or ""
    if python and version.rpartition(".")[0] != python:
        return f"it has Python {version}, the code is of {python}"
    missing = await environment.find_missing(modules)
    return f"{', '.join(missing)} not installed" if missing else None
