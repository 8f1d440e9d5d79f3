"""Which requests the front answers itself: those of which it knows every byte.

Pure: a verdict is a function of one whole head, so it is remembered by the head's bytes. Whatever is not on the lists
here goes to aiohttp, so that a header that is given a meaning later is not passed over by the front.
"""

import re
from collections import OrderedDict
from urllib.parse import parse_qsl

from shardmill.core.conditions import Conditions
from shardmill.core.errors import ShardmillError
from shardmill.core.paths import parse_object_path, parse_transformed_path
from shardmill.core.ranges import ByteRange
from shardmill.server.front.plans import Plan
from shardmill.server.objects import expected_of
from shardmill.server.security import HostRules

MAX_HEAD = 4096  # bytes; aiohttp's own limits are judged by aiohttp
MAX_REMEMBERED = 1024  # bytes of a head that is remembered
REMEMBERED = 8192  # heads

_END = b"\r\n\r\n"
# Characters of RFC 3986 in a path; of a query the one parameter that there is.
_REQUEST = re.compile(
    rb"(GET|HEAD) (/[ot]/[A-Za-z0-9/._~%!$&'()*+,;=:@-]+)(?:\?(member=[A-Za-z0-9/._~%:@,-]+))? HTTP/1\.1"
)
FIELD = re.compile(rb"([A-Za-z0-9-]{1,64}): ?([!-~]|[!-~][ -~]*[!-~])")

_JUDGED = {
    name.lower(): name
    for name in (
        "Host",
        "Range",
        "If-Match",
        "If-None-Match",
        "If-Modified-Since",
        "If-Unmodified-Since",
        "If-Range",
        "Connection",
    )
}
"""What decides an answer."""
HARMLESS = frozenset(
    [
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "cache-control",
        "cookie",
        "dnt",
        "from",
        "origin",
        "pragma",
        "priority",
        "referer",
        "sec-ch-ua",
        "sec-ch-ua-mobile",
        "sec-ch-ua-platform",
        "sec-fetch-dest",
        "sec-fetch-mode",
        "sec-fetch-site",
        "sec-fetch-user",
        "sec-gpc",
        "traceparent",
        "tracestate",
        "upgrade-insecure-requests",
        "user-agent",
        "via",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-real-ip",
        "x-request-id",
    ]
)
"""What says nothing to a node."""


class Gate:
    """Reads heads, and remembers what it found."""

    def __init__(self, rules: HostRules) -> None:
        self._rules = rules
        self.known: OrderedDict[bytes, Plan] = OrderedDict()
        """Verdicts by whole heads."""

    def next_plan(self, data: bytes, start: int) -> Plan | None:
        """The request that begins at `start` of what came; None: it is not the front's, or not all of it is there."""
        if not start:
            # Most peers send one request and wait for its answer.
            plan = self.known.get(data)
            if plan is not None:
                return plan
        end = data.find(_END, start, start + MAX_HEAD)
        if end < 0:
            return None
        head = data[start : end + len(_END)]
        plan = self.known.get(head)
        if plan is None:
            plan = self._parse(head)
            if plan is not None and len(head) <= MAX_REMEMBERED:
                while len(self.known) >= REMEMBERED:
                    self.known.popitem(last=False)
                self.known[head] = plan
        return plan

    def _parse(self, head: bytes) -> Plan | None:
        first, *lines = head[: -len(_END)].split(b"\r\n")
        request = _REQUEST.fullmatch(first)
        fields = _fields(lines) if request is not None else None
        if request is None or fields is None or fields.get("Connection", "keep-alive").lower() != "keep-alive":
            return None
        method, path, query = request.groups()
        is_head, text = method == b"HEAD", path.decode("ascii")
        try:
            self._rules.check_host(fields.get("Host", ""))
            made = parse_transformed_path(text) if text.startswith("/t/") else None
            ref = parse_object_path(text) if made is None else made.ref
            member = None if query is None else _member(query.decode("ascii"))
        except (ShardmillError, UnicodeDecodeError):
            # What is wrong is said by the other way.
            return None
        if made is not None and (made.spec.digest is None or member is not None):
            # A name without a version stands for another one at any time.
            return None
        wanted = None if is_head else ByteRange.parse(fields.get("Range"))
        is_followed = not is_head and (made is not None or (member is None and expected_of(fields) is not None))
        conditions = Conditions.parse(fields)
        return Plan(head, text, ref, made, member, conditions, wanted, is_head=is_head, is_followed=is_followed)


def _fields(lines: list[bytes]) -> dict[str, str] | None:
    """The headers that decide; None: there is one that is not known, or one twice."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for line in lines:
        field = FIELD.fullmatch(line)
        if field is None:
            return None
        name = field[1].decode("ascii").lower()
        if name in seen:
            return None
        seen.add(name)
        judged = _JUDGED.get(name)
        if judged is not None:
            found[judged] = field[2].decode("ascii")
        elif name not in HARMLESS:
            return None
    return found


def _member(query: str) -> str:
    ((_, name),) = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    return name
