"""What goes by name because it is there wherever its module is installed."""

import sys
from types import FunctionType
from typing import Any

from shardmill.client.ownership import is_own

# Bound methods of these are what `from random import randrange` gives: a copy would have a state of its own, which no
# worker seeds and which differs from process to process.
_SHARED = {
    "random": ("_inst",),
    "numpy.random.mtrand": ("_rand",),
    "torch": ("default_generator",),
    "os": ("environ", "environb"),
    "sys": ("stdin", "stdout", "stderr"),
}
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made at run time


def is_importable(value: Any) -> bool:
    """Whether a function or a class is found by its name in a module that is not the user's own."""
    if isinstance(value, type) and not value.__flags__ & _HEAP_TYPE:
        return True
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if module is None or is_own(module):
        return False
    found: Any = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def shared_object(value: object) -> tuple[str, str] | None:
    """Module and attribute of an object of which every process has exactly one."""
    if isinstance(value, type | FunctionType):
        return None
    for module, names in _SHARED.items():
        if (loaded := sys.modules.get(module)) is not None:
            for name in names:
                if vars(loaded).get(name) is value:
                    return module, name
    return None
