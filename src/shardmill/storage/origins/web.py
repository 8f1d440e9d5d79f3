"""Plain web servers as origins: no listing, no writing, and any of the liberties that HTTP allows.

What comes is either the object, byte for byte, or an error: content codings stay as they are, pages in place of objects
and bodies that only closing ends are refused. Redirects are followed to public addresses only.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
import yarl

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.errors import BackendDenied, BackendTimeout, BackendUnavailable, BadRequest, ShardmillError
from shardmill.core.origins import OriginFacts, OriginRead, OriginStatistics
from shardmill.storage.origins.addresses import CheckedResolver, is_private
from shardmill.storage.origins.calls import Calls
from shardmill.storage.origins.http_answers import HttpAnswer, date_of, error_of_answer, first_byte, size_of
from shardmill.storage.origins.reading import ResumedRead, check_version

REDIRECTS = 5
CONNECTIONS = 64
BUFFER = 1 << 20  # bytes read ahead of the reader

_ETAG = re.compile(r'"([\x21\x23-\x7e\x80-\xff]+)"')
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
_SAFE = "/-._~!$&'()*+,;=:@"  # of a path, RFC 3986 §3.3
_PAGES = (".html", ".htm", ".xhtml")


class WebOrigin:
    """A folder of a web server. See `core.origins.ReadOrigin`."""

    def __init__(self, session: aiohttp.ClientSession, settings: BucketSettings, origins: OriginSettings) -> None:
        self._session = session
        self._base = settings.backing.rstrip("/")
        self._prefix = settings.prefix
        self._token = settings.token
        self._allow_private = settings.allow_private
        self._calls = Calls(origins)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: BucketSettings, origins: OriginSettings, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator["WebOrigin"]:
        host = urlsplit(settings.backing).hostname or ""
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver({host}, allow_private=settings.allow_private), limit=CONNECTIONS
        )
        async with aiohttp.ClientSession(
            timeout=timeout,
            connector=connector,
            auto_decompress=False,
            read_bufsize=BUFFER,
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield cls(session, settings, origins)

    async def head(self, key: str) -> OriginFacts:
        return await self._calls.run(lambda: self._head(key))

    @asynccontextmanager
    async def read(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
    ) -> AsyncIterator[OriginRead]:
        async def ask(start: int, stop: int | None, version: str | None) -> HttpAnswer:
            return await self._open(key, start, stop, version)

        reading = await ResumedRead.begin(ask, start, stop, version, self._calls, self._label(key))
        try:
            yield reading
        finally:
            await reading.close()

    def statistics(self) -> OriginStatistics:
        return self._calls.statistics()

    async def _head(self, key: str) -> OriginFacts:
        answer = await self._ask("HEAD", key, {})
        if answer.status in (405, 501):
            # Some servers know GET only; the head of one is as good.
            answer.close()
            answer = await self._ask("GET", key, {})
        try:
            self._check_success(answer, key)
            return self._facts(answer, key)
        finally:
            answer.close()

    async def _open(self, key: str, start: int, stop: int | None, version: str | None) -> HttpAnswer:
        headers = {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if version is not None and version.startswith("etag:"):
            headers["If-Match"] = f'"{version.removeprefix("etag:")}"'
        answer = await self._ask("GET", key, headers)
        try:
            self._check_success(answer, key)
            facts = self._facts(answer, key)
            check_version(facts, version, self._label(key))
            skipped = first_byte(answer, facts, start, stop, self._label(key))
            return HttpAnswer(facts, answer, skipped, start, stop, self._label(key), self._calls.settings.idle_timeout)
        except BaseException:
            answer.close()
            raise

    async def _ask(self, method: str, key: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The answer's head, behind redirects."""
        url = self._url(key)
        label = self._label(key)
        for _ in range(REDIRECTS + 1):
            sent = dict(headers)
            # Other hosts are told nothing that is between this one and the node.
            if self._token and _origin(url) == _origin(self._base):
                sent["Authorization"] = f"Bearer {self._token!s}"
            answer = await self._request(method, url, sent, label)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            target = answer.headers.get("Location", "")
            answer.close()
            url = urljoin(url, target)
            self._check_target(url, label)
        raise BackendUnavailable(f"{label}: the server redirects in a circle")

    async def _request(self, method: str, url: str, headers: dict[str, str], label: str) -> aiohttp.ClientResponse:
        try:
            return await self._session.request(
                method, yarl.URL(url, encoded=True), headers=headers, allow_redirects=False
            )
        except ShardmillError:
            raise
        except TimeoutError:
            raise BackendTimeout(f"{label}: the server did not answer in time") from None
        except (aiohttp.ClientError, ValueError) as error:
            if isinstance(error.__cause__, ShardmillError):
                raise error.__cause__ from None
            raise BackendUnavailable(f"{label}: the server could not be asked ({type(error).__name__})") from None

    def _check_target(self, url: str, label: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BackendUnavailable(f"{label}: the server redirects to what is no web page")
        if parts.scheme == "http" and self._base.startswith("https"):
            raise BackendDenied(f"{label}: the server redirects from https to http")
        is_own = parts.hostname == urlsplit(self._base).hostname
        # Names are checked when they are resolved; a literal address never is.
        if not is_own and not self._allow_private and is_private(parts.hostname):
            raise BackendDenied(
                f"{label}: the server redirects to a private address; where that is meant, set allow_private = true"
            )

    def _check_success(self, answer: aiohttp.ClientResponse, key: str) -> None:
        if answer.status in (200, 206):
            return
        tried = "a token is set" if self._token else "no token is set"
        raise error_of_answer(answer, self._label(key), tried=tried)

    def _facts(self, answer: aiohttp.ClientResponse, key: str) -> OriginFacts:
        headers = answer.headers
        content_type = headers.get("Content-Type")
        if (content_type or "").startswith("text/html") and not key.lower().endswith(_PAGES):
            raise BackendUnavailable(
                f"{self._label(key)}: an HTML page came in place of the object; is a login needed?"
            )
        etag = _ETAG.fullmatch(headers.get("ETag", ""))
        takes_ranges = answer.status == 206 or headers.get("Accept-Ranges", "").lower() != "none"
        if answer.status == 200 and answer.request_info.headers.get("Range"):
            takes_ranges = False
        return OriginFacts(
            key,
            size_of(answer),
            etag[1] if etag else None,
            date_of(answer),
            content_type,
            takes_ranges=takes_ranges,
        )

    def _url(self, key: str) -> str:
        path = self._prefix + key
        if {".", ".."} & set(path.split("/")):
            raise BadRequest(f"the key {key!r} cannot be had from a web server: it has a segment '.' or '..'")
        return f"{self._base}/{quote(path, safe=_SAFE)}"

    def _label(self, key: str) -> str:
        return f"{_CREDENTIALS.sub('', self._base)}/{self._prefix}{key}"


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]
