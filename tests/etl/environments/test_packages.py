"""Environments of packages: resolved, locked, built once, kept whole; with a real uv, and wheels that are made here."""

import asyncio
import contextlib
import http.server
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardmill.config import PackageSettings
from shardmill.core.errors import AccessDenied, EnvironmentUnfit, InsufficientStorage
from shardmill.core.requirements import parse_requirements
from shardmill.core.values import Seconds, Size
from shardmill.etl.environments import uv
from shardmill.etl.environments.packages import Built, Packages
from shardmill.etl.processes.staging import stage
from tests.etl.support import wait_until
from tests.etl.wheels import write_sdist, write_wheel
from tests.storage.full_disk import small_disk, write_limit


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(tmp_path_factory.mktemp("staged") / "stage")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """`colours` 1.0 and 2.0, `paint` that needs the first; names instead of numpy and pillow, which nothing imports."""
    directory = tmp_path / "wheels"
    for name in ("numpy", "pillow"):
        write_wheel(directory, name, "1.0", {f"base_{name}.py": ""})
    for version, colour in (("1.0", "red"), ("2.0", "blue")):
        write_wheel(directory, "colours", version, {"colours.py": f"NAME = {colour!r}\n"})
    write_wheel(directory, "paint", "1.0", {"paint/__init__.py": "import colours\n"}, requires=["colours<2"])
    return directory


class Shop:
    """Packages in a directory, as a node has them, and what they said."""

    def __init__(self, directory: Path, staged: Path, settings: PackageSettings) -> None:
        self.directory = directory
        self.packages = Packages(settings, directory, stage=staged)
        self.said: list[str] = []

    async def obtain(self, *texts: str, progress: Callable[[str], None] | None = None) -> Built:
        return await self.packages.obtain(parse_requirements(texts), Path(sys.executable), progress or self.said.append)

    def get_now(self, *texts: str) -> Built:
        built = run(self.obtain(*texts))
        assert isinstance(built, Built)
        return built

    def count_built(self) -> int:
        return sum(line.startswith("built environment") for line in self.said)

    def python(self, built: Built) -> Path:
        return self.packages.directory_of(built) / "bin" / "python"

    def left(self) -> list[str]:
        """Names of what is on disk."""
        return sorted(path.name for path in (self.directory / "environments").iterdir())


@pytest.fixture
def settings(wheels: Path) -> PackageSettings:
    return PackageSettings(find_links=(str(wheels),), no_index=True)


@pytest.fixture
def shop(tmp_path: Path, staged: Path, settings: PackageSettings) -> Shop:
    return Shop(tmp_path / "packages", staged, settings)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def evaluate(python: Path, code: str) -> str:
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_what_is_asked_for_is_there_and_nothing_of_the_node(shop: Shop) -> None:
    built = shop.get_now("paint")
    assert built.packages == ["colours==1.0", "numpy==1.0", "paint==1.0", "pillow==1.0"]
    python = shop.python(built)
    assert evaluate(python, "import paint, colours; print(colours.NAME)") == "red"
    for name in ("aiohttp", "msgspec", "shardmill", "uv", "pip"):
        assert "No module named" in evaluate(python, f"import {name}")
    assert shop.said[0] == "resolving paint"
    assert shop.said[1] == "resolved to colours==1.0, numpy==1.0, paint==1.0, pillow==1.0"
    assert shop.said[2] == "installing 4 packages"
    assert shop.said[3] == "compiling their modules"
    assert re.fullmatch(rf"built environment {built.name} \(\d+ MiB\) in [\d.]+ s", shop.said[4])


def test_two_lists_with_one_resolution_share_one_environment(shop: Shop) -> None:
    first = shop.get_now("paint")
    second = shop.get_now("colours<2", "paint==1.0")
    assert first.name == second.name
    assert shop.count_built() == 1
    assert shop.get_now("colours").name != first.name


