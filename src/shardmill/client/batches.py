"""Many members of one shard in turn, asked for ahead on one connection, so that none waits for a round trip."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from shardmill.client.answers import Answer
from shardmill.client.connection import Connection, WireError
from shardmill.client.framing import framing_of
from shardmill.client.http import Transport
from shardmill.client.reading import ObjectReader, strong_etag
from shardmill.core.errors import Conflict
from shardmill.core.paths import member_path
from shardmill.core.refs import ObjectRef

AHEAD = 32  # members asked for before the first is answered; their requests fit into any socket's buffer


class MemberBatch:
    """The members of a shard by their names, in the order of these: iterate once. Resources: `close` it.

    *Recovery:* what goes wrong with one is asked for again alone, as `MemberHandle.read` does; then the others go on.
    """

    def __init__(self, transport: Transport, ref: ObjectRef, names: Iterable[str]) -> None:
        self._transport = transport
        self._ref = ref
        self._names = iter(names)
        self._asked: deque[tuple[str, str]] = deque()
        """Names with their paths, in order, that were not answered yet."""
        self._connection: Connection | None = None
        self._sent = 0
        """How many of them were sent over it."""
        self._version: str | None = None

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Raises:
        ObjectNotFound, BucketNotFound, MemberNotFound, BadShard: As `MemberHandle.read`.
        Conflict: The shard was replaced meanwhile.
        """
        while self._ask():
            name, path = self._asked[0]
            try:
                data, etag = self._read()
            except (WireError, OSError, _NotRead):
                self._drop()
                with ObjectReader(self._transport, self._ref, path) as reader:
                    data, etag = reader.read(), reader.meta.etag
            self._asked.popleft()
            self._sent = max(self._sent - 1, 0)
            self._check(etag)
            yield name, data

    def close(self) -> None:
        """End it; also in the middle."""
        connection, self._connection = self._connection, None
        if connection is not None and not self._sent:
            self._transport.give_back(connection)
        elif connection is not None:
            connection.close()

    def _ask(self) -> bool:
        """Ask for more when half of what was asked for has come; False: nothing is left."""
        if self._sent <= AHEAD // 2:
            for name in islice(self._names, AHEAD - len(self._asked)):
                self._asked.append((name, member_path(self._ref, name)))
        return bool(self._asked)

    def _read(self) -> tuple[bytes, str | None]:
        """The next one's bytes and ETag."""
        if self._connection is None:
            self._connection, self._sent = self._transport.take(), 0
        connection = self._connection
        if self._sent < len(self._asked):
            unsent = islice(self._asked, self._sent, None)
            requests = b"".join([self._transport.request_of("GET", path) for _, path in unsent])
            # Before: an interrupt in the midst of it must not leave the connection to others.
            self._sent = len(self._asked)
            connection.send(requests)
        head = connection.read_head()
        framing = framing_of(connection, head, "GET")
        if head.status != 200 or framing is None:
            raise _NotRead
        answer = Answer(connection, head, framing, _Kept())
        data = answer.read_all()
        if not head.stays:
            self._drop()
        return data, strong_etag(head.fields)

    def _drop(self) -> None:
        """Ask for everything again that was not answered, over another connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._sent = None, 0

    def _check(self, etag: str | None) -> None:
        # A member's ETag is its shard's, then its place.
        version = None if etag is None else etag.rpartition("-")[0]
        if self._version not in (None, version):
            raise Conflict(f"{self._ref} was replaced while its members were read; read them again")
        self._version = version


class _NotRead(Exception):
    """An answer that is no member."""


class _Kept:
    """A pool that leaves a connection to whoever reads the next answer from it."""

    def give_back(self, connection: Connection) -> None: ...
