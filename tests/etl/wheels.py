"""Wheels of our own, made here, and virtual environments that hold them: nothing needs a network."""

import base64
import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
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
        f"{info}/METADATA": _metadata(name, version, requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_hash(text.encode())},{len(text.encode())}" for path, text in contents.items()]
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


def _metadata(name: str, version: str, requires: Sequence[str]) -> str:
    needed = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}"


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def repack(directory: Path, *names: str) -> None:
    """Wheels of distributions as they are installed here, so that an environment can have them without a network."""
    directory.mkdir(exist_ok=True)
    for name in names:
        found = importlib.metadata.distribution(name)
        tags = [
            line.partition(": ")[2] for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag")
        ]
        interpreters, abis, platforms = ({tag.split("-")[part] for tag in tags} for part in range(3))
        tag = "-".join(".".join(sorted(part)) for part in (interpreters, abis, platforms))
        path = directory / f"{found.metadata['Name'].replace('-', '_')}-{found.version}-{tag}.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            record = []
            for file in found.files or ():
                if (
                    ".." in file.parts
                    or "__pycache__" in file.parts
                    or file.name in ("RECORD", "INSTALLER", "REQUESTED")
                ):
                    continue
                data = Path(str(file.locate())).read_bytes()
                archive.writestr(zipfile.ZipInfo(str(file)), data)
                record.append(f"{file},sha256={_hash(data)},{len(data)}")
            info = next(file.parts[0] for file in found.files or () if file.parts[0].endswith(".dist-info"))
            archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")


def write_sdist(directory: Path, name: str, version: str, *, backend: str) -> Path:
    """A source distribution that builds itself by the module `backend`, which needs nothing."""
    project = f'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "{name}"\nversion = "{version}"\n'
    files = {"pyproject.toml": project, "backend.py": backend, "PKG-INFO": _metadata(name, version, ())}
    path = directory / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, text in files.items():
            header = tarfile.TarInfo(f"{name}-{version}/{member}")
            header.size = len(text.encode())
            archive.addfile(header, io.BytesIO(text.encode()))
    return path
