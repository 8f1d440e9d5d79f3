"""What cannot leave the client is named, with the way to it."""

import queue
import socket
import sqlite3
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from shardmill.client import Client
from shardmill.client.shipping import CannotShip, ship
from shardmill.core.specs import Spec
from shardmill.marking import marks_of
from tests.client.processes import capturing, ship_from


def test_what_cannot_leave_is_named(tmp_path: Path) -> None:
    generator = (number for number in range(3))
    cases: list[tuple[object, str]] = [
        (threading.Lock(), "a lock"),
        (threading.RLock(), "a lock"),
        (threading.Condition(), "a condition"),
        (threading.Event(), "an event"),
        (threading.local(), "a thread's own storage"),
        (queue.Queue(), "a queue"),
        (generator, "a generator"),
        (weakref.ref(Path), "a weak reference"),
        (sys._getframe(), "a frame"),
        (Spec.parse("name@0123456789ab"), "a Spec"),
    ]
    for value, text in cases:
        with pytest.raises(
            CannotShip, match=f"^captured variable `value` of function `<lambda>` is {text}, which cannot"
        ):
            ship(capturing(value))
    with open(tmp_path / "file", "w") as file, pytest.raises(CannotShip, match=r"is an open file, .* open it inside"):
        ship(capturing(file))
    with socket.socket() as opened, pytest.raises(CannotShip, match="is a socket,"):
        ship(capturing(opened))
    with Client("http://127.0.0.1:1") as client, pytest.raises(CannotShip, match=r"is a Client, .* take what the"):
        ship(capturing(client))
    with sqlite3.connect(":memory:") as database, pytest.raises(CannotShip, match="is a database connection"):
        ship(capturing(database))
    database.close()


def test_the_message_says_the_way(tmp_path: Path) -> None:
    script = """
import threading

lock = threading.Lock()


class Holder:
    def __init__(self):
        self.parts = {"inner": [threading.Lock()]}


holder = Holder()


def helper():
    return holder


def augment(sample):
    with lock:
        return sample


def indirect(sample):
    return helper()


def default(sample, lock=lock):
    return sample
"""
    expected = {
        "augment": "global `lock` of function `augment` is a lock, which cannot leave this process; create it inside "
        "the function",
        "indirect": "`holder.parts['inner'][0]` (global `holder` of function `helper`) is a lock, which cannot leave "
        "this process; create it inside the function (reached through global `helper` of function `indirect`)",
        "default": "default of `lock` of function `default` is a lock, which cannot leave this process; create it "
        "inside the function",
    }
    for what, message in expected.items():
        with pytest.raises(AssertionError) as caught:
            ship_from(tmp_path, script, what=what)
        assert f"CannotShip: {message}\n" in str(caught.value)


def test_objects_that_refuse_are_named_with_their_reason() -> None:
    class Stubborn:
        def __reduce__(self) -> str:
            raise RuntimeError("not me")

    held = {"it": Stubborn()}
    with pytest.raises(CannotShip, match=r"`value\['it'\]` \(captured.*\) is a .*Stubborn .*\(not me\)"):
        ship(capturing(held))
    with pytest.raises(CannotShip, match="nested too deeply"):
        deep: list[Any] = []
        for _ in range(10_000):
            deep = [deep]
        ship(capturing(deep))


def test_what_is_no_function_is_refused() -> None:
    async def later(sample: Any) -> Any:
        return sample

    with pytest.raises(CannotShip, match="int is not callable"):
        ship(3)  # type: ignore[arg-type]
    with pytest.raises(CannotShip, match="`later` is async"):
        ship(later)


def test_parts_of_this_package_that_workers_lack_are_refused() -> None:
    import shardmill

    with pytest.raises(CannotShip, match=r"global `Client` .* needs shardmill\.client"):
        ship(lambda sample: Client("http://127.0.0.1:1"))
    with pytest.raises(CannotShip, match=r"`shardmill.Client` .* needs shardmill\.Client,"):
        ship(lambda sample: shardmill.Client)

    def imports(sample: Any) -> Any:
        from shardmill import Client as Late

        return Late

    with pytest.raises(CannotShip, match=r"^an import of function `imports` needs shardmill\.Client,"):
        ship(imports)
    ship(lambda sample: shardmill.transform)
    ship(capturing(marks_of))
