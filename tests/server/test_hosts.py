"""Which hosts and origins are answered: a page of somewhere else must not reach a node that trusts its machine."""

from collections.abc import Iterator

import pytest

from shardmill.testing.node import running_node
from tests.server.wire import Wire


@pytest.fixture(scope="module")
def named() -> Iterator[Wire]:
    """A node on all addresses that answers to names of its own."""
    flags = ("--insecure-no-auth", "--host", "cache.example", "--host", "Cache.Internal")
    with running_node("--bucket", "ais://pool", *flags, listen="0.0.0.0:0") as node:
        yield Wire(node, ())


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "10.0.0.1", "[2001:db8::1]",
     "0x7f.0.0.1", "2130706433", "0.0.0.0", "localhost..", "evil.example:51080"],
)  # fmt: skip
def test_a_host_of_somebody_else_is_403_and_named(wire: Wire, host: str) -> None:
    for path in ("/healthz", "/o/gs/sharded-imagenet/imagenet-train-000000.tar", "/api/config", "/nothing", "/"):
        answer = wire.tell(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (answer.status, answer.code) == (403, "access_denied")
        assert "--host" in answer.message


@pytest.mark.parametrize(
    ("host", "status"),
    [("cache.example", 200), ("CACHE.example:8080", 200), ("cache.internal", 200), ("localhost", 200),
     ("evil.example", 403), ("x.cache.example", 403), ("0.0.0.0", 403)],
)  # fmt: skip
def test_names_given_with_host_are_answered_beside_loopback(named: Wire, host: str, status: int) -> None:
    assert named.tell(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == status


def test_a_node_without_credentials_on_other_addresses_says_so(named: Wire) -> None:
    assert "WARNING: no credentials are asked for" in named.node.output


FOREIGN = ["http://evil.example", "https://localhost.evil.example", "null", "file://", "http://", "localhost", "http://[::1",
           "chrome-extension://abcdef", "http://localhost, http://evil.example", "http://evil.example#localhost"]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_may_change_nothing(wire: Wire, origin: str) -> None:
    header = f"Origin: {origin}"
    for answer in (
        wire.put("/o/ais/pool/foreign", b"x", header),
        wire.delete("/o/ais/pool/foreign", header),
        wire.ask("PUT", "/api/buckets/ais/foreign", header),
        wire.ask("DELETE", "/api/buckets/ais/pool?force=true", header),
        wire.post_json("/api/transforms", {}, header, "Content-Type: text/plain"),
        wire.ask("DELETE", "/api/transforms/any", header),
    ):
        assert (answer.status, answer.code) == (403, "access_denied")
    assert wire.get("/o/ais/pool/foreign").status == 404


def test_two_origins_are_none_of_ours(wire: Wire) -> None:
    answer = wire.put("/o/ais/pool/foreign", b"x", "Origin: http://localhost", "Origin: http://evil.example")
    assert answer.status == 403


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_cannot_read_what_it_makes_a_browser_fetch(wire: Wire, origin: str) -> None:
    """Without leave in the answer a browser keeps it from the page."""
    answer = wire.get("/api/config", f"Origin: {origin}")
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert (
        wire.ask("OPTIONS", "/o/ais/pool/foreign", f"Origin: {origin}", "Access-Control-Request-Method: PUT").status
        == 405
    )


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443", "HTTP://LOCALHOST"]
)
def test_a_page_of_this_machine_may(wire: Wire, origin: str) -> None:
    assert wire.put("/o/ais/pool/own", b"x", f"Origin: {origin}").status in (200, 201)


def test_pages_of_a_named_host_may(named: Wire) -> None:
    assert named.put("/o/ais/pool/own", b"x", "Origin: https://cache.example").status == 201
    assert named.put("/o/ais/pool/own", b"x", "Origin: https://other.example").status == 403
