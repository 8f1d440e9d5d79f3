"""Which layers of isolation this kernel gives, found out before the first worker needs them."""

import asyncio
import functools
import json
import subprocess
import sys
import tempfile

from shardmill.worker.limits import BY_BIRTH

TIMEOUT = 30  # seconds; it takes a tenth of one
_PROBE = """
import json, os, sys
from shardmill.worker import limits
print(json.dumps(limits.confine(os.getppid(), 1 << 30, sys.argv[1])))
"""


async def find_layers() -> dict[str, bool]:
    """Layer → active, as a process found that has confined itself like a worker; empty if none could be started.

    The kernel does not change under a node, so this is looked at once.
    """
    return await asyncio.to_thread(_layers)


@functools.cache
def _layers() -> dict[str, bool]:
    with tempfile.TemporaryDirectory(prefix="shardmill-isolation-") as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROBE, scratch], capture_output=True, timeout=TIMEOUT, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}
    return {str(name): bool(active) for name, active in json.loads(done.stdout).items()} | BY_BIRTH
