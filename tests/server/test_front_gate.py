"""Which heads the front takes, and what it reads in them."""

import pytest

from shardmill.server.front.gate import MAX_HEAD, REMEMBERED, Gate
from shardmill.server.security import HostRules

HOST = b"Host: localhost\r\n"
GET = b"GET /o/ais/pool/a/b.tar HTTP/1.1\r\n" + HOST


@pytest.fixture
def gate() -> Gate:
    return Gate(HostRules.of("127.0.0.1", ["cache.example"]))


TAKEN = {
    "plain": GET + b"\r\n",
    "HEAD": b"HEAD /o/ais/pool/a HTTP/1.1\r\n" + HOST + b"\r\n",
    "of curl": GET + b"User-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
    "of requests": GET + b"User-Agent: x\r\nAccept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n",
    "of a browser": GET + b"Sec-Fetch-Mode: cors\r\nReferer: http://localhost/\r\nCookie: a=b\r\nDNT: 1\r\n\r\n",
    "range": GET + b"Range: bytes=1-2\r\n\r\n",
    "conditions": GET + b'If-None-Match: "x"\r\nif-modified-since: Wed, 25 Nov 2026 13:00:00 GMT\r\n\r\n',
    "member": b"GET /o/ais/pool/a.tar?member=x%20y.jpg HTTP/1.1\r\n" + HOST + b"\r\n",
    "a name of its own": GET.replace(b"localhost", b"cache.example:80") + b"\r\n",
    "no space behind the colon": GET + b"Accept:*/*\r\n\r\n",
}  # fmt: skip
LEFT = {
    "nothing": b"",
    "half a head": GET,
    "another face": b"GET /t/ais/pool/a HTTP/1.1\r\n" + HOST + b"\r\n",
    "another method": b"DELETE /o/ais/pool/a HTTP/1.1\r\n" + HOST + b"\r\n",
    "an older version": b"GET /o/ais/pool/a HTTP/1.0\r\n" + HOST + b"\r\n",
    "a whole URL": b"GET http://localhost/o/ais/pool/a HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host": b"GET /o/ais/pool/a HTTP/1.1\r\n\r\n",
    "two hosts": GET + HOST + b"\r\n",
    "a host of somebody else": b"GET /o/ais/pool/a HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "a bad key": b"GET /o/ais/pool/%00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "no bucket": b"GET /o/ais HTTP/1.1\r\n" + HOST + b"\r\n",
    "two ranges' headers": GET + b"Range: bytes=1-2\r\nRange: bytes=3-4\r\n\r\n",
    "a header twice that decides nothing": GET + b"Accept: a\r\nAccept: b\r\n\r\n",
    "a header that is not known": GET + b"X-Odd: 1\r\n\r\n",
    "credentials": GET + b"Authorization: Bearer x\r\n\r\n",
    "a body": GET + b"Content-Length: 0\r\n\r\n",
    "chunks": GET + b"Transfer-Encoding: chunked\r\n\r\n",
    "an expectation": GET + b"Expect: 100-continue\r\n\r\n",
    "a wish to close": GET + b"Connection: close\r\n\r\n",
    "an upgrade": GET + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a tab": GET + b"Accept: a\tb\r\n\r\n",
    "a byte that is no ASCII": GET + b"Accept: \xe4\r\n\r\n",
    "a folded header": GET + b"Accept: a\r\n b\r\n\r\n",
    "a bare LF": GET + b"Accept: a\nb\r\n\r\n",
    "a space before the colon": GET + b"Accept : a\r\n\r\n",
    "an empty header": GET + b"Accept:\r\n\r\n",
    "a space at the end": GET + b"Accept: a \r\n\r\n",
    "another parameter": b"GET /o/ais/pool/a?x=1 HTTP/1.1\r\n" + HOST + b"\r\n",
    "two members": b"GET /o/ais/pool/a?member=a&member=b HTTP/1.1\r\n" + HOST + b"\r\n",
    "a member that is no UTF-8": b"GET /o/ais/pool/a?member=%ff HTTP/1.1\r\n" + HOST + b"\r\n",
    "no member": b"GET /o/ais/pool/a?member= HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /o/ais/pool/a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "too long": GET + b"Accept: " + b"a" * MAX_HEAD + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_plain_is_taken(gate: Gate, what: str) -> None:
    head = TAKEN[what]
    for behind in (b"", GET + b"\r\n", b"\x00"):
        plan = gate.next_plan(head + behind, 0)
        assert plan is not None
        assert plan.head == head
        assert plan is gate.next_plan(b"before" + head + behind, 6)


@pytest.mark.parametrize("what", LEFT)
def test_everything_else_is_left_to_aiohttp(gate: Gate, what: str) -> None:
    for _ in range(2):
        assert gate.next_plan(LEFT[what], 0) is None


def test_what_decides_is_read(gate: Gate) -> None:
    head = b'HEAD /o/ais/pool/%61b.tar?member=x%20y HTTP/1.1\r\nhost: localhost\r\nIf-Match: "a", "b"\r\n\r\n'
    plan = gate.next_plan(head, 0)
    assert plan is not None
    assert (str(plan.ref), plan.member, plan.is_head, plan.wanted) == ("ais://pool/ab.tar", "x y", True, None)
    assert plan.conditions.if_match == ("a", "b")
    plan = gate.next_plan(GET + b"Range: bytes=5-9\r\n\r\n", 0)
    assert plan is not None
    assert plan.wanted is not None
    assert plan.wanted.resolve(8) == (5, 8)


def test_no_more_than_so_many_are_remembered(gate: Gate) -> None:
    first = gate.next_plan(GET + b"\r\n", 0)
    for number in range(REMEMBERED):
        assert gate.next_plan(b"GET /o/ais/pool/%d HTTP/1.1\r\n%b\r\n" % (number, HOST), 0) is not None
    again = gate.next_plan(GET + b"\r\n", 0)
    assert again is not None
    assert again is not first
