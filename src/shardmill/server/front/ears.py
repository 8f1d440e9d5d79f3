"""Sockets of the front that wait for requests, or for room, in sets of their own.

The loop's way from a socket to its protocol (an event, a handle, a context, a transport) costs more than a small
answer. So the loop watches two descriptors, those of the sets, and who can go on is called directly. Between two pieces
of large answers whoever asks is heard, so that small answers do not wait for more than one of them.
"""

import asyncio
import contextlib
import logging
import select
from collections.abc import Callable

logger = logging.getLogger(__name__)

AT_ONCE = 64  # peers that are asked before others of the loop have their turn
TURNS = 8  # looks for who asks meanwhile, likewise
STEPS = 8  # pieces of large answers that are sent before others of the loop have their turn


class Ears:
    """Calls who can be read from or written to, on the loop. Resources: `close` when the loop ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asking = _Set(select.EPOLLIN)
        self._taking = _Set(select.EPOLLOUT)
        loop.add_reader(self._asking.fileno(), self._hear)
        loop.add_reader(self._taking.fileno(), self._send)

    def add(self, descriptor: int, heard: Callable[[], None]) -> None:
        """Call `heard` whenever there is something to read, an end or an error, until `remove`."""
        self._asking.add(descriptor, heard)

    def remove(self, descriptor: int) -> None:
        """Before the descriptor is closed."""
        self._asking.remove(descriptor)

    def add_writer(self, descriptor: int, step: Callable[[], None]) -> None:
        """Call `step` whenever there is room to write, or an error, until `remove_writer`."""
        self._taking.add(descriptor, step)

    def remove_writer(self, descriptor: int) -> None:
        """Before the descriptor is closed; it need not be there any more."""
        if descriptor in self._taking.calls:
            self._taking.remove(descriptor)

    def close(self) -> None:
        for waiting in (self._asking, self._taking):
            if not waiting.closed:
                self._loop.remove_reader(waiting.fileno())
                waiting.close()

    def _hear(self) -> None:
        for _ in range(TURNS):
            if not self._asking.call(AT_ONCE):
                return

    def _send(self) -> None:
        for _ in range(STEPS):
            if not self._taking.call(1):
                return
            self._asking.call(AT_ONCE)


class _Set:
    """Descriptors that wait for one kind of event."""

    def __init__(self, event: int) -> None:
        self._event = event
        self._poll = select.epoll()
        self.calls: dict[int, Callable[[], None]] = {}

    @property
    def closed(self) -> bool:
        return self._poll.closed

    def fileno(self) -> int:
        return self._poll.fileno()

    def close(self) -> None:
        self._poll.close()

    def add(self, descriptor: int, call: Callable[[], None]) -> None:
        self.calls[descriptor] = call
        if not self._poll.closed:
            self._poll.register(descriptor, self._event)

    def remove(self, descriptor: int) -> None:
        del self.calls[descriptor]
        # A node that ends may still close connections when nobody is listened to any more.
        if not self._poll.closed:
            with contextlib.suppress(OSError):
                self._poll.unregister(descriptor)

    def call(self, most: int) -> int:
        """Call those that can go on now, each in its turn, and say how many they were."""
        if self._poll.closed:
            return 0
        ready = self._poll.poll(0, most)
        for descriptor, _ in ready:
            call = self.calls.get(descriptor)
            # Whoever was called before may have removed it.
            if call is not None:
                call()
        return len(ready)
