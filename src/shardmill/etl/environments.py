"""Interpreters in which transforms run: started when first needed, chosen by what the code imports.

An environment has at most one zygote that forks; a replaced one lives until its last worker is gone. Whatever is
installed into it or removed from it ends its zygote, so that an id always names what its workers import.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shardmill.core.api import EnvironmentInfo
from shardmill.core.errors import EnvironmentUnfit, TransformFailed
from shardmill.etl.zygotes import Zygote

logger = logging.getLogger(__name__)

DEFAULT = "default"

LOOK_SECONDS = 1.0  # between looks at what is installed

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
        self._scratch = scratch
        self._load_seconds = load_seconds
        self._lock = asyncio.Lock()
        self._zygote: Zygote | None = None
        self._retired: list[Zygote] = []
        self._wanted: dict[str, None] = {}
        self._excluded: set[str] = set()
        self._preloaded: tuple[str, ...] = ()
        self._error: str | None = None
        self._starting = False
        self._looked_at = 0.0
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
            except (TransformFailed, ConnectionError) as error:
                self._error = str(error)
                raise TransformFailed(str(error)) from None
            finally:
                self._starting = False

    async def identify(self) -> str:
        """Its id: Python, ABI, architecture, CPU level and installed distributions, no older than `LOOK_SECONDS`."""
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            await self.look()
        return (await self.zygote()).environment_id

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
        running = self._zygote is not None and not self._zygote.gone.is_set()
        return EnvironmentInfo(
            name=self.name,
            state="starting" if self._starting else "warm" if running else "failed" if self._error else "cold",
            python=self.python,
            id=self.id,
            interpreter=self.interpreter.name,
            preloaded=[name for name in self._preloaded if name in self._wanted],
            error=None if running else self._error,
        )

    async def close(self) -> None:
        zygotes = [*self._retired, *([self._zygote] if self._zygote else [])]
        self._zygote, self._retired = None, []
        for zygote in zygotes:
            await zygote.close()

    async def _prepare(self, progress: Callable[[str], None]) -> Zygote:
        await self._close_unused()
        zygote = self._zygote
        if zygote is None or zygote.gone.is_set():
            if zygote is not None:
                await zygote.close()
            progress(f"starting environment {self.name!r}")
            zygote = self._zygote = await Zygote.start(self.name, self.interpreter, self._stage, self._scratch)
            self.python, self.id = str(zygote.about["python"]), zygote.environment_id
            self._error, self._preloaded = None, ()
            await self._preload(zygote, (*_WORKER_MODULES, *_BASE_MODULES))
        fresh = tuple(name for name in self._wanted if name not in self._preloaded and name not in self._excluded)
        if fresh:
            progress(f"importing {', '.join(fresh)} in environment {self.name!r}")
            zygote = await self._preload(zygote, fresh)
        return zygote

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


class Environments:
    """All environments of a node, in the order in which they are tried."""

    def __init__(self, named: Sequence[tuple[str, Path]], *, stage: Path, scratch: Path, load_seconds: float) -> None:
        interpreters = {DEFAULT: Path(sys.executable), **dict(named)}
        self._environments = {
            name: Environment(name, interpreter, stage=stage, scratch=scratch, load_seconds=load_seconds)
            for name, interpreter in interpreters.items()
        }

    def __getitem__(self, name: str) -> Environment:
        """The environment of that name.

        Raises:
            EnvironmentUnfit: There is none.
        """
        try:
            return self._environments[name]
        except KeyError:
            raise EnvironmentUnfit(
                f"there is no environment {name!r}; known: {', '.join(self._environments)}. "
                f"Start the node with --env {name}=/path/to/python"
            ) from None

    def __iter__(self) -> Iterator[Environment]:
        return iter(self._environments.values())

    async def choose(
        self, name: str | None, *, python: str, modules: Sequence[str], progress: Callable[[str], None]
    ) -> Environment:
        """The environment for code: the named one, else the first that has its Python minor and its modules.

        Raises:
            EnvironmentUnfit: None fits; the message says why for each, and the way out.
        """
        candidates = [self[name]] if name is not None else list(self._environments.values())
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
        )

    async def close(self) -> None:
        for environment in self._environments.values():
            await environment.close()


async def _unfit(environment: Environment, python: str, modules: Sequence[str]) -> str | None:
    version = environment.python or ""
    if python and version.rpartition(".")[0] != python:
        return f"it has Python {version}, the code is of {python}"
    missing = await environment.find_missing(modules)
    return f"{', '.join(missing)} not installed" if missing else None
