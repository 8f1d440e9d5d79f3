"""Which requests are answered at all: rules against DNS rebinding and against foreign pages that write.

A page of another site can make a browser send requests here, by this machine's names or by a name that it has pointed
at this machine; neither may reach a node that trusts loopback.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from shardmill.config import is_loopback
from shardmill.core.errors import AccessDenied, BadRequest

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class HostRules:
    """Host names that requests may carry, in lower case, beside loopback."""

    hosts: frozenset[str]

    @classmethod
    def of(cls, listen_host: str, hosts: Iterable[str]) -> "HostRules":
        """The configured names, and the address listened on if it is one."""
        own = [] if _is_unspecified(listen_host) else [listen_host]
        return cls(frozenset(name.lower() for name in (*own, *hosts)))

    def check(self, request: web.BaseRequest) -> None:
        """Raise AccessDenied unless Host and, for writes, Origin are ours.

        Raises:
            BadRequest: Host is missing, doubled or malformed.
        """
        values = request.headers.getall("Host", [])
        if len(values) != 1:
            raise BadRequest("the request needs exactly one Host header")
        host = _host_of(f"//{values[0]}")
        if host is None:
            raise BadRequest("the Host header is malformed")
        if not self._is_ours(host):
            raise AccessDenied(f"host {host!r} is not one of this node's; name it with --host {host}")
        origin = request.headers.get("Origin")
        if origin is not None and request.method not in SAFE_METHODS:
            origin_host = _host_of(origin)
            if origin_host is None or not self._is_ours(origin_host):
                raise AccessDenied("a page of another origin may not change anything here")

    def _is_ours(self, host: str) -> bool:
        return is_loopback(host) or host in self.hosts


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    if parts.username is not None or parts.path or not parts.hostname:
        return None
    return parts.hostname.lower().rstrip(".")
