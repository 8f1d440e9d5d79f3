"""Imports go one way: `server → jobs → node → (storage | etl | cluster) → (shards, core)`.

The rules are read from the syntax trees of the package, so that nothing needs to be installed to check them.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "shardmill"

# Folder or module directly below the package → what else of it may be imported there. An entry with a dot is one
# module only, one with an equals sign the package itself without its modules (to stage its files). Anyone may import `shardmill` itself, for its version.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "shards": set(),
    "worker": {"shards"},
    "config": {"core"},
    "telemetry": {"core", "config"},
    "marking": {"core"},
    "storage": {"core", "config", "shards", "telemetry"},
    # The wire between parent and worker and the memory they share are one definition, used by both ends: see
    # docs/design/2026-11-24-one-definition-of-the-worker-wire.md.
    "etl": {
        "core",
        "config",
        "shards",
        "telemetry",
        "=worker",
        "worker.wire",
        "worker.arena",
        "worker.limits",
        "worker.installed",
    },
    "cluster": {"core", "config", "telemetry"},
    "node": {"core", "config", "shards", "telemetry", "storage", "etl", "cluster", "worker.limits"},
    # Beside the node: steps that are seen through, and files that must survive, which have one definition.
    "jobs": {"core", "config", "shards", "telemetry", "node", "storage.steps", "storage.files"},
    "server": {"core", "config", "shards", "telemetry", "node", "jobs"},
    "client": {"core", "shards", "marking"},
    # A function of the trainer's own is seeded and called exactly as a worker would.
    "loader": {"core", "shards", "client", "worker.calls", "worker.samples", "worker.seeding"},
    "notebook": {"core", "shards", "client", "loader"},
    "torch": {"core", "shards", "client", "loader"},
    "cli": {"core", "config", "shards", "client", "marking", "notebook", "loader", "testing.node"},
    "on_ray": {"core", "config", "telemetry", "node", "server", "cluster", "jobs"},
    "testing": {
        "core",
        "config",
        "shards",
        "client",
        "node",
        "server",
        "storage",
        "etl",
        "cluster",
        "jobs",
        "telemetry",
    },
    "__init__": {"client", "marking"},
}

# The same within a folder that has rooms of its own: folder or module directly below it → what else of it may be
# imported there.
ROOMS: dict[str, dict[str, set[str]]] = {
    "etl": {
        "durable": set(),
        "failures": set(),
        "scratch": set(),
        "steps": set(),
        "versions": {"durable"},
        "processes": set(),
        "environments": {"processes", "durable", "scratch", "steps"},
        "workers": {"versions", "processes", "environments", "scratch"},
        "runs": {"versions", "processes", "environments", "workers"},
        "probes": {"versions", "processes", "environments", "workers", "runs"},
        "engine": {
            "versions",
            "processes",
            "environments",
            "workers",
            "runs",
            "probes",
            "failures",
            "scratch",
        },
    },
}

# Imported inside functions only, so that the other commands stay quick: module of cli → what it may defer.
DEFERRED: dict[str, set[str]] = {
    "cli.serve": {"server"},
    "cli.demo": {"testing"},
    "cli.node": {"worker", "node", "etl"},
    "__init__": {"client", "marking"},
}

# Third-party package → the only folders or modules that import it.
OWNERS: dict[str, set[str]] = {
    "obstore": {"storage"},
    "lmdb": {"storage"},
    "uv": {"etl"},
    "ray": {"on_ray"},
    "aiohttp.web": {"server", "testing"},
    "webdataset": {"torch"},
    "torch": {"torch", "loader", "notebook", "shards", "worker"},
    "matplotlib": {"notebook", "cli"},
    "skimage": {"cli"},
    "prometheus_client": {"telemetry", "server"},
    "cloudpickle": {"client", "worker", "etl"},
}

NO_IO = {"asyncio", "socket", "subprocess", "threading", "multiprocessing", "selectors", "tempfile", "shutil", "http"}


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    module: str
    """The importing module, below the package: `etl.engine`; `__init__` for the package itself."""
    target: str
    """Dotted name: `shardmill.core.refs.Bucket`, `os.path`."""
    line: int
    deferred: bool
    """Inside a function."""
    typing_only: bool
    """Under `if TYPE_CHECKING`."""

    def __str__(self) -> str:
        return f"shardmill.{self.module}:{self.line} imports {self.target}"

    @property
    def folder(self) -> str:
        return self.module.partition(".")[0]

    @property
    def inside(self) -> str | None:
        """What it imports of the package, below it: `core.refs.Bucket`; None if it is of another."""
        package, _, below = self.target.partition(".")
        return below if package == "shardmill" else None


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Every imported name, in the order of the lines."""

    def walk(node: ast.AST, deferred: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, deferred, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively: write the whole name"
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}", node.lineno, deferred, typing_only)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body
            yield from walk(child, deferred or is_function, typing_only or guarded)

    yield from walk(ast.parse(source), False, False)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def all_imports() -> list[Import]:
    return [
        found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(module_name(path), path.read_text())
    ]


