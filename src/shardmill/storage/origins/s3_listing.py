"""Listings in the S3 dialect (ListObjectsV2), read without the library.

The library gives a listing up at the first key that its paths cannot have, and one such key in a bucket of somebody
else's is enough; it knows no prefix but folders, and a level of millions of keys it holds in memory.

Whether a store lists by folder instead of by key is found out at the first key with a slash; until then a page that
begins behind a key is made as for a store that does, which is right for both.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from urllib.parse import quote, unquote_plus, urlsplit

import aiohttp
import yarl

from shardmill.core.errors import BackendDenied, BackendTimeout, BackendUnavailable, BucketNotFound, ObjectNotFound
from shardmill.core.meta import ListPage
from shardmill.core.origins import OriginFacts
from shardmill.storage.origins.answers import error_of
from shardmill.storage.origins.credentials import Credentials
from shardmill.storage.origins.folders import Document, OutOfOrder, is_by_folder, list_below, list_level
from shardmill.storage.origins.listing import LAST, SKIPPED, Page, is_listable, listed_meta, roll_up
from shardmill.storage.origins.sigv4 import AccessKey, canonical_query, signed_headers

MAX_KEYS = 1000  # of one request
MAX_DOCUMENT = 32 << 20  # bytes; a thousand keys of 1024 bytes, each percent-encoded, are 4 MB


class S3Listing:
    """The listing of one bucket."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: str,
        bucket: str,
        *,
        cut: str,
        label: str,
        credentials: Callable[[], Credentials],
        can_carry: Callable[[str], bool],
        requester_pays: bool,
        is_by_folder: bool | None,
    ) -> None:
        self._session = session
        self._endpoint = endpoint
        self._bucket = bucket
        self._cut = cut
        self._label = label
        self._credentials = credentials
        self._can_carry = can_carry
        self._requester_pays = requester_pays
        self._is_by_folder = is_by_folder

    async def page(self, *, prefix: str, delimiter: str, after: str, limit: int) -> tuple[ListPage, int]:
        """One page, and how many keys were left out; see `core.origins.ListOrigin`."""
        try:
            while True:
                is_plain = not after and delimiter in ("", "/")
                is_by_key = is_plain if self._is_by_folder is None else not self._is_by_folder
                make = self._page_by_key if is_by_key else self._page_by_folder
                found = await make(prefix, delimiter, after, limit)
                if found is not None:
                    return found
        except OutOfOrder as error:
            raise BackendUnavailable(
                f"{self._label}: the store lists {error}, neither by key nor by folder, so that no page would be whole"
            ) from None

    async def _page_by_key(self, prefix: str, delimiter: str, after: str, limit: int) -> tuple[ListPage, int] | None:
        """As the store lists it; None: it turned out to list by folder."""
        page, unlisted = Page(limit), 0
        query = {"prefix": self._cut + prefix, "max-keys": str(min(MAX_KEYS, limit + 1))}
        if delimiter:
            query["delimiter"] = delimiter
        if after:
            # A prefix that was rolled up on the page before would come again for the keys below it.
            query["start-after"] = self._cut + after + (LAST if delimiter and after.endswith(delimiter) else "")
        last = ""
        while True:
            document = await self._list(query)
            names = [*(facts.key for facts in document.objects), *document.prefixes]
            if await self._judge(names, self._cut + prefix):
                return None
            for facts in document.objects:
                if facts.key < last:
                    raise OutOfOrder(facts.key, last)
                last = facts.key
                key = facts.key[len(self._cut) :]
                if key.encode() <= after.encode():
                    continue
                if self._is_listed(facts.key):
                    page.add(key, listed_meta(key, facts))
                else:
                    unlisted += 1
            for name in document.prefixes:
                if name[len(self._cut) :].encode() > after.encode():
                    page.add(name[len(self._cut) :], None)
            if document.token is None or page.is_over:
                return page.build(), unlisted
            query["continuation-token"] = document.token

    async def _page_by_folder(self, prefix: str, delimiter: str, after: str, limit: int) -> tuple[ListPage, int] | None:
        """Folder after folder, right for any store; None: one that lists by key turned out to be asked for too much."""
        page, unlisted = Page(limit), 0
        entries = list_level if delimiter == "/" else list_below
        begin: str | None = self._cut + after if after else ""
        most = min(MAX_KEYS, limit + 1)
        while begin is not None:
            restart, skipped = None, 0
            async with aclosing(entries(self._list, self._cut + prefix, begin, limit=most)) as found:
                async for whole, facts in found:
                    if await self._judge([whole], self._cut + prefix) is False:
                        return None
                    name, is_prefix = roll_up(whole[len(self._cut) :], prefix, delimiter)
                    if name <= after:
                        continue
                    if facts is not None and not self._is_listed(whole):
                        unlisted += 1
                        continue
                    is_new = page.add(name, None if is_prefix or facts is None else listed_meta(name, facts))
                    if page.is_over:
                        break
                    skipped = 0 if is_new else skipped + 1
                    if skipped >= SKIPPED:
                        restart = self._cut + name + LAST
                        break
            begin = restart
        return page.build(), unlisted

    async def _judge(self, names: list[str], prefix: str) -> bool | None:
        """Whether the store lists by folder; None: no name so far can tell.

        Args:
            names: Whole ones.
            prefix: That was listed; who may list it may not be allowed to list more.
        """
        if self._is_by_folder is None:
            slashes = ((name, name.find("/", len(prefix))) for name in names)
            folder = next((name[: slash + 1] for name, slash in slashes if slash >= 0), None)
            if folder is not None:
                self._is_by_folder = await is_by_folder(self._list, prefix, folder)
        return self._is_by_folder

    def _is_listed(self, whole: str) -> bool:
        return is_listable(whole[len(self._cut) :]) and self._can_carry(whole)

    async def _list(self, query: dict[str, str]) -> Document:
        return await self._ask({"list-type": "2", "encoding-type": "url", **query}, self._credentials().key)

    async def check_interface(self) -> None:
        """Raise BackendUnavailable if not a store answers but something in between, with a page for everybody."""
        try:
            await self._ask({"list-type": "2", "max-keys": "1"}, key=None)
        except (BackendDenied, BucketNotFound):
            return  # it wants a signature, as stores do

    async def _ask(self, query: dict[str, str], key: AccessKey | None) -> Document:
        region = self._credentials().region or "auto"
        host = urlsplit(self._endpoint).netloc
        path = urlsplit(self._endpoint).path.rstrip("/") + "/" + quote(self._bucket, safe="-_.~")
        headers = {"x-amz-request-payer": "requester"} if self._requester_pays else {}
        if key is not None:
            headers = signed_headers(
                key,
                host=host,
                path=path,
                query=query,
                headers=headers,
                region=region,
                now=datetime.now(UTC),
            )
        scheme = urlsplit(self._endpoint).scheme
        url = yarl.URL(f"{scheme}://{host}{path}?{canonical_query(query)}", encoded=True)
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise self._error(answer.status, answer.headers.get("Retry-After"))
                body = await _read_bounded(answer)
        except TimeoutError:
            raise BackendTimeout(f"{self._label}: the store did not list it in time") from None
        except aiohttp.ClientError as error:
            raise BackendUnavailable(f"{self._label}: the store could not be asked ({type(error).__name__})") from None
        return self._parsed(body)

    def _error(self, status: int, retry_after: str | None) -> Exception:
        seconds = int(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
        error = error_of(status, self._label, tried=self._credentials().tried, retry_after=seconds)
        return BucketNotFound(f"no bucket {self._label} at the store") if isinstance(error, ObjectNotFound) else error

    def _parsed(self, body: bytes) -> Document:
        try:
            if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
                raise ValueError("a document type")
            root = ElementTree.fromstring(body)
            return _read_document(root)
        except (ElementTree.ParseError, ValueError, TypeError) as error:
            raise BackendUnavailable(f"{self._label}: what came is no listing ({type(error).__name__})") from None


async def _read_bounded(answer: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in answer.content.iter_any():
        size += len(piece)
        if size > MAX_DOCUMENT:
            raise BackendUnavailable("a page of a listing is longer than any can be")
        pieces.append(piece)
    return b"".join(pieces)


def _read_document(root: ElementTree.Element) -> Document:
    """Raises ValueError or TypeError for what is no listing."""
    if not root.tag.endswith("ListBucketResult"):
        raise ValueError("another document")
    space = root.tag.removesuffix("ListBucketResult")
    is_encoded = root.findtext(f"{space}EncodingType") == "url"

    def name(element: ElementTree.Element, tag: str) -> str:
        text = element.findtext(f"{space}{tag}")
        if text is None:
            raise ValueError(f"no {tag}")
        return unquote_plus(text, errors="strict") if is_encoded else text

    objects = []
    for item in root.iterfind(f"{space}Contents"):
        etag = (item.findtext(f"{space}ETag") or "").strip('"')
        modified = datetime.fromisoformat(item.findtext(f"{space}LastModified") or "").timestamp()
        size = int(item.findtext(f"{space}Size") or "")
        objects.append(OriginFacts(name(item, "Key"), size, etag or None, modified))
    prefixes = [name(item, "Prefix") for item in root.iterfind(f"{space}CommonPrefixes")]
    is_more = root.findtext(f"{space}IsTruncated") == "true"
    token = root.findtext(f"{space}NextContinuationToken") if is_more else None
    if is_more and not token:
        raise ValueError("no continuation")
    return Document(objects, prefixes, token)
