"""S3 and what speaks like it, Google Cloud Storage and Azure: buckets of clouds, through one library.

Keys are carried exactly or refused: the library would cut slashes at the ends of a key and knows no empty segments.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from shardmill.config import OriginSettings
from shardmill.core.errors import (
    BackendDenied,
    BackendTimeout,
    BackendUnavailable,
    BadRequest,
    BucketNotFound,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    ShardmillError,
)
from shardmill.core.meta import ListPage
from shardmill.core.origins import OriginFacts, OriginRead, OriginStatistics
from shardmill.storage.origins.answers import error_of
from shardmill.storage.origins.calls import Calls
from shardmill.storage.origins.drawn import DrawnBody
from shardmill.storage.origins.listing import Listed, list_stream
from shardmill.storage.origins.reading import Answer, ResumedRead, check_version
from shardmill.storage.origins.s3_listing import S3Listing
from shardmill.storage.origins.s3_reading import S3Reading
from shardmill.storage.origins.stores import Stores
from shardmill.storage.origins.uploading import Feed, take_start

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

PIECE = 128 << 10  # bytes; larger delays the first byte from a slow store, smaller costs a call of Python each
SINGLE = 8 << 20  # bytes; larger objects are uploaded in parts
PART = 16 << 20  # bytes; 10 000 parts are 160 GB, larger objects get larger ones
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
MAX_CONDITIONAL = 64 << 20  # bytes; the library sends conditions with whole bodies only, which lie in memory

_KNOWN_ATTRIBUTES = {
    "Content-Disposition",
    "Content-Encoding",
    "Content-Language",
    "Content-Type",
    "Cache-Control",
    "Storage-Class",
}
_SIGNATURES = re.compile(r"(?i)((?:sig|signature|x-amz-[a-z-]+)=)[^&\s\"]+")
# The library has one class for all that it does not expect, and tells the status in its text alone. The URL, which
# comes before it, has no spaces, so that no key can imitate this; the store's own text comes behind.
_STATUS = re.compile(r"Generic \S+ error: (?:Error performing list request: )?Error performing [A-Z]+ \S+ in \S+"
                     r"(?:, after \d+ retries, max_retries: \d+, retry_timeout: \S+ )? - "
                     r"Server returned (?:non-2xx status code: (\d{3}))")  # fmt: skip
_TIMED_OUT = re.compile(r"^ *kind: Timeout,$", re.MULTILINE)


class RemoteOrigin:
    """A bucket of a cloud. See `core.origins.Origin`."""

    def __init__(
        self,
        stores: Stores,
        prefix: str,
        settings: OriginSettings,
        lister: S3Listing | None,
        reader: S3Reading | None,
    ) -> None:
        self._stores = stores
        self._reader = reader
        self._prefix = prefix
        self._calls = Calls(settings)
        self._lister = lister
        self._is_known = False
        """Whether the bucket was seen to exist."""

    async def head(self, key: str) -> OriginFacts:
        return await self._calls.run(lambda: self._head(key))

    @asynccontextmanager
    async def read(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str | None = None
    ) -> AsyncIterator[OriginRead]:
        async def ask(start: int, stop: int | None, version: str | None) -> Answer:
            return await self._open(key, start, stop, version)

        reading = await ResumedRead.begin(ask, start, stop, version, self._calls, self._label(key))
        try:
            yield reading
        finally:
            await reading.close()

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        self._check_signed(self._label(prefix))
        page, unlisted = await self._calls.run(
            lambda: self._list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        )
        self._calls.unlisted += unlisted
        self._is_known = True
        return page

    async def put(
        self,
        key: str,
        body: AsyncIterator[bytes | bytearray | memoryview],
        *,
        size: int | None,
        user: Mapping[str, str],
        content_type: str | None,
        if_match: str | None,
        if_absent: bool,
    ) -> OriginFacts:
        self._path(key)
        self._check_signed(self._label(key))
        feed = Feed(body, size, self._label(key))
        attributes = {**user, **({"Content-Type": content_type} if content_type else {})}
        is_conditional = if_match is not None or if_absent
        start, is_whole = await take_start(feed, MAX_CONDITIONAL if is_conditional else SINGLE)
        if is_conditional and not is_whole:
            raise BadRequest(
                f"{self._label(key)}: a conditional upload to a remote store can have {MAX_CONDITIONAL >> 20} MiB"
            )
        if is_whole:
            mode = await self._mode(key, if_match, if_absent)
            result = await self._calls.run(lambda: self._put_whole(key, start, attributes, mode))
        else:
            result = await self._calls.once(lambda: self._put_parts(key, start, feed, size, attributes))
        self._calls.bytes_written += feed.taken
        return await self._stored(key, feed.taken, result, user, content_type)

    async def delete(self, key: str) -> None:
        async def remove() -> None:
            try:
                await self._asked(lambda: obstore.delete_async(self._stores.writing, self._path(key)), key)
            except ObjectNotFound:
                pass  # Azure says so; the others do not

        await self._calls.run(remove)

    async def copy(self, key: str, target: str) -> None:
        source, path = self._path(key), self._path(target)
        await self._calls.run(lambda: self._asked(lambda: obstore.copy_async(self._stores.writing, source, path), key))

    def statistics(self) -> OriginStatistics:
        return self._calls.statistics()

    async def _head(self, key: str) -> OriginFacts:
        options: Any = {"head": True}
        result = await self._get(key, options)
        return self._facts(key, result)

    async def _open(self, key: str, start: int, stop: int | None, version: str | None) -> Answer:
        if self._reader is not None and self._is_signed_here():
            try:
                answer = await self._reader.open(key, self._path(key), start, stop, version, self._label(key))
            except ObjectNotFound:
                await self._check_bucket()
                raise
            self._is_known = True
            return answer
        options: dict[str, Any] = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        if version is not None and version.startswith("etag:"):
            options["if_match"] = f'"{version.removeprefix("etag:")}"'
        try:
            result = await self._get(key, options, start)
        except PreconditionFailed:
            raise ObjectChanged(f"{self._label(key)} was replaced; read it again") from None
        facts = self._facts(key, result)
        check_version(facts, version, self._label(key))
        return _Answer(facts, result, self)

    async def _check_start(self, key: str, start: int) -> None:
        """Raise RangeNotSatisfiable if a read failed for that; Azure answers some such ranges with success."""
        try:
            facts = await self._head(key)
        except ShardmillError:
            return
        if facts.size is not None and start >= facts.size:
            raise error_of(416, self._label(key), tried="", size=facts.size)

    async def _get(self, key: str, options: Any, start: int = 0) -> Any:
        async def get() -> Any:
            try:
                return await obstore.get_async(self._stores.reading, self._path(key), options=options or None)
            except GenericError as error:
                if start and not _is_explained(error):
                    await self._check_start(key, start)
                raise

        try:
            result = await self._asked(get, key)
        except ObjectNotFound:
            await self._check_bucket()
            raise
        self._is_known = True
        return result

    async def _check_bucket(self) -> None:
        """Tell a missing bucket from a missing object, once; raises BucketNotFound."""
        if self._is_known:
            return
        try:
            await self._list(prefix="", delimiter="", after="", limit=1)
        except BucketNotFound:
            raise
        except ShardmillError:
            return  # who may not list it cannot know
        self._is_known = True

    def _no_bucket(self) -> BucketNotFound:
        return BucketNotFound(f"no bucket {self._stores.provider}://{self._stores.name} at the store")

    def _facts(self, key: str, result: Any) -> OriginFacts:
        meta, attributes = result.meta, result.attributes
        content_type = attributes.get("Content-Type")
        etag = _strong(meta["e_tag"])
        if etag is None and (content_type or "").startswith("text/html"):
            raise BackendUnavailable(
                f"{self._label(key)}: not an object came but a page; is something before the store?"
            )
        user = {name.lower(): value for name, value in attributes.items() if name not in _KNOWN_ATTRIBUTES}
        # The library has the epoch where the answer had no date.
        modified = meta["last_modified"].timestamp() or None
        return OriginFacts(key, meta["size"], etag, modified, content_type, user)

    async def _list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> tuple[ListPage, int]:
        if self._lister is not None and self._is_signed_here():
            return await self._lister.page(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        page, unlisted = await list_stream(
            self._stream,
            cut=self._prefix,
            prefix=prefix,
            delimiter=delimiter,
            after=after,
            limit=limit,
            # Azure's hierarchical namespaces have an order of their own.
            is_ordered=self._stores.provider != "az",
        )
        if self._lister is not None and not (page.objects or page.prefixes or unlisted):
            # To the library any document without keys is an empty listing.
            await self._lister.check_interface()
        return page, unlisted

    def _is_signed_here(self) -> bool:
        """Whether this program can sign requests of its own, beside those of the library."""
        credentials = self._stores.credentials()
        return credentials.kind == "anonymous" or (credentials.kind == "given" and credentials.key is not None)

    async def _stream(self, folder: str, after: str) -> AsyncGenerator[Listed, None]:
        """What the library lists below a folder, full keys."""
        try:
            stream = obstore.list(self._stores.reading, folder or None, offset=after or None, chunk_size=1000)
            async for entries in stream:
                for entry in entries:
                    facts = OriginFacts(
                        entry["path"], entry["size"], _strong(entry["e_tag"]), entry["last_modified"].timestamp()
                    )
                    yield Listed(facts)
        except (BaseError, OSError, ValueError) as error:
            found = self._translated(error, folder)
            raise self._no_bucket() if isinstance(found, ObjectNotFound) else found from None

    async def _mode(self, key: str, if_match: str | None, if_absent: bool) -> Any:
        if if_absent:
            return "create"
        if if_match is None:
            return None
        if self._stores.provider != "gs":
            return {"e_tag": f'"{if_match}"'}
        # Google judges generations, not ETags.
        try:
            result = await self._calls.run(lambda: self._get(key, {"head": True}))
        except ObjectNotFound:
            raise PreconditionFailed(f"{self._label(key)} is not there to be replaced") from None
        if _strong(result.meta["e_tag"]) != if_match:
            raise PreconditionFailed(f"{self._label(key)} has another ETag")
        return {"e_tag": f'"{if_match}"', "version": result.meta["version"]}

    async def _put_whole(self, key: str, data: bytes, attributes: dict[str, str], mode: Any) -> Any:
        return await self._asked(
            lambda: obstore.put_async(
                self._stores.writing,
                self._path(key),
                data,
                attributes=attributes or None,
                mode=mode,
                use_multipart=False,
            ),
            key,
        )

    async def _put_parts(self, key: str, start: bytes, feed: Feed, size: int | None, attributes: dict[str, str]) -> Any:
        path = self._path(key)
        part = PART if size is None else max(PART, -(-size // MAX_PARTS))
        uploading = asyncio.ensure_future(
            obstore.put_async(
                self._stores.writing,
                path,
                feed.from_start(start),
                attributes=attributes or None,
                use_multipart=True,
                chunk_size=part,
                max_concurrency=PARTS_AT_ONCE,
            )
        )
        try:
            return await self._asked(lambda: asyncio.shield(uploading), key)
        except asyncio.CancelledError:
            # The library ends its upload when its body fails, not when it is cancelled.
            feed.break_off()
            await asyncio.wait([uploading])
            uploading.exception()
            raise
        except ShardmillError:
            if feed.problem is not None:
                raise feed.problem from None
            raise

    async def _stored(
        self, key: str, size: int, result: Any, user: Mapping[str, str], content_type: str | None
    ) -> OriginFacts:
        """The facts of what was stored, as the store has them unless it was replaced already."""
        etag = _strong(result["e_tag"])
        names = {name.lower(): value for name, value in user.items()}
        stored = OriginFacts(key, size, etag, time.time(), content_type, names, is_confirmed=False)
        try:
            now = await self.head(key)
        except (BackendUnavailable, BackendDenied, ObjectNotFound):
            return stored
        if etag is None:
            return replace(now, is_confirmed=False)
        return now if now.etag == etag else stored

    async def _asked(self, begin: Callable[[], Awaitable[Any]], key: str) -> Any:
        """What the library answers to a call; raises what its errors mean. Without credentials it is not begun."""
        self._check_signed(self._label(key))
        self._path(key)
        try:
            return await begin()
        except ShardmillError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise self._translated(error, key) from None

    def _check_signed(self, label: str) -> None:
        credentials = self._stores.credentials()
        if credentials.kind == "none":
            raise BackendDenied(
                f"{label}: nothing to sign with; {credentials.tried}; for a public bucket set anonymous = true"
            )

    def _translated(self, error: Exception, key: str) -> ShardmillError:
        label = self._label(key)
        logger.debug("%s: %s", label, _SIGNATURES.sub(r"\1***", str(error)))
        tried = self._stores.credentials().tried
        match error:
            case FileNotFoundError():
                return ObjectNotFound(f"no object {label}")
            case PermissionDeniedError() | UnauthenticatedError():
                return error_of(403, label, tried=tried)
            case PreconditionError() | AlreadyExistsError():
                return PreconditionFailed(f"{label} is not as the condition has it")
            case InvalidPathError():
                return BackendUnavailable(f"{label}: the bucket has keys that cannot be listed through this interface")
            case NotSupportedError():
                return BadRequest(f"{label}: this store cannot do that")
            case GenericError():
                text = str(error)
                if found := _STATUS.match(text):
                    return error_of(int(found[1]), label, tried=tried)
                if _TIMED_OUT.search(text):
                    return BackendTimeout(f"{label}: the store did not answer in time")
                return BackendUnavailable(f"{label}: the store did not answer properly")
            case _:
                return BackendUnavailable(f"{label}: {type(error).__name__} of the store's library")

    def _label(self, key: str) -> str:
        return f"{self._stores.provider}://{self._stores.name}/{self._prefix}{key}"

    def _path(self, key: str) -> str:
        """The whole key, if the library carries it exactly; raises BadRequest."""
        path = self._prefix + key
        problem = uncarried(path, self._stores.provider)
        if problem:
            raise BadRequest(f"the key {key!r} cannot be had from a remote store: {problem}")
        return path


class _Answer:
    """A result of the library, as `reading.Answer`."""

    def __init__(self, facts: OriginFacts, result: Any, origin: RemoteOrigin) -> None:
        self.facts = facts
        self.body: DrawnBody | None = None
        self._result = result
        self._origin = origin

    async def pieces(self) -> AsyncGenerator[memoryview, None]:
        stream = self._result.stream(PIECE)
        try:
            async for piece in stream:
                if len(piece):
                    yield memoryview(piece)
        except (BaseError, OSError, ValueError) as error:
            raise self._origin._translated(error, self.facts.key) from None

    async def close(self) -> None:
        # The connection goes with the last reference.
        self._result = None


def uncarried(path: str, provider: str) -> str | None:
    """Why a key cannot be carried exactly, or None."""
    segments = path.split("/")
    if "" in segments:
        return "it starts or ends with a slash, or has two in a row"
    if "." in segments or ".." in segments:
        return "it has a segment '.' or '..'"
    if provider == "az" and "\\" in path:
        return "Azure takes a backslash for a slash"
    return None


def _is_explained(error: GenericError) -> bool:
    """Whether the library tells of a status or of time, rather than of an answer that it could make nothing of."""
    text = str(error)
    return bool(_STATUS.match(text) or _TIMED_OUT.search(text))


def _strong(etag: str | None) -> str | None:
    """An ETag without quotes, if it is a strong one."""
    if etag is None or etag.startswith("W/"):
        return None
    return etag.strip('"') or None
