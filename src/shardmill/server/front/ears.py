"""Sockets of the front that wait for requests, in a set of their own.

The loop's way from a readable socket to its protocol (an event, a handle, a context, a transport) costs more than a
small answer. So the loop watches one descriptor, that of this set, and who has something to read is asked directly.
"""

import asyncio
import contextlib
import select
from collections.abc import Callable

AT_ONCE = 64  # peers that are asked before others of the loop have their turn


class Ears:
    """Calls who can be read from, on the loop. Resources: `close` when the loop ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._set = select.epoll()
        self._peers: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._set.fileno(), self._hear)

    def add(self, descriptor: int, heard: Callable[[], None]) -> None:
        """Call `heard` whenever there is something to read, an end or an error, until `remove`."""
        self._peers[descriptor] = heard
        if not self._set.closed:
            self._set.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        """Before the descriptor is closed."""
        del self._peers[descriptor]
        # A node that ends may still close connections when nobody is listened to any more.
        if not self._set.closed:
            with contextlib.suppress(OSError):
                self._set.unregister(descriptor)

    def close(self) -> None:
        if not self._set.closed:
            self._loop.remove_reader(self._set.fileno())
            self._set.close()

    def _hear(self) -> None:
        for descriptor, _ in self._set.poll(0, AT_ONCE):
            heard = self._peers.get(descriptor)
            # Whoever was heard before may have removed it.
            if heard is not None:
                heard()
