"""Which addresses a redirect may lead to.

A web server that is somebody else's could otherwise make the node fetch what only the node can reach: the machine's
metadata service, other services on it, the network behind it.
"""

import ipaddress
import socket
from collections.abc import Set
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from shardmill.core.errors import BackendDenied


def is_private(host: str) -> bool:
    """Whether a literal address is not one of the public network; names are not literal."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_global


class CheckedResolver(AbstractResolver):
    """Resolves names, and refuses those that lead to private addresses; looked at where the connection is made."""

    def __init__(self, trusted: Set[str], *, allow_private: bool) -> None:
        self._trusted = trusted
        self._allow_private = allow_private
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if host not in self._trusted and not self._allow_private and any(is_private(item["host"]) for item in found):
            raise BackendDenied(f"{host} is at a private address; where that is meant, set allow_private = true")
        return found

    async def close(self, *_: Any) -> None:
        await self._resolver.close()
