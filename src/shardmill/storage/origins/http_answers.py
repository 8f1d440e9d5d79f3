"""Answers to HTTP requests for objects, whose bodies are the bytes that were asked for, or an error."""

import re
from collections.abc import AsyncGenerator
from email.utils import parsedate_to_datetime

import aiohttp

from shardmill.core.errors import BackendTimeout, BackendUnavailable, ShardmillError
from shardmill.core.origins import OriginFacts
from shardmill.storage.origins.answers import error_of
from shardmill.storage.origins.drawn import DrawnBody

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")


class HttpAnswer:
    """An answer's body, as `reading.Answer`."""

    def __init__(
        self,
        facts: OriginFacts,
        answer: aiohttp.ClientResponse,
        skipped: int,
        start: int,
        stop: int | None,
        label: str,
        idle_seconds: float,
    ) -> None:
        self.facts = facts
        self._answer = answer
        self._skipped = skipped
        self._left = None if stop is None else stop - start
        self._label = label
        length = answer.content_length or 0
        self.body = (
            None
            if skipped
            else DrawnBody.take(
                answer,
                length if self._left is None else min(length, self._left),
                start=start,
                label=label,
                idle_seconds=idle_seconds,
            )
        )

    async def pieces(self) -> AsyncGenerator[memoryview, None]:
        if self.body is not None:
            async for piece in self.body.pieces():
                yield piece
            return
        try:
            # Pieces as they came: joining them would copy all of them.
            async for chunk, _ in self._answer.content.iter_chunks():
                piece = memoryview(chunk)
                if self._skipped:
                    dropped = min(self._skipped, len(piece))
                    self._skipped -= dropped
                    piece = piece[dropped:]
                if self._left is not None:
                    piece = piece[: self._left]
                    self._left -= len(piece)
                if len(piece):
                    yield piece
                if self._left == 0:
                    return
        except TimeoutError:
            raise BackendTimeout(f"{self._label}: the server stalled") from None
        except aiohttp.ClientError as error:
            raise BackendUnavailable(f"{self._label}: the server broke off ({type(error).__name__})") from None

    async def close(self) -> None:
        self._answer.close()
        if self.body is not None:
            self.body.close()


def first_byte(answer: aiohttp.ClientResponse, facts: OriginFacts, start: int, stop: int | None, label: str) -> int:
    """How many bytes come before the first that was asked for; raises for any other answer."""
    if answer.status == 206:
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or (stop is not None and int(match[2]) >= stop):
            raise BackendUnavailable(f"{label}: the server sent another range than the one asked for")
        if stop is None and facts.size is not None and int(match[2]) != facts.size - 1:
            raise BackendUnavailable(f"{label}: the server sent less than the range asked for")
    elif facts.size is not None and start and start >= facts.size:
        raise error_of(416, label, tried="", size=facts.size)
    chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
    if answer.content_length is None and not chunked:
        raise BackendUnavailable(
            f"{label}: the server tells neither a length nor chunks, so that a cut could not be told from the end"
        )
    return 0 if answer.status == 206 else start


def size_of(answer: aiohttp.ClientResponse) -> int | None:
    """Bytes of the whole object, if the answer tells them."""
    if answer.status != 206:
        return answer.content_length
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    return int(match[3]) if match and match[3] != "*" else None


def date_of(answer: aiohttp.ClientResponse) -> float | None:
    """When the object was changed, if the answer tells it."""
    header = answer.headers.get("Last-Modified")
    if header is None:
        return None
    try:
        return parsedate_to_datetime(header).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def error_of_answer(answer: aiohttp.ClientResponse, label: str, *, tried: str) -> ShardmillError:
    """See `answers.error_of`."""
    retry_after = answer.headers.get("Retry-After", "")
    unsatisfied = _UNSATISFIED.fullmatch(answer.headers.get("Content-Range", ""))
    return error_of(
        answer.status,
        label,
        tried=tried,
        retry_after=int(retry_after) if retry_after.isascii() and retry_after.isdigit() else None,
        size=int(unsatisfied[1]) if unsatisfied else None,
    )
