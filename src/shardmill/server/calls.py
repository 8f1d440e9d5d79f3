"""One request, parsed once: raw path, query, who asks, and the id that names it in answers and logs."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from aiohttp import web
from multidict import CIMultiDict

from shardmill.core.errors import BadRequest
from shardmill.node.access import ANONYMOUS, Principal

MAX_PARAMETERS = 32

_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


@dataclass(slots=True)
class Call:
    """What handlers get."""

    request: web.BaseRequest
    id: str
    path: str
    """As sent: percent-encoded, without query; nothing is normalised."""
    query_text: str
    headers: Mapping[str, str]
    """Case-insensitive; of a doubled header the list that its lines make (RFC 9110 §5.3)."""
    principal: Principal = ANONYMOUS
    route: str = "other"
    """Label of metrics: the face, never a key."""
    sent: int = 0
    """Bytes of a streamed body that were handed on."""
    received: int = 0
    """Bytes of the request's body that were read."""
    is_broken: bool = False
    """The request is not framed as it should be, so what follows on the connection is not to be trusted."""
    is_invited: bool = False
    """A client that waits for it was asked for its body."""
    answer: web.StreamResponse | None = field(default=None, repr=False)
    """The answer once its head may have been sent."""

    @classmethod
    def parse(cls, request: web.BaseRequest) -> "Call":
        """Split the request target without decoding it."""
        target = request.raw_path
        absolute = _ABSOLUTE.match(target)
        if absolute is not None:
            # Only the path counts; the host is judged by the Host header.
            target = target[absolute.end() :]
            target = target if target.startswith("/") else f"/{target}"
        path, _, query_text = target.partition("?")
        return cls(request, secrets.token_hex(8), path, query_text, _joined(request))

    @property
    def method(self) -> str:
        return self.request.method

    @property
    def is_waiting_to_send(self) -> bool:
        """The client sends its body only when it is asked to (RFC 9110 §10.1.1), and it was not."""
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        return expects and self.request.body_exists and not self.is_invited

    async def send_head(self, answer: web.StreamResponse) -> None:
        """Send the answer's head; from here on a failure can only cut it."""
        if self.is_broken or self.is_waiting_to_send:
            # What comes next may be the body or another request, and nobody can tell which.
            answer.force_close()
        answer.headers["Shardmill-Request-Id"] = self.id
        answer.headers["Server"] = "shardmill"
        self.answer = answer
        await answer.prepare(self.request)

    async def invite_body(self) -> None:
        """Ask for the body, if the client waits to be asked."""
        if self.is_waiting_to_send:
            self.is_invited = True
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # The interim answer is not part of the final one.
            self.request.writer.output_size = 0

    def query(self, *known: str) -> dict[str, str]:
        """The query's parameters.

        Raises:
            BadRequest: One that is not known, one given twice, or bytes that are not UTF-8.
        """
        if not self.query_text:
            return {}
        try:
            pairs = parse_qsl(self.query_text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS, errors="strict")
        except (ValueError, UnicodeDecodeError):
            raise BadRequest("the query is not a list of name=value pairs in UTF-8") from None
        found: dict[str, str] = {}
        for name, value in pairs:
            if name not in known:
                hint = f"known: {', '.join(known)}" if known else "none is known here"
                raise BadRequest(f"unknown query parameter {name!r}; {hint}")
            if name in found:
                raise BadRequest(f"query parameter {name!r} is given twice")
            found[name] = value
        return found


def _joined(request: web.BaseRequest) -> Mapping[str, str]:
    headers = request.headers
    if len({name.lower() for name in headers}) == len(headers):
        return headers
    return CIMultiDict((name, ", ".join(headers.getall(name))) for name in {name.lower() for name in headers})
