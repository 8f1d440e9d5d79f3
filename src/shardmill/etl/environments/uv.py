"""uv, which resolves requirements and installs what they resolve to: what it is told, what it says, how it fails.

It runs as a child process that dies with the node, knows nothing of the node's environment variables but those that
lead to an index, and writes below its cache and the directories it is given only. Its words reach the user.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from shardmill.config import PackageSettings, available_cores
from shardmill.core.errors import EnvironmentUnfit, InsufficientStorage
from shardmill.core.requirements import Requirement
from shardmill.etl.processes.staging import LAUNCH
from shardmill.etl.steps import see_through

logger = logging.getLogger(__name__)

_WORDS = 4000  # signs of what uv says that are handed on
_OUTPUT = 16 << 20  # bytes of a lock
_INSPECT_SECONDS = 20.0
_ANSWER = 300  # signs of what is said by what is no Python
_END_SECONDS = 5.0

# What leads to an index; everything else of the node's environment is its own.
_PASSED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NETRC",
    "XDG_CONFIG_HOME",
    "XDG_CONFIG_DIRS",
)
_COMPILING = {"PATH": os.defpath, "LANG": "C.UTF-8"}
_PASSED_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PASSED_TO_UV: tuple[str, ...] = (
    "INDEX",
    "DEFAULT_INDEX",
    "EXTRA_INDEX",
    "FIND_LINKS",
    "KEYRING",
    "HTTP",
    "NATIVE_TLS",
    "SYSTEM_CERTS",
)
_PASSED_TO_UV += ("INSECURE_HOST", "CONFIG_FILE", "CONCURRENT", "EXCLUDE_NEWER")

_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?(==[^\s;\\]+)")
_DOWNLOADING = re.compile(r"\s*Downloading (\S+) \(([^)]+)\)")
_DOWNLOADED = re.compile(r"\s*Downloaded (\S+)")
_CHATTER = re.compile(r"(Using|Resolved|Prepared|Installed|Creating|Uninstalled)\b| *Built | [-+~] ")
_BUILDING = re.compile(r"\s*Building (\S+)")
# EFBIG, ENOSPC and EDQUOT by their numbers, as uv and Python write them: there is no status for them, and uv has
# cleared up when it ends.
_FULL = re.compile(r"\(os error (27|28|122)\)|\[Errno (27|28|122)\]")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")

_INSPECT = """
import json, os, platform, sys, sysconfig
print(json.dumps({
    "version": platform.python_version(),
    "abi": f"{sysconfig.get_config_var('SOABI')}-{platform.machine()}-{'-'.join(platform.libc_ver())}",
    "base": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
}))
"""


class Interpreter(msgspec.Struct, frozen=True):
    """A Python that environments are made of."""

    version: str
    abi: str
    base: str
    """The file itself, whatever environment it was found by."""

    @property
    def minor(self) -> str:
        return self.version.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Lock:
    """What requirements have been resolved to: a file of versions with the hashes of all that may be installed."""

    text: str

    @property
    def packages(self) -> list[str]:
        """`name==version` of each."""
        return [f"{match[1]}{match[2]}" for line in self.text.splitlines() if (match := _LOCKED.match(line))]


@dataclass(frozen=True, slots=True)
class _Done:
    status: int
    output: str
    words: str
    """What it said that is no progress."""


class NotPython(Exception):
    """What is behind the name of an interpreter, to be said after that name."""


async def inspect(python: Path) -> Interpreter:
    """What an interpreter is.

    Raises:
        EnvironmentUnfit: It cannot be run.
    """
    try:
        return await ask(python, _INSPECT_SECONDS)
    except TimeoutError:
        raise EnvironmentUnfit(f"{python.name} does not say what it is") from None
    except NotPython as error:
        raise EnvironmentUnfit(f"{python.name} {error}") from None


async def ask(python: Path, seconds: float) -> Interpreter:
    """What an interpreter says of itself, in its last line.

    Raises:
        NotPython: It answers what no Python does, or cannot be started.
        TimeoutError: It says nothing for so long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            python, "-I", "-c", _INSPECT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, cwd="/", env={"PATH": os.defpath}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise NotPython(f"cannot be started: {error.strerror}") from None
    try:
        output, words = await asyncio.wait_for(process.communicate(), seconds)
        return msgspec.json.decode(output.strip().rpartition(b"\n")[2], type=Interpreter)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        lines = (output + b"\n" + words).decode(errors="replace").split("\n")
        said = "; ".join(line.strip() for line in lines if line.strip())[:_ANSWER]
        answer = repr(said) if said else "nothing"
        raise NotPython(f"is no Python: it answers {answer}, status {process.returncode}") from None
    finally:
        await _end(process)


