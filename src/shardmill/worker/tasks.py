"""What is done with whole objects, by kind."""

import json
from typing import Any

from shardmill.worker.calls import load_function
from shardmill.worker.commands import CommandTask
from shardmill.worker.objects import BytesTask, StreamTask, Task


def load_task(head: dict[str, Any], payload: bytes) -> Task:
    """The task of a `load` message; raises SampleFailure when it cannot be loaded here."""
    if head["kind"] == "command":
        return CommandTask(json.loads(payload), head["args"] or {}, head["path"])
    function = load_function(head["encoding"], payload, head["args"])
    return StreamTask(function) if head["kind"] == "stream" else BytesTask(function, by_path=head["by_path"])