def test_registrations_at_once_build_once(shop: Shop) -> None:
    async def main() -> None:
        found = await asyncio.gather(
            *(shop.obtain(*texts) for texts in (["paint"], ["paint"], ["paint>=1"], ["colours"]))
        )
        assert len({built.name for built in found[:3]}) == 1
        assert found[3].name != found[0].name
        assert shop.count_built() == 2
        assert sum(line.startswith("waiting for another") for line in shop.said) == 2

    run(main())


def test_a_list_keeps_what_it_was_locked_to_until_that_is_removed(shop: Shop, wheels: Path) -> None:
    before = shop.get_now("colours")
    assert "colours==2.0" in before.packages
    write_wheel(wheels, "colours", "3.0", {"colours.py": "NAME = 'green'\n"})
    shop.said.clear()
    assert shop.get_now("colours") == before
    assert shop.said == []
    assert "colours==3.0" in shop.get_now("colours>=2").packages
    run(shop.packages.remove(before.name))
    assert "colours==3.0" in shop.get_now("colours").packages


def test_other_bytes_of_the_same_version_are_another_environment(shop: Shop, wheels: Path) -> None:
    before = shop.get_now("colours==2.0")
    write_wheel(wheels, "colours", "2.0", {"colours.py": "NAME = 'azure'\n"})
    after = shop.get_now("colours>=2.0")
    assert before.packages == after.packages
    assert before.name != after.name
    assert evaluate(shop.python(after), "import colours; print(colours.NAME)") == "azure"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["colors"], "colors was not found"),
        (["colours==9"], "there is no version of colours==9"),
        (["paint", "colours>=2"], "paint depend on colours<2"),
        (["colours=>1"], "no such comparison operator"),
    ],
)
def test_a_wrong_requirement_fails_in_the_resolvers_words(shop: Shop, texts: list[str], words: str) -> None:
    with pytest.raises(EnvironmentUnfit) as caught:
        shop.get_now(*texts)
    message = " ".join(caught.value.message.split())
    assert words in message
    assert texts[-1] in message
    assert "Correct the requirement" in message
    assert str(shop.directory) not in message
    assert shop.left() == []


def test_a_wheel_that_is_damaged_leaves_nothing_half_made(shop: Shop, wheels: Path) -> None:
    good = (wheels / "colours-2.0-py3-none-any.whl").read_bytes()
    with pytest.raises(EnvironmentUnfit, match=r"(?s)colours==2.0 cannot be installed .*ZIP"):
        (wheels / "colours-2.0-py3-none-any.whl").write_bytes(good[:-40])
        shop.get_now("colours==2.0")
    assert shop.left() == []
    (wheels / "colours-2.0-py3-none-any.whl").write_bytes(good)
    assert shop.count_built() == 0
    shop.get_now("colours==2.0")


def test_a_full_disk_is_called_by_its_name(
    tmp_path: Path, staged: Path, settings: PackageSettings, wheels: Path
) -> None:
    write_wheel(wheels, "large", "1.0", {"large.py": "x" * (64 << 20)})
    small = tmp_path / "small"
    with small_disk(small, "48m") as is_small:
        shop = Shop(small / "packages", staged, settings)
        with contextlib.nullcontext() if is_small else write_limit(6 << 20):
            with pytest.raises(InsufficientStorage, match="packages large: the disk is full; nothing of them is kept"):
                shop.get_now("large")
        assert shop.left() == []
        assert "colours==2.0" in shop.get_now("colours").packages


@pytest.mark.parametrize("moment", ["resolving", "resolved", "installing"])
def test_a_registration_that_is_given_up_leaves_nothing(shop: Shop, moment: str) -> None:
    async def main() -> None:
        def progress(line: str) -> None:
            if line.startswith(moment):
                task.cancel()

        task = asyncio.ensure_future(shop.obtain("paint", progress=progress))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert shop.left() == []
        assert (await shop.obtain("paint")).name in shop.left()

    run(main())


