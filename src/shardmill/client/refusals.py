"""What cannot leave the client's process, and how to say where it was found."""

import io
from dataclasses import dataclass, replace
from typing import Any

from shardmill.client.ownership import is_staged

_INSIDE = "create it inside the function"
_BEFORE = "take what the function needs from it first, and let the function use that"

MAX_STEPS = 4  # of a trail in a message

# By qualified name, so that nothing has to be imported to recognise it.
_KINDS = {
    "_thread.lock": ("a lock", _INSIDE),
    "_thread.RLock": ("a lock", _INSIDE),
    "threading.Condition": ("a condition", _INSIDE),
    "threading.Event": ("an event", _INSIDE),
    "threading.Semaphore": ("a semaphore", _INSIDE),
    "threading.Barrier": ("a barrier", _INSIDE),
    "threading.Thread": ("a thread", _INSIDE),
    "_thread._local": ("a thread's own storage", _INSIDE),
    "queue.Queue": ("a queue", _INSIDE),
    "_queue.SimpleQueue": ("a queue", _INSIDE),
    "multiprocessing.synchronize.SemLock": ("a lock", _INSIDE),
    "multiprocessing.queues.Queue": ("a queue", _INSIDE),
    "multiprocessing.pool.Pool": ("a pool of processes", _INSIDE),
    "multiprocessing.process.BaseProcess": ("a process", _INSIDE),
    "subprocess.Popen": ("a process", _INSIDE),
    "concurrent.futures._base.Executor": ("an executor", _INSIDE),
    "concurrent.futures._base.Future": ("a future", _BEFORE),
    "asyncio.events.AbstractEventLoop": ("an event loop", _INSIDE),
    "_asyncio.Future": ("a future", _BEFORE),
    "_socket.socket": ("a socket", _INSIDE),
    "_ssl._SSLContext": ("a TLS context", _INSIDE),
    "mmap.mmap": ("a memory map", "capture bytes(...) of it"),
    "sqlite3.Connection": ("a database connection", _INSIDE),
    "builtins.generator": ("a generator", "make it a list, or " + _INSIDE),
    "builtins.async_generator": ("a generator", "make it a list"),
    "builtins.coroutine": ("a coroutine", _BEFORE),
    "builtins.frame": ("a frame", _BEFORE),
    "builtins.traceback": ("a traceback", _BEFORE),
    "weakref.ReferenceType": ("a weak reference", "capture the object itself"),
    "weakref.ProxyType": ("a weak reference", "capture the object itself"),
}


class CannotShip(TypeError):
    """A function holds something that cannot leave this process; the message says what, and where it was found."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object was found: a named root, and the way from there."""

    root: str
    """E.g. "global `lock` of function `augment`"."""
    name: str
    steps: str = ""
    through: "Place | None" = None
    """Where the function or class was found that the root speaks of; None: it is the transform itself."""

    def attribute(self, name: str) -> "Place":
        return replace(self, steps=f"{self.steps}.{name}")

    def item(self, key: Any) -> "Place":
        text = repr(key) if isinstance(key, str | int) else f"<{type(key).__name__}>"
        return replace(self, steps=f"{self.steps}[{text[:60]}]")

    def trail(self) -> list["Place"]:
        """The places on the way from the transform to here, this one last."""
        return [*(self.through.trail() if self.through else ()), self]

    def __str__(self) -> str:
        return f"`{self.name}{self.steps}` ({self.root})" if self.steps else self.root


def refuse(place: Place, what: str, way_out: str) -> CannotShip:
    """The error for something that was found at a place."""
    return CannotShip(f"{place} is {what}, which cannot leave this process; {way_out}{_way_to(place)}")


def check_may_leave(value: object, place: Place) -> None:
    """Refuse what is bound to this process.

    Raises:
        CannotShip: Names the kind of object and where it is.
    """
    kind = type(value)
    if isinstance(value, io.IOBase) and not isinstance(value, io.BytesIO | io.StringIO):
        raise refuse(place, "an open file", "open it inside the function, or read it first")
    for base in kind.__mro__:
        if found := _KINDS.get(f"{base.__module__}.{base.__qualname__}"):
            raise refuse(place, *found)
    if not is_staged(kind.__module__):
        raise refuse(place, f"a {kind.__name__}", _BEFORE)


def check_is_there(name: str, place: Place) -> None:
    """Refuse what is imported from parts of this package that do not exist where functions run.

    Raises:
        CannotShip: Names it.
    """
    if not is_staged(name):
        text = f"{place} needs {name}, which does not exist where functions run; {_BEFORE}"
        raise CannotShip(text + _way_to(place))


def _way_to(place: Place) -> str:
    """How the transform comes by it, when that is not plain from the place itself."""
    steps = [str(step) for step in place.trail()[1:-1]]
    if len(steps) > MAX_STEPS:
        steps = [*steps[: MAX_STEPS - 1], "…", steps[-1]]
    return f" (reached through {', then '.join(steps)})" if steps else ""
