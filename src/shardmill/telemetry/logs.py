"""Log lines of a node: one a request, one a state change, with the request's id wherever there is one."""

import logging
import sys
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Of the request that the current task serves."""


def set_up(level: str) -> None:
    """Write lines of at least `level` (debug, info, warning, error) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"))
    root = logging.getLogger("shardmill")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    # What clients break is not the operator's to look at.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True
