"""Whose a module is: the user's own, which goes along with a function by value, or installed, which goes by name.

Own are modules whose file lies outside the standard library and site-packages, editable installs included, and those
that a program made by itself. Compiled modules cannot be taken apart, so they always go by name.
"""

import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from types import ModuleType

import cloudpickle

_STAGED = ("shardmill.shards", "shardmill.worker", "shardmill.marking")
_STAGED_NAMES = ("shardmill", "shardmill.transform", "shardmill.__version__")

_NOT_LISTED = {"shardmill", "cloudpickle", "__main__", "__mp_main__", *sys.stdlib_module_names}
_COMPILED = tuple(importlib.machinery.EXTENSION_SUFFIXES)


def is_own(module: ModuleType) -> bool:
    """Whether the module goes along by value."""
    name = module.__name__
    if name == "__main__" or name in cloudpickle.list_registry_pickle_by_value():
        return True
    if _top(name) in ("shardmill", "cloudpickle") or name in sys.builtin_module_names:
        return False
    file = getattr(module, "__file__", None)
    paths = [file] if file else list(getattr(module, "__path__", ()))
    # One without a file was made by hand, unless it came with a library's compiled part.
    return _are_own(paths) if paths else sys.modules.get(name) is not module


def is_own_name(name: str) -> bool | None:
    """Whether the module of a top-level name is the user's own, without importing it; None: there is none."""
    if (loaded := sys.modules.get(name)) is not None:
        return is_own(loaded)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if _top(name) in ("shardmill", "cloudpickle"):
        return False
    if spec.has_location and spec.origin:
        return _are_own([spec.origin])
    return _are_own(spec.submodule_search_locations or ())


def is_staged(name: str) -> bool:
    """False for modules and names of this package that do not exist where functions run."""
    if _top(name) != "shardmill" or name in _STAGED_NAMES:
        return True
    return f"{name}.".startswith(tuple(f"{module}." for module in _STAGED))


def installed_names(module_names: Iterable[str]) -> tuple[str, ...]:
    """Top-level names of modules that an environment must have installed, sorted."""
    return tuple(sorted({_top(name) for name in module_names} - _NOT_LISTED))


def _are_own(paths: Iterable[str]) -> bool:
    found = list(paths)
    return bool(found) and not any(path.endswith(_COMPILED) or _is_installed(path) for path in found)


@cache
def _is_installed(path: str) -> bool:
    # Both forms: a link in site-packages may lead out of it, and one outside may lead in.
    for form in {os.path.abspath(path), os.path.realpath(path)}:
        if {"site-packages", "dist-packages"} & set(form.split(os.sep)) or form.startswith(_installed_folders()):
            return True
    return False


@cache
def _installed_folders() -> tuple[str, ...]:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {path for path in sys.path if path.endswith(".zip") and path.startswith(sys.base_prefix)}
    return tuple(form + os.sep for path in folders if path for form in (os.path.abspath(path), os.path.realpath(path)))


def _top(name: str) -> str:
    return name.partition(".")[0]