class Uv:
    """Calls of uv with one cache.

    Args:
        settings: Indexes, whether to build, deadline.
        root: A directory of its own, for cache and temporary files.
        stage: The staged code of this node.
    """

    def __init__(self, settings: PackageSettings, root: Path, *, stage: Path) -> None:
        self.cache = root / "cache"
        self._settings = settings
        self._temporary = root / "tmp"
        self._root = root
        self._stage = stage
        self._running = 0
        self._gate = asyncio.Lock()
        """Held while downloads are removed; calls begin when it is free."""

    async def resolve(self, requirements: Sequence[Requirement], base: Sequence[str], interpreter: Interpreter) -> Lock:
        """Versions that meet all requirements at once; from the cache where no index can be reached.

        Args:
            requirements: Whose words an error quotes.
            base: Further ones.
            interpreter: For which.

        Raises:
            EnvironmentUnfit: There are none; the message has the resolver's words.
        """
        arguments = [
            "pip", "compile", "-", "--python", interpreter.base, "--generate-hashes", "--no-annotate", "--no-header",
            "--quiet", *self._sources(),
        ]  # fmt: skip
        text = "\n".join([*map(str, requirements), *base]) + "\n"
        done = await self._run(*arguments, text=text)
        if done.status not in (0, 1):
            # Not that nothing fits (1), but that something could not be asked.
            cached = await self._run(*arguments, "--offline", text=text)
            if cached.status == 0:
                logger.info("packages are resolved from the cache: %s", done.words)
                done = cached
        if done.status != 0:
            raise self._failed(requirements, interpreter, done)
        return Lock(done.output)

    async def install(
        self,
        lock: Lock,
        requirements: Sequence[Requirement],
        interpreter: Interpreter,
        directory: Path,
        progress: Callable[[str], None],
    ) -> None:
        """Make a virtual environment of exactly what is locked, in a directory that is there and empty.

        Raises:
            EnvironmentUnfit: Something cannot be fetched or installed; the message has uv's words.
            InsufficientStorage: The disk is full.
        """
        done = await self._run("venv", "--quiet", "--python", interpreter.base, str(directory), directory=directory)
        if done.status == 0:
            # Copies, never links into the cache: what one environment is made of is no other's.
            arguments = [
                "pip", "sync", "-", "--python", str(directory / "bin" / "python"), "--require-hashes",
                "--link-mode", "copy", "--no-compile-bytecode", *self._sources(),
            ]  # fmt: skip
            reporter = _Reporter(progress)
            progress(f"installing {len(lock.packages)} packages")
            # What is locked and has been downloaded needs no index, and its absence is known at once.
            for where in (["--offline"], []):
                done = await self._run(*arguments, *where, text=lock.text, directory=directory, on_line=reporter)
                if done.status == 0:
                    break
        if done.status == 0:
            progress("compiling their modules")
            done = await self._compile(directory)
        if done.status != 0:
            raise self._failed(requirements, interpreter, done)

    async def _compile(self, directory: Path) -> _Done:
        """Compile the modules of an environment; what is no Python stays as it is.

        Not by uv, whose interpreter runs the `.pth` files of what was just installed, with the network and the node's
        way to its indexes at hand: without `site` nothing of a distribution runs.
        """
        python, cores = str(directory / "bin" / "python"), str(available_cores())
        arguments = ["-I", "-S", "-m", "compileall", "-q", "-j", cores, str(directory / "lib")]
        done = await self._launch(python, *arguments, writable=[directory], environment=_COMPILING)
        full = _FULL.search(done.output)
        return replace(done, status=1, words=full[0]) if full else replace(done, status=0)

    async def clean(self) -> bool:
        """Forget all downloads, if no call goes on; whether that was done."""
        async with self._gate:
            if self._running:
                return False
            await see_through(self.sweep)
            await see_through(shutil.rmtree, self.cache, ignore_errors=True)
            return True

    def count_bytes(self) -> int:
        """Bytes that downloads, and what killed calls have left, take on disk."""
        return _size(self.cache) + _size(self._temporary)

    def sweep(self) -> None:
        """Remove what calls that were killed have left; before the first one."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _sources(self) -> list[str]:
        settings = self._settings
        arguments = [word for place in settings.wheel_places for word in ("--find-links", place)]
        if settings.no_index:
            arguments.append("--no-index")
        if not settings.allow_builds:
            arguments += ["--only-binary", ":all:"]
        return arguments

    def _failed(
        self, requirements: Sequence[Requirement], interpreter: Interpreter, done: _Done
    ) -> EnvironmentUnfit | InsufficientStorage:
        names = ", ".join(map(str, requirements))
        if _FULL.search(done.words):
            return InsufficientStorage(
                f"packages {names}: the disk is full; nothing of them is kept. uv says: {done.words}"
            )
        return EnvironmentUnfit(
            f"packages {names} cannot be installed for Python {interpreter.version}: {done.words}\n"
            "Correct the requirement, or give the node what it lacks: [packages] index_url, find_links, allow_builds"
        )

    async def _run(
        self,
        *arguments: str,
        text: str = "",
        directory: Path | None = None,
        on_line: Callable[[str], bool] = lambda _: False,
    ) -> _Done:
        """One call; whatever ends the waiting ends it.

        Args:
            arguments: After `uv`.
            text: Its standard input.
            directory: What it may write beside cache and temporary files.
            on_line: Told each line on its standard error; True: it is progress, not to be kept.
        """
        import uv

        async with self._gate:
            self._running += 1
        try:
            for path in (self.cache, self._temporary):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = [path for path in (self.cache, self._temporary, directory) if path is not None]
            return await self._launch(
                uv.find_uv_bin(), *arguments, writable=writable, environment=self._variables(), text=text,
                on_line=on_line,
            )  # fmt: skip
        finally:
            self._running -= 1

    async def _launch(
        self,
        *command: str,
        writable: Sequence[Path],
        environment: dict[str, str],
        text: str = "",
        on_line: Callable[[str], bool] = lambda _: False,
    ) -> _Done:
        """Run a program that writes below some directories only, with just these variables."""
        launch = [sys.executable, "-I", "-S", "-c", LAUNCH, str(self._stage), str(os.getpid()), str(len(writable))]
        # Forked by this very thread, whose end is its death signal.
        process = await asyncio.create_subprocess_exec(
            *launch, *map(str, writable), *command, cwd="/", env=environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True, limit=1 << 20,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._settings.timeout):
                return await self._follow(process, text, on_line)
        except TimeoutError:
            name = os.path.basename(command[0])
            raise EnvironmentUnfit(
                f"{name} took longer than {self._settings.timeout:g} s ([packages] timeout)"
            ) from None
        finally:
            await _end_launched(process)

    async def _follow(self, process: asyncio.subprocess.Process, text: str, on_line: Callable[[str], bool]) -> _Done:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        words: list[str] = []

        async def listen(stream: asyncio.StreamReader) -> None:
            while line := await stream.readline():
                said = line.decode(errors="replace").rstrip()
                if said and not on_line(said):
                    words.append(said)
                    del words[:-100]

        async def tell(stream: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                stream.write(text.encode())
                await stream.drain()
                stream.close()
                await stream.wait_closed()

        output, _, _ = await asyncio.gather(_read(process.stdout), listen(process.stderr), tell(process.stdin))
        status = await process.wait()
        return _Done(status, output, self._public("\n".join(words))[-_WORDS:].strip().removeprefix("error: "))

    def _public(self, words: str) -> str:
        """Without what is the node's own: credentials and places on its disk."""
        words = _CREDENTIALS.sub("***@", words)
        for place, name in [
            (str(self._root), "packages"),
            *((place, "find_links") for place in self._settings.wheel_places),
        ]:
            words = words.replace(place, name)
        return words

    def _variables(self) -> dict[str, str]:
        settings = self._settings
        prefixes = tuple(f"UV_{name}" for name in _PASSED_TO_UV)
        passed = {
            name: value
            for name, value in os.environ.items()
            if name in _PASSED or name.lower() in _PASSED_PROXIES or name.startswith(prefixes)
        }
        if settings.index_url or settings.no_index:
            passed = {name: value for name, value in passed.items() if not re.match("UV_(DEFAULT_|EXTRA_)?INDEX", name)}
        if settings.index_url and not settings.no_index:
            passed["UV_DEFAULT_INDEX"] = settings.index_url
        if settings.extra_index_urls and not settings.no_index:
            passed["UV_INDEX"] = " ".join(settings.extra_index_urls)
        return passed | {
            "UV_CACHE_DIR": str(self.cache),
            "UV_PYTHON_DOWNLOADS": "never",
            "TMPDIR": str(self._temporary),
            "NO_COLOR": "1",
        }


class _Reporter:
    """Progress from uv's lines."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._started = 0
        self._done = 0

    def __call__(self, line: str) -> bool:
        if match := _DOWNLOADING.match(line):
            self._started += 1
            self._progress(f"downloading {match[1]} ({match[2]})")
        elif match := _DOWNLOADED.match(line):
            self._done += 1
            self._progress(f"downloaded {match[1]} ({self._done} of {self._started})")
        elif match := _BUILDING.match(line):
            self._progress(f"building {match[1]}")
        else:
            return _CHATTER.match(line) is not None
        return True


def _size(directory: Path) -> int:
    """Bytes that a directory takes on disk; 0 if it is not there."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


async def _read(stream: asyncio.StreamReader) -> str:
    data = bytearray()
    while len(data) < _OUTPUT and (part := await stream.read(1 << 16)):
        data += part
    return data.decode(errors="replace")


async def _end_launched(process: asyncio.subprocess.Process) -> None:
    """Ask what has launched it, which knows all that it has started, to end that; then as `_end`."""
    try:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_SECONDS)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it and what it has started unless it has ended; return when it is gone."""
    # The number of one that was waited for may be another's by now.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    await asyncio.wait_for(process.wait(), _END_SECONDS)
    transport: Any = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
