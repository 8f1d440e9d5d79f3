"""Commands of the node: found as workers find them, and told apart when they are replaced."""

import json
import os
import shutil

NOT_FOUND = "not found"


def identify_command(payload: bytes, path: str) -> str:
    """What tells one installed executable from another; see `worker.commands` for how it is found.

    Libraries that it loads do not count: a package manager that replaces them replaces the executable too.
    """
    command = json.loads(payload)[0][0]
    found = shutil.which(command, path=path)
    try:
        real = os.path.realpath(found or command)
        status = os.stat(real)
    except OSError:
        return NOT_FOUND
    return f"{real} {status.st_size} {status.st_mtime_ns}"
