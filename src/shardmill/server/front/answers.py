"""Answers of the front: heads in two pieces, between which the request's id and the date go.

They are made from the same functions as the answers of aiohttp, once for a request and a version of an object.
"""

import os
import time
from email.utils import formatdate
from http import HTTPStatus

import msgspec
from aiohttp import web

from shardmill.core.errors import ServerError, ShardmillError
from shardmill.core.kept import Kept
from shardmill.core.meta import ObjectMeta
from shardmill.node.finished import OpenResult
from shardmill.server.body import describe_range, judge_read
from shardmill.server.errors import error_answer, error_body
from shardmill.server.front.plans import Plan, Ready
from shardmill.server.objects import head_of, member_label
from shardmill.server.transformed import transformed_head, transformed_label

_IDS = 256  # request ids drawn at once
_MARK = "0123456789abcdef"
"""Stands for the request's id where the length of an error's body is counted."""


def ready_answer(plan: Plan, kept: Kept, member: tuple[int, ObjectMeta] | None) -> Ready:
    """The answer to a request for a kept object, or for one of its members, which begins there.

    Raises:
        ShardmillError: It is an error; see `ready_error`.
    """
    source = kept.source
    if source is None:
        assert kept.absent is not None
        raise kept.absent
    base, meta, name = 0, source.meta, plan.ref.key
    what = str(plan.ref)
    if member is not None and plan.member is not None:
        (base, meta), name, what = member, plan.member, member_label(plan.ref, plan.member)
    status, start, stop = judge_read(plan.conditions, plan.wanted, meta, what)
    answer = head_of(name, meta, status)
    if status != 304:
        describe_range(answer, status, start, stop, meta.size)
    if plan.is_head or status == 304:
        start = stop = 0
    return Ready(kept, status, _head(status, answer), _rest(), (base + start, base + stop))


def ready_result(plan: Plan, found: OpenResult) -> Ready:
    """The answer to a request for a finished result.

    Raises:
        ShardmillError: It is an error; see `ready_error`.
    """
    source = found.kept.source
    assert source is not None
    meta = source.meta
    label = transformed_label(plan.ref, found.head)
    status, start, stop = judge_read(plan.conditions, plan.wanted, meta, label)
    answer = transformed_head(plan.ref, found.head, meta, status)
    if status != 304:
        describe_range(answer, status, start, stop, meta.size)
    if plan.is_head or status == 304:
        start = stop = 0
    is_framed = status == 200 and start < stop
    return Ready(found.kept, status, _head(status, answer), _rest(), (start, stop), is_framed=is_framed)


def ready_error(kept: Kept, error: ShardmillError) -> Ready:
    """The answer that says what is wrong."""
    answer = error_answer(error, _MARK)
    body = msgspec.json.encode(error_body(error, _MARK))
    # Inside of a string there would be a backslash before the second of these quotes.
    before, after = body.split(f'"{_MARK}"'.encode())
    rest = _rest(f"Content-Length: {len(body)}")
    return Ready(kept, error.status, _head(error.status, answer), rest, (0, 0), error, (before + b'"', b'"' + after))


def _head(status: int, answer: web.StreamResponse) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    head = "\r\n".join([*lines, "Shardmill-Request-Id: "])
    if "\0" in head or any("\r" in line or "\n" in line for line in lines):
        raise ServerError("a header that would be two")
    return head.encode()


def _rest(*lines: str) -> bytes:
    return "\r\n".join(["", "Server: shardmill", *lines, "Date: "]).encode()


class RequestIds:
    """Ids as `server.calls` draws them, many at a time."""

    def __init__(self) -> None:
        self._left: list[bytes] = []

    def next(self) -> bytes:
        if not self._left:
            digits = os.urandom(8 * _IDS).hex().encode()
            self._left = [digits[place : place + 16] for place in range(0, len(digits), 16)]
        return self._left.pop()


class Clock:
    """The date of an answer with what ends its head, made once a second."""

    def __init__(self) -> None:
        self._text = b""
        self._until = 0.0

    def end_of_head(self, now: float) -> bytes:
        """Args: now: By the monotonic clock."""
        if now >= self._until:
            second = time.time()
            self._text = f"{formatdate(int(second), usegmt=True)}\r\n\r\n".encode()
            self._until = now + 1 - second % 1
        return self._text
