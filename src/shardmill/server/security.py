"""Which requests are answered at all: rules against DNS rebinding and against foreign pages that write.

A page of another site can make a browser send requests here, by this machine's names or by a name that it has pointed
at this machine; neither may reach a node that trusts loopback.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from aiohttp import web

from shardmill.config import is_loopback
from shardmill.core.errors import AccessDenied, BadRequest

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

_AUTHORITY = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


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
        self.check_host(values[0])
        origin = ", ".join(request.headers.getall("Origin", []))
        if origin and request.method not in SAFE_METHODS:
            scheme = _SCHEME.match(origin)
            origin_host = _host_of(origin[scheme.end() :]) if scheme else None
            if origin_host is None or not self._is_ours(origin_host):
                raise AccessDenied("a page of another origin may not change anything here")

    def check_host(self, authority: str) -> None:
        """Raise AccessDenied unless Host is ours; for reads that is all there is to check.

        Raises:
            BadRequest: It is malformed.
        """
        host = _host_of(authority)
        if host is None:
            raise BadRequest("the Host header is malformed")
        if not self._is_ours(host):
            raise AccessDenied(f"host {host!r} is not one of this node's; name it with --host {host}")

    def _is_ours(self, host: str) -> bool:
        return is_loopback(host) or host in self.hosts


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host_of(authority: str) -> str | None:
    """The host of `host[:port]`, in lower case and without the root's dot; None if it is malformed."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or int(match[2] or 0) > 65535:
        return None
    return match[1].strip("[]").lower().removesuffix(".") or None
