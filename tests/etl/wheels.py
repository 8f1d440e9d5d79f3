"""Wheels of our own, made here, and virtual environments that hold them: nothing needs a network."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

UV = (sys.executable, "-m", "uv")


def write_wheel(
    directory: Path, name: str, version: str, files: Mapping[str, str], *, requires: Sequence[str] = ()
) -> Path:
    """A pure Python wheel; `files` by their paths in site-packages."""
    directory.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_hash(text)},{len(text.encode())}" for path, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in contents.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path


def make_environment(directory: Path, *wheels: Path) -> Path:
    """A virtual environment of this Python with these wheels and nothing else; returns its interpreter."""
    _run("venv", "--quiet", "--python", sys.executable, str(directory))
    python = directory / "bin" / "python"
    install(python, *wheels)
    return python


def install(python: Path, *wheels: Path) -> None:
    """Install wheels into a living environment, in place of other versions of them."""
    if wheels:
        _run("pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), *map(str, wheels))


def _run(*arguments: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run([*UV, *arguments], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr


def _hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
