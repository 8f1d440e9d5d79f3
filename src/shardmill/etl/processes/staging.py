"""A private copy of what a worker needs, so that any interpreter can run it without installing anything.

The copy stands first on the interpreter's path: this node's code serves every environment, whatever is installed.
"""

import importlib.util
import shutil
from pathlib import Path

import shardmill.shards
import shardmill.worker

BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from shardmill.worker.zygote import main; main()"
"""What the interpreter is given with `-c`; its first argument is the stage."""

LAUNCH = "import sys; sys.path.insert(0, sys.argv.pop(1)); from shardmill.worker.launch import main; main()"
"""The same for a program that is not ours; see `shardmill.worker.launch`."""

_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def stage(directory: Path) -> Path:
    """Copy `shardmill.worker`, `shardmill.shards` and cloudpickle below a directory that must not exist yet."""
    package = directory / "shardmill"
    package.mkdir(parents=True)
    for folder in (shardmill.worker, shardmill.shards):
        source = Path(str(folder.__file__)).parent
        shutil.copytree(source, package / source.name, ignore=_IGNORED)
    root = Path(str(shardmill.worker.__file__)).parent.parent
    for file in ("__init__.py", "marking.py"):
        if (root / file).exists():
            shutil.copy(root / file, package / file)
    cloudpickle = importlib.util.find_spec("cloudpickle")
    assert cloudpickle is not None and cloudpickle.origin is not None
    shutil.copytree(Path(cloudpickle.origin).parent, directory / "cloudpickle", ignore=_IGNORED)
    return directory
