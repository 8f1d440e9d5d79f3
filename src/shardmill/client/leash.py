"""Ends from one thread what another one waits for: an answer, or the time until the next try."""

import threading

from shardmill.client.answers import TruncatedBody
from shardmill.client.connection import Connection


class Leash:
    """Of one thread that asks a node; whoever has it in another thread may pull it, once and for all."""

    def __init__(self) -> None:
        self._pulled = threading.Event()
        self._connection: Connection | None = None

    @property
    def is_pulled(self) -> bool:
        return self._pulled.is_set()

    def pull(self) -> None:
        """Have it wait for nothing any more."""
        self._pulled.set()
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def hold(self, connection: Connection | None) -> None:
        """Say over which connection an answer is waited for from now on; None: over none."""
        self._connection = connection
        # Behind it: whoever pulled before has not seen the connection.
        if connection is not None and self._pulled.is_set():
            connection.interrupt()

    def check(self) -> None:
        """Raises:
        TruncatedBody: It was pulled.
        """
        if self._pulled.is_set():
            raise TruncatedBody("it was interrupted")

    def wait(self, seconds: float) -> None:
        """Let time pass; raises as `check`."""
        self._pulled.wait(seconds)
        self.check()