def test_of_two_who_wait_one_may_leave(shop: Shop, wheels: Path) -> None:
    write_slow(wheels)

    async def main() -> None:
        def says(line: str) -> None:
            if line.startswith("waiting"):
                first.cancel()

        is_building = asyncio.Event()
        first = asyncio.ensure_future(
            shop.obtain("slow", progress=lambda line: is_building.set() if line.startswith("installing") else None)
        )
        await is_building.wait()
        second = asyncio.ensure_future(shop.obtain("slow", progress=says))
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await shop.packages.is_intact(await second)

    run(main())


def write_slow(wheels: Path) -> None:
    """A wheel of many files, so that what is done while it is being installed is done in time."""
    write_wheel(wheels, "slow", "1.0", {f"slow/module_{number}.py": "x = 1\n" for number in range(1000)})


KILLED = """
import asyncio, sys
from pathlib import Path
from shardmill.config import PackageSettings
from shardmill.core.requirements import parse_requirements
from shardmill.etl.environments.packages import Packages

directory, stage, wheels = map(Path, sys.argv[1:])
packages = Packages(PackageSettings(find_links=(str(wheels),), no_index=True), directory, stage=stage)
asyncio.run(packages.obtain(parse_requirements(["slow"]), Path(sys.executable), lambda line: print(line, flush=True)))
"""


