"""Reading from stores that speak S3 over plain HTTP, as those of one's own network do, without the library.

The library hands every piece to the loop; here threads receive long bodies, see `drawn.py`. It is for connections
without TLS only, and for keys that this program can sign with.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

import aiohttp
import yarl

from shardmill.core.errors import BackendTimeout, BackendUnavailable
from shardmill.core.origins import OriginFacts
from shardmill.storage.origins.credentials import Credentials
from shardmill.storage.origins.http_answers import HttpAnswer, date_of, error_of_answer, first_byte, size_of
from shardmill.storage.origins.reading import check_version
from shardmill.storage.origins.sigv4 import signed_headers

_USER = "x-amz-meta-"


class S3Reading:
    """The reading of one bucket."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: str,
        bucket: str,
        *,
        credentials: Callable[[], Credentials],
        requester_pays: bool,
        idle_seconds: float,
    ) -> None:
        self._session = session
        self._host = urlsplit(endpoint).netloc
        self._path = f"{urlsplit(endpoint).path.rstrip('/')}/{quote(bucket, safe='-_.~')}"
        self._credentials = credentials
        self._requester_pays = requester_pays
        self._idle_seconds = idle_seconds

    async def open(
        self, key: str, path: str, start: int, stop: int | None, version: str | None, label: str
    ) -> HttpAnswer:
        """Ask for bytes [start, stop) of an object.

        Args:
            key: As the facts have it.
            path: The whole key at the store.
            version: That the bytes must be of.
            label: Names the object in errors.
        """
        answer = await self._ask(path, start, stop, version, label)
        try:
            if answer.status not in (200, 206):
                raise error_of_answer(answer, label, tried=self._credentials().tried)
            facts = _facts(answer, key, label)
            check_version(facts, version, label)
            skipped = first_byte(answer, facts, start, stop, label)
            return HttpAnswer(facts, answer, skipped, start, stop, label, self._idle_seconds)
        except BaseException:
            answer.close()
            raise

    async def _ask(
        self, path: str, start: int, stop: int | None, version: str | None, label: str
    ) -> aiohttp.ClientResponse:
        credentials = self._credentials()
        path = f"{self._path}/{quote(path, safe='-_.~/')}"
        headers = {"x-amz-request-payer": "requester"} if self._requester_pays else {}
        if start or stop is not None:
            headers["range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if version is not None and version.startswith("etag:"):
            headers["if-match"] = f'"{version.removeprefix("etag:")}"'
        if credentials.key is not None:
            headers = signed_headers(
                credentials.key,
                host=self._host,
                path=path,
                query={},
                headers=headers,
                region=credentials.region or "auto",
                now=datetime.now(UTC),
            )
        # An object is wanted as it lies there.
        headers["accept-encoding"] = "identity"
        url = yarl.URL(f"http://{self._host}{path}", encoded=True)
        try:
            return await self._session.get(url, headers=headers, allow_redirects=False)
        except TimeoutError:
            raise BackendTimeout(f"{label}: the store did not answer in time") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise BackendUnavailable(f"{label}: the store could not be asked ({type(error).__name__})") from None


def _facts(answer: aiohttp.ClientResponse, key: str, label: str) -> OriginFacts:
    headers = answer.headers
    etag = headers.get("ETag")
    strong = None if etag is None or etag.startswith("W/") else etag.strip('"') or None
    if strong is None and headers.get("Content-Type", "").startswith("text/html"):
        raise BackendUnavailable(f"{label}: not an object came but a page; is something before the store?")
    size = size_of(answer)
    if size is None or answer.content_length is None:
        raise BackendUnavailable(f"{label}: the store tells no length")
    user = {
        name.lower().removeprefix(_USER): value for name, value in headers.items() if name.lower().startswith(_USER)
    }
    takes_ranges = answer.status == 206 or "range" not in answer.request_info.headers
    return OriginFacts(key, size, strong, date_of(answer), headers.get("Content-Type"), user, takes_ranges=takes_ranges)
