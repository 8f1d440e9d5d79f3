"""What is done with whole objects, by kind."""

import json
from typing import Any

from shardmill.worker.calls import load_functions
from shardmill.worker.commands import CommandTask
from shardmill.worker.objects import BytesTask, StreamTask, Task


def load_task(head: dict[str, Any], payload: bytes) -> Task:
    """The task of a `load` message; raises SampleFailure when it cannot be loaded here."""
    if head["kind"] == "command":
        return CommandTask(json.loads(payload), head["args"] or {}, head["path"])
    functions = load_functions(head["encoding"], payload, head["args"])
    return StreamTask(functions[0]) if head["kind"] == "stream" else BytesTask(functions, by_path=head["by_path"])