def test_a_node_that_is_killed_takes_uv_with_it_and_sweeps_what_was_half_made(
    shop: Shop, wheels: Path, staged: Path
) -> None:
    kept = shop.get_now("paint")
    write_slow(wheels)
    command = [sys.executable, "-c", KILLED, str(shop.directory), str(staged), str(wheels)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("installing"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while processes_that_name(str(shop.directory)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(shop.left()) == 3  # the record and the directory of what is whole; a directory that is not
    again = Shop(shop.directory, staged, PackageSettings(find_links=(str(wheels),), no_index=True))
    assert again.left() == [kept.name, f"{kept.name}.json"]
    assert again.get_now("paint") == kept
    assert again.said == []
    assert "slow==1.0" in again.get_now("slow").packages


def processes_that_name(text: str) -> list[str]:
    """Command lines of other processes that have it in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def test_what_is_no_environment_is_swept(shop: Shop, staged: Path, settings: PackageSettings) -> None:
    kept, lost = shop.get_now("paint"), shop.get_now("colours")
    place = shop.directory / "environments"
    (place / "packages-000000000000" / "lib").mkdir(parents=True)
    (place / f"{lost.name}.json").write_text("{}")
    (place / "packages-111111111111.json").write_bytes((place / f"{kept.name}.json").read_bytes())
    (place / f"{kept.name}.json.123.tmp").write_text("x")
    (place / "link").symlink_to(staged)
    assert [built.name for built in Shop(shop.directory, staged, settings).packages.all()] == [kept.name]
    assert shop.left() == [kept.name, f"{kept.name}.json"]
    assert staged.is_dir()


def test_nothing_of_it_can_be_written_by_accident_or_is_linked_elsewhere(shop: Shop) -> None:
    built = shop.get_now("paint")
    top = shop.packages.directory_of(built)
    found = [path for path in top.rglob("*") if not path.is_symlink()]
    assert [path for path in [top, *found] if path.stat().st_mode & 0o222] == []
    assert [path for path in found if path.is_file() and path.stat().st_nlink != 1] == []
    modules = [path for path in found if path.name == "__init__.py"]
    assert modules
    assert all(list((path.parent / "__pycache__").glob("__init__.*.pyc")) for path in modules)


@pytest.mark.parametrize("change", ["write", "add", "remove", "turn"])
def test_what_was_changed_is_not_used_but_built_again(shop: Shop, change: str) -> None:
    built = shop.get_now("paint")
    [module] = shop.packages.directory_of(built).rglob("colours.py")
    for path in (module, module.parent):
        path.chmod(0o755)
    match change:
        case "write":
            module.write_text("NAME = 'grey'\n")
        case "add":
            (module.parent / "other.py").write_text("")
        case "remove":
            module.unlink()
        case "turn":
            python = shop.python(built)
            python.parent.chmod(0o755)
            python.unlink()
            python.symlink_to("/bin/true")
    assert not run(shop.packages.is_intact(built))
    again = shop.get_now("paint")
    assert again.name == built.name
    assert shop.said[-1].startswith("built environment")
    assert evaluate(shop.python(again), "import colours; print(colours.NAME)") == "red"
    assert run(shop.packages.is_intact(again))


def test_the_least_used_leaves_first_and_what_is_needed_stays(
    shop: Shop, staged: Path, settings: PackageSettings, wheels: Path
) -> None:
    for name in ("one", "two", "three"):
        write_wheel(wheels, name, "1.0", {f"{name}.py": "x" * 3_000_000})
    needed, first, second = (shop.get_now(name) for name in ("one", "two", "colours"))
    shop.packages.touch(second.name)
    shop.packages.touch(first.name)
    capacity = shop.packages.bytes + cache_size(shop) + second.bytes // 2
    bounded = Shop(shop.directory, staged, replace(settings, capacity=Size(capacity)))
    bounded.packages.is_needed = lambda name: name == needed.name
    third = bounded.get_now("three")
    names = {built.name for built in bounded.packages.all()}
    assert third.name in names
    assert needed.name in names
    assert second.name not in names
    assert bounded.left() == sorted([*names, *(f"{name}.json" for name in names)])
    assert bounded.packages.bytes + cache_size(bounded) <= capacity


def test_what_finds_no_room_beside_what_is_needed_is_refused(
    shop: Shop, staged: Path, settings: PackageSettings
) -> None:
    needed = shop.get_now("paint")
    small = Shop(shop.directory, staged, replace(settings, capacity=Size(needed.bytes + 1000)))
    small.packages.is_needed = lambda name: name == needed.name
    with pytest.raises(InsufficientStorage, match=r"\[packages\] capacity.*shardmill transform env ls"):
        small.get_now("colours")
    assert small.left() == [needed.name, f"{needed.name}.json"]
    assert cache_size(small) == 0


def cache_size(shop: Shop) -> int:
    return sum(path.lstat().st_blocks * 512 for path in (shop.directory / "cache").rglob("*") if not path.is_dir())


def test_policies(tmp_path: Path, staged: Path, settings: PackageSettings) -> None:
    off = Shop(tmp_path / "packages", staged, replace(settings, policy="off"))
    with pytest.raises(AccessDenied, match=r"builds no environments \(\[packages\] policy\)"):
        off.get_now("colours")
    listed = Shop(tmp_path / "packages", staged, replace(settings, policy="allow-list", allow=("Paint", "x_y")))
    with pytest.raises(AccessDenied, match=r"colours are not allowed .*allowed: paint, x-y"):
        listed.get_now("paint", "colours")
    # What it needs itself comes along.
    assert "colours==1.0" in listed.get_now("paint").packages


BACKEND = """
import os, sys, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "made-1.0-py3-none-any.whl"
    try:
        open({outside!r}, "w").close()
        wrote = True
    except OSError:
        wrote = False
    found = {{"wrote": wrote, "environ": sorted(os.environ)}}
    with zipfile.ZipFile(os.path.join(directory, name), "w") as archive:
        archive.writestr("made.py", f"FOUND = {{found!r}}\\n")
        archive.writestr("made-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: made\\nVersion: 1.0\\n")
        archive.writestr("made-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("made-1.0.dist-info/RECORD", "made.py,,\\n")
    return name
"""


def test_nothing_is_built_from_source_unless_allowed_and_then_apart(
    shop: Shop, wheels: Path, staged: Path, settings: PackageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    write_sdist(wheels, "made", "1.0", backend=BACKEND.format(outside=str(outside)))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(EnvironmentUnfit, match=r"made(.|\n)*allow_builds"):
        shop.get_now("made")
    allowed = Shop(tmp_path / "allowed", staged, replace(settings, allow_builds=True))
    built = allowed.get_now("made")
    found = eval(evaluate(allowed.python(built), "import made; print(made.FOUND)"))
    assert "AWS_SECRET_ACCESS_KEY" not in found["environ"]
    from shardmill.worker.limits import landlock_version

    assert found["wrote"] is outside.exists() is (landlock_version() < 3)


LINGERING = """
import subprocess, sys
# In the session of the build, out of it, and the grandchild of one that has ended.
subprocess.Popen([sys.executable, "-c", {sleep!r}, {mark!r}], stdin=-3, stdout=-3, stderr=-3)
subprocess.Popen([sys.executable, "-c", {sleep!r}, {mark!r}], start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
subprocess.run([sys.executable, "-c", {fork!r}, {mark!r}], stdin=-3, stdout=-3, stderr=-3)
"""
SLEEP = "import time; time.sleep(1000)"
FORK = f"import os\nif os.fork() == 0:\n    os.setsid()\n    {SLEEP}"


def processes_of(mark: str) -> list[int]:
    """Whose command line has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("ending", ["it is done", "the waiting is cancelled"])
def test_nothing_that_a_build_starts_outlives_it(
    wheels: Path, staged: Path, settings: PackageSettings, tmp_path: Path, ending: str
) -> None:
    mark = f"lingering-{tmp_path}"
    code = LINGERING.format(sleep=SLEEP, fork=FORK, mark=mark)
    if ending != "it is done":
        code += "import time; time.sleep(1000)\n"
    write_sdist(wheels, "made", "1.0", backend=code + BACKEND.format(outside=str(tmp_path / "outside")))
    shop = Shop(tmp_path / "packages", staged, replace(settings, allow_builds=True))

    async def main() -> None:
        building = asyncio.create_task(shop.obtain("made"))
        if ending != "it is done":
            await wait_until(lambda: len(processes_of(mark)) >= 3 or building.done(), 30)
            building.cancel()
        await asyncio.wait([building])
        assert building.cancelled() or building.result().packages

    run(main())
    deadline = time.monotonic() + 10
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes_of(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_no_file_of_a_wheel_is_run_while_it_is_installed(shop: Shop, wheels: Path) -> None:
    code = "import os, tempfile; tempfile.mkstemp(prefix='ran-', dir=os.environ.get('TMPDIR'))"
    files = {"eager.py": "NAME = 'eager'\n", "eager.pth": f"{code}\n", "broken.py": "this is no Python\n"}
    write_wheel(wheels, "eager", "1.0", files)
    built = shop.get_now("eager")
    temporary = shop.directory / "tmp"
    assert list(temporary.rglob("ran-*")) == []
    assert len(list(shop.packages.directory_of(built).rglob("eager.*.pyc"))) == 1
    environ = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run([shop.python(built), "-c", "import eager"], check=True, env=environ, timeout=30)
    assert list(temporary.glob("ran-*")), "the file does run where it may"


class Index(http.server.ThreadingHTTPServer):
    """A package index over a directory of wheels."""

    daemon_threads = True

    def __init__(self, wheels: Path) -> None:
        self.wheels = wheels
        self.is_stalling = False
        self.release = threading.Event()
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Pages)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class _Pages(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.is_stalling:
            self.server.release.wait(30)
        *_, folder, name = self.path.rstrip("/").split("/")
        if folder == "simple":
            links = [path.name for path in self.server.wheels.iterdir() if path.name.startswith(f"{name}-")]
            body = "".join(f'<a href="/files/{link}">{link}</a>' for link in sorted(links)).encode()
        else:
            body = (self.server.wheels / name).read_bytes()
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/html" if folder == "simple" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(wheels: Path) -> Iterator[Index]:
    with Index(wheels) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


def test_without_a_network_what_is_cached_still_works(
    index: Index, tmp_path: Path, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    shop = Shop(tmp_path / "packages", staged, PackageSettings(index_url=index.url))
    built = shop.get_now("paint")
    index.shutdown()
    index.server_close()
    # The same list: nothing is asked for.
    assert shop.get_now("paint") == built
    # Another one that comes to the same, and the same again after its environment is gone.
    assert shop.get_now("paint>=1").name == built.name
    run(shop.packages.remove(built.name))
    assert shop.get_now("paint").name == built.name
    with pytest.raises(EnvironmentUnfit, match=r"(?s)packages unknown cannot be installed .*127\.0\.0\.1"):
        shop.get_now("unknown")


def test_an_index_that_says_nothing_ends_at_the_deadline(index: Index, tmp_path: Path, staged: Path) -> None:
    index.is_stalling = True
    shop = Shop(tmp_path / "packages", staged, PackageSettings(index_url=index.url, timeout=Seconds(1)))
    with pytest.raises(EnvironmentUnfit, match=r"longer than 1 s \(\[packages\] timeout\)"):
        shop.get_now("paint")
    assert index.asked


def test_credentials_of_an_index_are_in_no_message(index: Index, tmp_path: Path, staged: Path) -> None:
    url = index.url.replace("://", "://user:hunter2@")
    shop = Shop(tmp_path / "packages", staged, PackageSettings(index_url=url))
    with pytest.raises(EnvironmentUnfit) as caught:
        shop.get_now("nothing-of-this-name")
    assert "hunter2" not in caught.value.message
    assert "hunter2" not in "".join(shop.said)


def test_an_interpreter_that_is_none_is_said_to_be_so(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        echo hello
    """)
    )
    script.chmod(stat.S_IRWXU)
    for path, reason in (
        (script, "python is no Python: it answers 'hello', status 0"),
        (Path("/bin/true"), "true is no Python: it answers nothing, status 0"),
        (tmp_path / "gone", "gone cannot be started"),
    ):
        with pytest.raises(EnvironmentUnfit, match=reason):
            run(uv.inspect(path))


def test_what_is_removed_while_it_is_looked_at_is_built_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    built = shop.get_now("paint")

    async def main() -> None:
        look, looks = shop.packages.is_intact, 0

        async def is_intact(known: Built) -> bool:
            nonlocal looks
            looks += 1
            found = await look(known)
            if looks == 1:
                await shop.packages.remove(known.name)
            return found

        monkeypatch.setattr(shop.packages, "is_intact", is_intact)
        again = await shop.obtain("paint")
        assert again.name == built.name
        assert await look(again)
        assert list(shop.packages.all()) == [again]

    run(main())


def test_a_removal_that_takes_long_does_not_take_what_is_built_meanwhile(shop: Shop) -> None:
    built = shop.get_now("paint")

    async def main() -> None:
        may_close = asyncio.Event()

        async def close(_: str) -> None:
            await may_close.wait()

        def says(line: str) -> None:
            if line.startswith(("waiting", "built")):
                may_close.set()

        shop.packages.close = close
        removing = asyncio.ensure_future(shop.packages.remove(built.name))
        registering = asyncio.ensure_future(shop.obtain("paint", progress=says))
        await removing
        again = await registering
        assert await shop.packages.is_intact(again)
        assert shop.left() == [again.name, f"{again.name}.json"]

    run(main())


def test_downloads_of_what_cannot_be_installed_stay_within_the_capacity(
    tmp_path: Path, staged: Path, settings: PackageSettings, wheels: Path
) -> None:
    shop = Shop(tmp_path / "packages", staged, replace(settings, capacity=Size(4 << 20)))
    for number in range(3):
        name = f"large_{number}"
        write_wheel(wheels, name, "1.0", {f"{name}.py": "x" * (3 << 20)}, requires=["colours"])
        bad = wheels / "colours-2.0-py3-none-any.whl"
        bad.write_bytes(bad.read_bytes()[:-40])
        with pytest.raises(EnvironmentUnfit):
            shop.get_now(name)
        write_wheel(wheels, "colours", "2.0", {"colours.py": f"NAME = {number}\n"})
    assert cache_size(shop) <= 4 << 20


def test_what_a_killed_installation_left_in_temporary_files_is_swept(
    shop: Shop, staged: Path, settings: PackageSettings
) -> None:
    left = shop.directory / "tmp" / "left" / "wheel"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(1000))
    Shop(shop.directory, staged, settings)
    assert not left.exists()