def violations(imports: list[Import]) -> list[str]:
    """One line for each import that breaks a rule."""
    return [f"{found}: {reason}" for found in imports if (reason := _reason(found))]


def _reason(found: Import) -> str | None:
    if found.inside is not None:
        return _reason_inside(found)
    top = found.target.partition(".")[0]
    for package, owners in OWNERS.items():
        if (found.target == package or found.target.startswith(f"{package}.")) and found.folder not in owners:
            return f"only {', '.join(sorted(owners))} may"
    if found.folder == "core" and top in NO_IO:
        return "core does no I/O"
    if (
        found.folder in ("shards", "worker")
        and not found.deferred
        and not found.typing_only
        and top not in sys.stdlib_module_names
    ):
        return "at module level it has the standard library only"
    return None


def _reason_inside(found: Import) -> str | None:
    below = found.inside
    assert below is not None
    parts = below.split(".")
    if below in ("", "__version__"):
        return None
    if found.folder == parts[0]:
        return _reason_among_rooms(found.module.split("."), parts)
    if any(part.startswith("_") and not part.startswith("__") for part in parts):
        return "the name is private to its folder"
    if found.deferred:
        deferred = DEFERRED.get(found.module, set()) | DEFERRED.get(found.folder, set())
        if found.folder == "cli" and any(below == entry or below.startswith(f"{entry}.") for entry in ALLOWED["cli"]):
            return None
        return None if parts[0] in deferred else "imports of the package stand at the top of the module"
    allowed = ALLOWED.get(found.folder)
    if allowed is None:
        return f"{found.folder} has no row in the table of allowed imports"
    if not any(below == entry.lstrip("=") or below.startswith(f"{entry}.") for entry in allowed):
        return f"{found.folder} may import {', '.join(sorted(allowed)) or 'nothing'}"
    return None


def _reason_among_rooms(module: list[str], target: list[str]) -> str | None:
    """Of an import within one folder."""
    rooms = ROOMS.get(module[0])
    if rooms is None or len(module) == 1:
        return None
    room = module[1]
    if room not in rooms:
        return f"{room} has no row in the table of rooms of {module[0]}"
    if len(target) > 1 and target[1] != room and target[1] not in rooms[room]:
        return f"{module[0]}.{room} may import {', '.join(sorted(rooms[room])) or 'nothing'} of {module[0]}"
    return None


def test_every_import_goes_the_right_way() -> None:
    imports = all_imports()
    assert len(imports) > 100
    assert violations(imports) == []


def test_no_two_folders_import_each_other() -> None:
    edges = {
        (found.folder, found.inside.partition(".")[0])
        for found in all_imports()
        if found.inside and not found.deferred and not found.typing_only and found.folder != "__init__"
    }
    mutual = {(a, b) for a, b in edges if a != b and (b, a) in edges}
    assert mutual == set()


