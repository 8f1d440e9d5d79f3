"""Log lines: the request's id wherever there is one, and only what is asked for."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from shardmill.telemetry import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The program's logger, put back afterwards."""
    touched = [logging.getLogger(name) for name in ("shardmill", "aiohttp", "asyncio")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in touched]
    yield touched[0]
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


def test_a_line_has_level_logger_request_and_message(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    token = logs.request_id.set("r1234")
    logging.getLogger("shardmill.storage.pool").info("block %d of %s", 3, "ais://b/k")
    logs.request_id.reset(token)
    logging.getLogger("shardmill.server").warning("node %d draining", 3)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO shardmill.storage.pool [r1234] block 3 of ais://b/k")
    assert second.endswith("WARNING shardmill.server [-] node 3 draining")


def test_only_lines_of_at_least_the_level_are_written_and_each_once(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        logs.set_up("warning")
    logging.getLogger("shardmill.node").info("unseen")
    logging.getLogger("shardmill.node").error("seen")
    assert [line.rpartition("] ")[2] for line in capsys.readouterr().err.splitlines()] == ["seen"]


def test_tasks_of_two_requests_keep_their_own_ids(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug")
    logger = logging.getLogger("shardmill.server.app")

    async def serve(name: str, turn: asyncio.Event, other: asyncio.Event) -> None:
        logs.request_id.set(name)
        other.set()
        await turn.wait()
        logger.debug("done by %s", name)

    async def both() -> None:
        turns = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve("r1", turns[0], turns[1]))
            tasks.create_task(serve("r2", turns[1], turns[0]))

    asyncio.run(both())
    lines = sorted(line.partition("[")[2] for line in capsys.readouterr().err.splitlines())
    assert lines == ["r1] done by r1", "r2] done by r2"]


def test_what_clients_break_is_not_the_operators_to_look_at(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("debug")
    logging.getLogger("aiohttp.server").error("Error handling request")
    logging.getLogger("asyncio").warning("slow callback")
    assert capsys.readouterr().err == ""
