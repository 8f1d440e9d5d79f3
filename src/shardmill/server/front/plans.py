"""Requests that the front may answer, and their answers as far as an object's version decides them."""

from shardmill.core.conditions import Conditions
from shardmill.core.errors import ShardmillError
from shardmill.core.kept import Kept
from shardmill.core.paths import TransformedRef
from shardmill.core.ranges import ByteRange
from shardmill.core.refs import ObjectRef


class Ready:
    """The answer to one request by one version of an object.

    Args:
        status: Of the answer.
        head: Up to the request's id.
        rest: From there to the date's value.
        error: What the body says; None: the body is bytes [start, stop) of the object.
        said: The body of an error, up to the request's id and behind it.
        is_framed: The body is a whole shard that was made here; it stops inside a payload, whatever stops it.
    """

    __slots__ = (
        "error",
        "head",
        "is_framed",
        "is_known",
        "is_verified",
        "kept",
        "resident_until",
        "rest",
        "said",
        "start",
        "status",
        "stop",
    )

    def __init__(
        self,
        kept: Kept,
        status: int,
        head: bytes,
        rest: bytes,
        span: tuple[int, int],
        error: ShardmillError | None = None,
        said: tuple[bytes, bytes] = (b"", b""),
        *,
        is_framed: bool = False,
    ) -> None:
        self.kept = kept
        self.status = str(status)
        self.head = head
        self.rest = rest
        self.start, self.stop = span
        self.error = error
        self.said = said
        self.is_framed = is_framed
        self.is_verified = self.start == self.stop
        """The bytes may be sent as they are; once they may, they always may."""
        self.is_known = False
        """Nothing has to be looked at but whether what is kept is current."""
        self.resident_until = 0.0
        """The first of them were in memory lately, and are believed to stay there until then."""


class Plan:
    """A request that the front may answer, parsed."""

    __slots__ = (
        "conditions",
        "head",
        "is_allowed",
        "is_followed",
        "is_head",
        "made",
        "member",
        "path",
        "ready",
        "ref",
        "route",
        "wanted",
    )

    def __init__(
        self,
        head: bytes,
        path: str,
        ref: ObjectRef,
        made: TransformedRef | None,
        member: str | None,
        conditions: Conditions,
        wanted: ByteRange | None,
        *,
        is_head: bool,
        is_followed: bool,
    ) -> None:
        self.head = head
        """As it came, for whoever has to answer after all."""
        self.path = path
        self.route = path[1]
        """Under which it is counted."""
        self.ref = ref
        self.made = made
        """What is made of the object; None: it is asked for itself."""
        self.member = member
        self.conditions = conditions
        self.wanted = wanted
        self.is_head = is_head
        self.is_followed = is_followed
        """It reads, so what was announced to come after it may be begun."""
        self.is_allowed = False
        """Who asks may read there; rights do not change while a node runs."""
        self.ready: Ready | None = None
        """The answer by the version of the object that was met last."""

    @property
    def method(self) -> str:
        return "HEAD" if self.is_head else "GET"