def circles(imports: list[Import]) -> list[list[str]]:
    """Modules that import each other, by whatever detour; also where that is hidden in functions or from run time."""
    modules = {found.module for found in imports}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        # A module of a folder, or a name of a module.
        names = [found.inside or "", (found.inside or "").rpartition(".")[0]]
        edges[found.module] |= {next((name for name in names if name in modules), found.module)} - {found.module}
    reached = {module: _reached(edges, module) for module in modules}
    found_circles = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in modules if a in reached[a]}
    return [list(circle) for circle in sorted(found_circles)]


def _reached(edges: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        fresh = edges[pending.pop()] - seen
        seen |= fresh
        pending += fresh
    return seen


def test_no_modules_import_each_other() -> None:
    assert circles(all_imports()) == []


def test_a_circle_is_found_wherever_it_is_hidden() -> None:
    sources = {
        "etl.runs.run": "from shardmill.etl.runs.spool import Spool",
        "etl.runs.spool": "from shardmill.etl.runs import registry",
        "etl.runs.registry": "def f():\n    from shardmill.etl.runs.run import Run",
        "etl.runs.clock": "from shardmill.etl.runs.run import Run",
    }
    found = [found for module, source in sources.items() for found in imports_of(module, source)]
    assert circles(found) == [["etl.runs.registry", "etl.runs.run", "etl.runs.spool"]]


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("core.refs", "from shardmill.etl.runs.run import Run", "core may import nothing"),
        ("core.refs", "import asyncio", "core does no I/O"),
        ("core.refs", "from socket import socket", "core does no I/O"),
        ("storage.pool", "from shardmill.node.objects import Objects", "storage may import"),
        ("storage.pool", "from shardmill.etl import engine", "storage may import"),
        ("server.app", "from shardmill.storage.pool import Pool", "server may import"),
        ("server.app", "from shardmill.node.objects import _private", "private to its folder"),
        ("server.app", "from shardmill.node._hidden import Name", "private to its folder"),
        ("node.objects", "from shardmill.worker.loop import serve", "node may import"),
        ("node.objects", "from shardmill.jobs.registry import Jobs", "node may import"),
        ("jobs.transform", "from shardmill.server.app import App", "jobs may import"),
        ("jobs.transform", "from shardmill.storage.pool import PoolStore", "jobs may import"),
        ("node.objects", "def f():\n    from shardmill.storage.pool import Pool", "at the top of the module"),
        ("client.client", "from shardmill.config import Config", "client may import"),
        ("cli.get", "def get():\n    from shardmill.server.app import serve", "at the top of the module"),
        ("cli.get", "import shardmill.server.app", "cli may import"),
        ("worker.loop", "import numpy", "the standard library only"),
        ("worker.loop", "from shardmill.core.errors import Busy", "worker may import"),
        ("etl.runs.run", "from shardmill.worker.loop import serve", "etl may import"),
        ("etl.runs.run", "import lmdb", "only storage may"),
        ("etl.workers.pool", "from shardmill.etl.runs.run import Run", "etl.workers may import"),
        ("etl.versions.registry", "from shardmill.etl import engine", "etl.versions may import durable of etl"),
        ("etl.scratch", "from shardmill.etl.durable import write_durably", "etl.scratch may import nothing"),
        ("etl.novel.module", "from shardmill.etl.scratch import remove_tree", "novel has no row"),
        ("node.objects", "def f():\n    import obstore.store", "only storage may"),
        ("client.http", "from aiohttp import web", "only server"),
        ("server.app", "import ray", "only on_ray may"),
        ("novel.module", "from shardmill.core.refs import Bucket", "has no row"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, reason: str) -> None:
    found = violations(list(imports_of(module, source)))
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.serve", "def serve():\n    from shardmill.server.app import serve"),
        ("cli.get", "def get():\n    from shardmill.client import Client"),
        ("etl.processes.channel", "from shardmill.worker import wire"),
        ("etl.runs.run", "from shardmill.etl.workers.pool import WorkerPool"),
        ("etl.runs.run", "from shardmill.etl.runs import clock"),
        ("node.transforms", "from shardmill.worker.limits import LAYERS"),
        ("worker.loop", "def f():\n    import numpy"),
        ("client.http", "from shardmill import __version__"),
        ("storage.pool", "import lmdb"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert violations(list(imports_of(module, source))) == []
