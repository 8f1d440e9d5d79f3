"""What a peer has not taken, also of a connection that is closed."""

import asyncio
import socket

from shardmill.server.patience import count_untaken


def test_nothing_is_untaken_of_a_connection_that_is_closed() -> None:
    """It is asked about by the watch over all connections, which goes on as long as the node does."""

    class Told(asyncio.Protocol):
        def __init__(self) -> None:
            self.is_lost = asyncio.Event()

        def connection_lost(self, exc: Exception | None) -> None:
            self.is_lost.set()

    async def main() -> None:
        near, far = socket.socketpair()
        with far:
            transport, told = await asyncio.get_running_loop().create_connection(Told, sock=near)
            transport.abort()
            await told.is_lost.wait()
            assert transport.get_extra_info("socket").fileno() < 0
            assert count_untaken(transport) == 0

    asyncio.run(main())
