"""shardmill: an object store and cache for sharded data in which a transformed shard is a URL.

Public names are loaded when first used, so importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardmill.client import Client, Pipeline, WDTransform
    from shardmill.marking import transform

__all__ = ["Client", "Pipeline", "WDTransform", "__version__", "transform"]

__version__ = "0.1.0"

_HOMES = {
    "Client": "shardmill.client",
    "Pipeline": "shardmill.client",
    "WDTransform": "shardmill.client",
    "transform": "shardmill.marking",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
